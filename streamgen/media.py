"""Frames in and out of files, a chunk at a time, and a clock for showing them.

The idea: a video is written while it is generated, so that its length costs no memory (ffmpeg's index apart: about 100
bytes a frame, 6 MB an hour) and whatever ends the process leaves a file that plays. Encoding happens in a child
process, ffmpeg, that reads raw frames from a pipe; it runs in a session of its own, so Ctrl-C does not reach it, and
when our end of the pipe goes away, for whatever reason, it finishes the file. An mp4 is written in fragments of a
second, so that even ffmpeg's own death costs only the last few.

    with open_sink("story.mp4", fps=16) as sink:
        for chunk in stream:
            sink.write(chunk.frames)        # uint8 [f, H, W, 3]
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from streamgen.errors import InputError

__all__ = [
    "MediaError", "Pacer", "VideoInfo", "VideoSink", "check_output", "contact_sheet", "iter_video", "open_sink",
    "read_video", "save_image", "video_info",
]  # fmt: skip

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class MediaError(RuntimeError):
    """Writing failed on the way (disk full, encoder gone). The one-line message says what was kept."""


# --------------------------------------------------------------------------------------------------------------- paths


def _is_folder(path: str | os.PathLike[str]) -> bool:
    text = os.fspath(path)
    return text.endswith(("/", os.sep)) or not Path(text).suffix


def _check_file(target: Path, shown: Path | None = None) -> None:
    parent, refuse = target.parent, f"cannot write {shown or target}: "
    if target.is_dir():
        raise InputError(f"{refuse}it is a folder; give a file name, for example {target / 'clip.mp4'}")
    if not parent.exists():
        raise InputError(f"{refuse}the folder {parent} does not exist; create it with `mkdir -p {parent}`")
    if not parent.is_dir():
        raise InputError(f"{refuse}{parent} is not a folder; choose another place")
    existed = os.path.lexists(target)
    try:
        if existed and not target.is_file():  # a device or a fifo: opening one may wait for a reader
            if target.exists() and not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            with open(target, "ab"):  # asks the system itself: root, read-only mounts and ACLs included
                pass
            if not existed:
                target.unlink()
    except OSError as error:
        raise InputError(f"{refuse}{error.strerror or error}; choose a place that you may write to") from None


def _check_folder(target: Path) -> None:
    if target.is_dir():
        if next(target.glob("frame_*.png"), None) is not None:
            raise InputError(f"cannot write {target}: it holds frames already; empty it or choose another folder")
        _check_file(target / f".streamgen-{os.getpid()}", shown=target)
    elif os.path.lexists(target):
        kinds = ", ".join(VIDEO_SUFFIXES)
        raise InputError(f"cannot write frames to {target}: it is a file; choose a folder or a name ending in {kinds}")
    else:
        _check_file(target)


def check_output(path: str | os.PathLike[str], suffixes: Sequence[str] = VIDEO_SUFFIXES) -> Path:
    """Refuse a path that cannot be written, before anything is computed; an existing file is left as it is.

    Args:
        path: a file with one of `suffixes`; where a video is meant, also a folder (no suffix, or a trailing slash).
        suffixes: what is accepted; the default is every kind of video.
    Returns: the path. Raises: InputError.
    """
    target = Path(path)
    if tuple(suffixes) == VIDEO_SUFFIXES and _is_folder(path):
        _check_folder(target)
    elif target.suffix.lower() not in suffixes:
        folder = ", or a folder of PNG frames (trailing slash)" if tuple(suffixes) == VIDEO_SUFFIXES else ""
        raise InputError(f"cannot write {target}: unknown kind '{target.suffix}'; use {', '.join(suffixes)}{folder}")
    else:
        _check_file(target)
    return target


# -------------------------------------------------------------------------------------------------------------- ffmpeg


@functools.cache
def _ffmpeg() -> str:
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise MediaError(
            "no ffmpeg: this imageio-ffmpeg has none inside; `pip install --force-reinstall imageio-ffmpeg`, "
            "or name one in IMAGEIO_FFMPEG_EXE, or write a folder of PNG frames"
        ) from None


@functools.cache
def _has_hybrid(ffmpeg: str) -> bool:
    """Whether a fragmented mp4 can become an ordinary one on closing (ffmpeg 7.1)."""
    shown = subprocess.run([ffmpeg, "-hide_banner", "-h", "muxer=mp4"], capture_output=True, stdin=subprocess.DEVNULL)
    return b"hybrid_fragmented" in shown.stdout


def _plays(path: Path) -> bool:
    """Whether at least one frame can be read back."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    one = ["-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "gray", "-"]
    command = [_ffmpeg(), "-v", "quiet", "-i", f"file:{path}", *one]
    return bool(subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).stdout)


