"""Sinks: frames into a video file, a folder of images or a pipe, as they come. See `streamgen.media`."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np

from streamgen.errors import InputError
from streamgen.media.images import write_image
from streamgen.media.paths import MediaError, check_folder, check_output, frame_files, is_folder

logger = logging.getLogger(__name__)

# -------------------------------------------------------------------------------------------------------------- ffmpeg


@functools.cache
def ffmpeg_exe() -> str:
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
    command = [ffmpeg_exe(), "-v", "quiet", "-i", f"file:{path}", *one]
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
        hybrid = rewritable and _has_hybrid(ffmpeg_exe())
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
        ffmpeg_exe()  # said before anything is computed
        if size is not None:
            self._start()

    def _start(self) -> None:
        assert self._size is not None
        height, width = self._size
        rate = str(Fraction(self._fps).limit_denominator(1001))
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-framerate", rate, "-i", "pipe:0"]
        command = [ffmpeg_exe(), "-y", "-hide_banner", "-nostats", "-loglevel", "error", *source]
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
    """PNG frames `frame_000000.png`, …, each complete or absent; older ones go when the first one comes."""

    def _put(self, frame: np.ndarray) -> None:
        target = self.path / f"frame_{self.frames:06d}.png"
        try:
            self.path.mkdir(exist_ok=True)
            if not self.frames:
                for old in frame_files(self.path):
                    old.unlink()
            write_image(target, frame, compress_level=3)
        except OSError as error:
            self._closed = True
            raise MediaError(
                f"{target}: writing stopped: {error.strerror or error}; the {self.frames} frames before it stay"
            ) from None

    def _finish(self) -> None:
        pass


class RawSink(_Sink):
    """Bytes of rgb24 frames, nothing around them, into an open stream such as a pipe to another program.

    A reader that has gone shows as BrokenPipeError.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(Path("-"), None)
        self._stream = getattr(stream, "raw", stream)  # nothing of ours waits in a buffer when the reader goes

    def _put(self, frame: np.ndarray) -> None:
        left = memoryview(frame).cast("B")
        try:
            while left:
                left = left[self._stream.write(left) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise MediaError(f"the output stopped near frame {self.frames}: {error.strerror or error}") from None

    def _finish(self) -> None:
        pass


def open_sink(
    path: str | os.PathLike[str], fps: float = 16, size: tuple[int, int] | None = None, quality: float = 8,
    replace: bool = False,
) -> VideoSink:  # fmt: skip
    """Open a file, or a folder, that takes frames as they come; the suffix says which kind.

    `.mp4`, `.mkv` (H.264), `.webm` (VP9), `.gif`; no suffix or a trailing slash: a folder of PNG frames. Nothing is
    ever resized. A file that exists is replaced when the first frame arrives; with no frame at all it stays as it was.
    Args:
        fps: frames per second of playback.
        size: (height, width) if known, so that encoding is set up at once; otherwise the first frame tells.
        quality: 0 (smallest file) to 10 (nearly lossless); GIF and PNG have no such choice.
        replace: a folder of frames may be replaced as well; it is refused if not.
    Raises: InputError if the path cannot be written; MediaError if there is no ffmpeg.
    """
    if not fps > 0:
        raise InputError(f"{fps} frames per second cannot be played; choose more than 0")
    if not 0 <= quality <= 10:
        raise InputError(f"quality {quality} does not exist; choose 0 (smallest file) to 10 (nearly lossless)")
    target = check_folder(path, "frames") if replace and is_folder(path) else check_output(path)
    return FolderSink(target, size) if is_folder(path) else FfmpegSink(target, fps, size, quality)