def _encoder_arguments(target: Path, height: int, width: int, fps: float, quality: float) -> list[str]:
    """What stands between `-i pipe:0` and the output's name."""
    suffix = target.suffix.lower()
    if suffix == ".gif":  # a palette per frame: no second pass, hence nothing to remember
        palette = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=bayer:bayer_scale=4"
        return ["-filter_complex", palette, "-f", "gif", "-loop", "0"]
    second = str(max(1, round(fps)))  # one keyframe, and so one fragment, per second: also what a seek costs
    common = ["-an", "-g", second, "-flush_packets", "1"]
    # swscale's default is BT.601 and an untagged file, which players take for BT.709 from some size on: say which it is
    matrix = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"
    tags = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
    if suffix == ".webm":  # VP9 stores odd sizes as they are
        coder = ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-row-mt", "1", "-b:v", "0"]
        coder += ["-crf", str(round(62 - 4.5 * quality)), "-pix_fmt", "yuv420p"]
    else:  # half-size colour planes need even sizes in H.264; nothing is resized, so an odd size keeps full planes
        odd = height % 2 or width % 2
        if odd:
            text = "%s: %d×%d is odd, so it becomes H.264 4:4:4, which browsers do not play; they do play .webm"
            logger.warning(text, target, height, width)
        coder = ["-c:v", "libx264", "-preset", "veryfast", "-crf", str(round(40 - 2.75 * quality))]
        coder += ["-pix_fmt", "yuv444p" if odd else "yuv420p"]
    arguments = ["-vf", matrix, *coder, *tags, *common]
    if suffix == ".mp4":
        rewritable = target.is_file() or not target.exists()  # not a device or a fifo
        hybrid = rewritable and _has_hybrid(_ffmpeg())
        flags = "+frag_keyframe+empty_moov" + ("+hybrid_fragmented" if hybrid else "+default_base_moof")
        return [*arguments, "-movflags", flags, "-f", "mp4"]
    return [*arguments, "-cluster_time_limit", "1000", "-f", "webm" if suffix == ".webm" else "matroska"]


# --------------------------------------------------------------------------------------------------------------- sinks


@runtime_checkable
class VideoSink(Protocol):
    """Somewhere frames go, in order. A context manager; `close` may be called more than once."""

    path: Path
    frames: int  # taken so far

    def write(self, frames: np.ndarray) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> VideoSink: ...

    def __exit__(self, *exc: Any) -> None: ...


class _Sink:
    """What both kinds share: checking frames, counting, closing."""

    def __init__(self, path: Path, size: tuple[int, int] | None) -> None:
        self.path = path
        self.frames = 0
        self._size = None if size is None else (int(size[0]), int(size[1]))  # (height, width)
        self._closed = False

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 frames [f, H, W, 3]. Raises: MediaError when the file cannot take them."""
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            what = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, np.ndarray) else type(frames).__name__
            raise ValueError(f"frames must be a uint8 array [f, H, W, 3], not {what}")
        size = (frames.shape[1], frames.shape[2])
        if self._size is None:
            self._size = size
        if size != self._size:
            raise ValueError(f"frames of {size} in a video of {self._size} (height, width): a file has one size")
        for frame in frames:
            self._put(np.ascontiguousarray(frame))
            self.frames += 1

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._finish()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            return self.close()
        with contextlib.suppress(MediaError):  # the first error is the one to report
            self.close()

    def _put(self, frame: np.ndarray) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError


class FfmpegSink(_Sink):
    """A video file, encoded by ffmpeg in a process of its own."""

    def __init__(self, path: Path, fps: float, size: tuple[int, int] | None, quality: float) -> None:
        super().__init__(path, size)
        self.process: subprocess.Popen[bytes] | None = None  # starts with the first frame, which tells the size
        self._fps, self._quality = fps, quality
        self._torn = False  # a write was interrupted inside a frame: nothing can follow it
        _ffmpeg()  # said before anything is computed
        if size is not None:
            self._start()

    def _start(self) -> None:
        assert self._size is not None
        height, width = self._size
        rate = str(Fraction(self._fps).limit_denominator(1001))
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-framerate", rate, "-i", "pipe:0"]
        command = [_ffmpeg(), "-y", "-hide_banner", "-nostats", "-loglevel", "error", *source]
        command += [*_encoder_arguments(self.path, height, width, self._fps, self._quality), f"file:{self.path}"]
        self._log = tempfile.TemporaryFile()  # not a pipe: nobody would read it while frames are written
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._log, bufsize=0,
            start_new_session=True,  # Ctrl-C is for us: ffmpeg ends when its input ends
            restore_signals=False,  # SIGXFSZ stays ignored: a limit on file size is then an error, not a death
        )  # fmt: skip

    def _put(self, frame: np.ndarray) -> None:
        if self.process is None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        if self._torn:
            raise MediaError(f"{self.path}: writing was interrupted inside a frame; close it and open another file")
        left = memoryview(frame).cast("B")
        self._torn = True
        try:
            while left:
                left = left[self.process.stdin.write(left) :]
        except OSError:
            self._closed = True
            self._shut()
            raise self._failure() from None
        self._torn = False

    def _shut(self) -> int:
        """End ffmpeg's input and wait for it; its exit code."""
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            return self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:  # a forked child may hold the pipe; asked to stop, ffmpeg completes the file
            self.process.terminate()
            return self.process.wait()

    def _failure(self) -> MediaError:
        self._log.seek(0)
        lines = self._log.read(100_000).decode(errors="replace").splitlines()
        self._log.close()
        numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.EPIPE)
        known = [os.strerror(number) for number in numbers if any(os.strerror(number) in line for line in lines)]
        assert self.process is not None
        reason = known[0] if known else lines[-1].strip() if lines else f"ffmpeg ended with {self.process.returncode}"
        kept = "what was written before stays and plays" if _plays(self.path) else "nothing playable was kept"
        return MediaError(f"{self.path}: writing stopped near frame {self.frames}: {reason}; {kept}")

    def _finish(self) -> None:
        if self.process is None:
            return
        code = self._shut()
        if code and not self._torn:  # of a torn frame ffmpeg rightly complains
            raise self._failure()
        self._log.close()


class FolderSink(_Sink):
    """PNG frames `frame_000000.png`, …, each complete or absent."""

    def _put(self, frame: np.ndarray) -> None:
        target = self.path / f"frame_{self.frames:06d}.png"
        try:
            self.path.mkdir(exist_ok=True)
            _save(target, frame, compress_level=3)
        except OSError as error:
            self._closed = True
            raise MediaError(
                f"{target}: writing stopped: {error.strerror or error}; the {self.frames} frames before it stay"
            ) from None

    def _finish(self) -> None:
        pass


def open_sink(
    path: str | os.PathLike[str], fps: float = 16, size: tuple[int, int] | None = None, quality: float = 8
) -> VideoSink:
    """Open a file, or a folder, that takes frames as they come; the suffix says which kind.

    `.mp4`, `.mkv` (H.264), `.webm` (VP9), `.gif`; no suffix or a trailing slash: a folder of PNG frames. Nothing is
    ever resized. A file that exists is replaced when the first frame arrives; with no frame at all it stays as it was.
    Args:
        fps: frames per second of playback.
        size: (height, width) if known, so that encoding is set up at once; otherwise the first frame tells.
        quality: 0 (smallest file) to 10 (nearly lossless); GIF and PNG have no such choice.
    Raises: InputError if the path cannot be written; MediaError if there is no ffmpeg.
    """
    if not fps > 0:
        raise InputError(f"{fps} frames per second cannot be played; choose more than 0")
    if not 0 <= quality <= 10:
        raise InputError(f"quality {quality} does not exist; choose 0 (smallest file) to 10 (nearly lossless)")
    target = check_output(path)
    return FolderSink(target, size) if _is_folder(path) else FfmpegSink(target, fps, size, quality)


# -------------------------------------------------------------------------------------------------------------- images


def _save(path: Path, array: np.ndarray, **options: Any) -> None:
    """Write an image under another name first, so that no half of one is ever seen."""
    from PIL import Image

    partial = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        Image.fromarray(array).save(partial, **options)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save_image(path: str | os.PathLike[str], array: np.ndarray) -> Path:
    """Write uint8 [H, W, 3] (or [H, W]) as .png, .jpg or .webp. Raises: InputError, MediaError."""
    target = check_output(path, IMAGE_SUFFIXES)
    array = np.asarray(array)
    if array.dtype != np.uint8 or not (array.ndim == 2 or array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise ValueError(f"an image must be uint8 [H, W, 3], not {array.dtype} {list(array.shape)}")
    try:
        _save(target, array)
    except OSError as error:
        raise MediaError(f"{target}: {error.strerror or error}; nothing was kept") from None
    return target


def contact_sheet(
    clips: Sequence[np.ndarray], columns: int, labels: Sequence[str] | None = None, every: int | None = None
) -> np.ndarray:
    """Show clips as rows of frames, one band per clip with its label above it.

    Args:
        clips: uint8 [F, H, W, 3] each; sizes may differ.
        columns: frames per row.
        labels: one line per clip.
        every: take frames 0, every, 2·every, …, in as many rows as that needs; None: one row, from first to last frame.
    Returns: uint8 [height, width, 3].
    """
    from PIL import Image, ImageDraw

    clips = [np.asarray(clip) for clip in clips]
    if not clips or columns < 1 or (every is not None and every < 1):
        raise ValueError("a contact sheet needs at least one clip, one column and a positive step")
    if labels is not None and len(labels) != len(clips):
        raise ValueError(f"{len(labels)} labels for {len(clips)} clips")
    for clip in clips:
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or len(clip) == 0:
            raise ValueError(f"a clip must be uint8 [F, H, W, 3], not {clip.dtype} {list(clip.shape)}")
    gap, line, paper = 4, 16, 24
    cell_h, cell_w = max(clip.shape[1] for clip in clips), max(clip.shape[2] for clip in clips)
    rows: list[tuple[str, list[list[np.ndarray]]]] = []
    for i, clip in enumerate(clips):
        spread = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        frames = [clip[k] for k in (spread if every is None else range(0, len(clip), every))]
        label = " ".join(str(labels[i]).split()) if labels is not None else ""
        rows.append((label, [frames[k : k + columns] for k in range(0, len(frames), columns)]))
    shown = max(len(row) for _, parts in rows for row in parts)
    height = gap + sum((line if label else 0) + len(parts) * (cell_h + gap) for label, parts in rows)
    width = gap + shown * (cell_w + gap)
    sheet = Image.new("RGB", (width, height), (paper,) * 3)
    draw = ImageDraw.Draw(sheet)
    y = gap
    for label, parts in rows:
        if label:
            while len(label) > 1 and draw.textlength(label) > width - 2 * gap:
                label = label.removesuffix("…")[:-1] + "…"
            draw.text((gap, y), label, fill=(235,) * 3)
            y += line
        for row in parts:
            for k, frame in enumerate(row):
                sheet.paste(Image.fromarray(np.ascontiguousarray(frame)), (gap + k * (cell_w + gap), y))
            y += cell_h + gap
    return np.array(sheet)


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class VideoInfo:
    height: int
    width: int
    fps: float
    seconds: float  # as the file says; 0 where it does not
    codec: str


def _open_video(path: str | os.PathLike[str]) -> tuple[VideoInfo, Iterator[bytes]]:
    import imageio_ffmpeg

    source = Path(path)
    if not source.is_file():
        what = "it is a folder" if source.is_dir() else "there is no such file"
        raise InputError(f"cannot read {source}: {what}; give a video file")
    _ffmpeg()
    # every frame that is stored, once: without this, uneven timing (GIF) drops and repeats some
    frames = imageio_ffmpeg.read_frames(f"file:{source}", pix_fmt="rgb24", output_params=["-fps_mode", "passthrough"])
    try:
        meta = next(frames)
    except (OSError, RuntimeError, StopIteration):
        frames.close()
        raise InputError(f"cannot read {source}: ffmpeg finds no video in it; give a video file") from None
    width, height = meta["size"]
    fps, seconds = float(meta.get("fps") or 0), float(meta.get("duration") or 0)
    return VideoInfo(height, width, fps, seconds, str(meta.get("codec", "")).strip(",")), frames


def video_info(path: str | os.PathLike[str]) -> VideoInfo:
    """Size, rate, length and codec of a video file. Raises: InputError."""
    info, frames = _open_video(path)
    frames.close()  # type: ignore[attr-defined]
    return info


def iter_video(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """The frames of a video file, uint8 [H, W, 3], one at a time. Raises: InputError."""
    if Path(path).is_dir():
        from PIL import Image

        for name in sorted(Path(path).glob("frame_*.png")):
            with Image.open(name) as image:
                yield np.array(image.convert("RGB"))
        return
    info, frames = _open_video(path)
    with contextlib.closing(frames):  # type: ignore[type-var]
        for data in frames:
            yield np.frombuffer(data, np.uint8).reshape(info.height, info.width, 3)


def read_video(path: str | os.PathLike[str]) -> np.ndarray:
    """A whole video file, or a folder of `frame_*.png`, as uint8 [F, H, W, 3]. Raises: InputError."""
    data, shape = bytearray(), None
    for frame in iter_video(path):
        if shape is not None and frame.shape != shape:
            raise InputError(f"cannot read {path}: its frames differ in size; give frames of one size")
        shape = frame.shape
        data += memoryview(np.ascontiguousarray(frame)).cast("B")
    if shape is None:
        raise InputError(f"cannot read {path}: it holds no frames; give a video file or a folder of frame_*.png")
    return np.frombuffer(data, np.uint8).reshape(-1, *shape)


# --------------------------------------------------------------------------------------------------------------- clock


class Pacer:
    """When frames are due on screen, however unevenly they were produced.

    Due times are counted from the start, never from one another, so they do not drift. A late frame does not move the
    ones after it: the caller hears how late it is, and may skip frames, or start again with `reset`.
    >>> pacer = Pacer(fps=16)
    >>> for chunk in stream:                        # doctest: +SKIP
    ...     late = pacer.wait(len(chunk.frames))    # returns when the first of these frames is due
    ...     show(chunk.frames)
    """

    def __init__(
        self,
        fps: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        max_late: float | None = None,
    ) -> None:
        """
        Args:
            fps: frames per second.
            clock, sleep: seconds now, and waiting; `sleep` may return early (an event's `wait`): that ends it.
            max_late: from this many seconds on the clock starts again, so that a stall is not followed by a rush.
        """
        if not fps > 0:
            raise ValueError(f"fps must be positive, not {fps}")
        self.fps, self.max_late = fps, max_late
        self._clock, self._sleep = clock, sleep
        self.reset()

    def reset(self) -> None:
        """Forget the past: the next `wait` starts the clock, as after a pause."""
        self.frames = 0  # handed out since the start
        self.lateness = 0.0  # seconds, of the last `wait`
        self.worst = 0.0
        self._start: float | None = None

    def wait(self, frames: int) -> float:
        """Wait until the next `frames` frames are due, and count them.

        Returns: seconds by which they are late, else 0.
        """
        now = self._clock()
        if self._start is None:
            self._start = now
        due = self._start + self.frames / self.fps
        self.lateness = max(0.0, now - due)
        self.worst = max(self.worst, self.lateness)
        if due > now:
            self._sleep(due - now)
        elif self.max_late is not None and self.lateness > self.max_late:
            self._start, self.frames = now, 0
        self.frames += frames
        return self.lateness
