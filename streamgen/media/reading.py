"""Videos and folders of frames, read back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streamgen.errors import InputError
from streamgen.media.paths import frame_files
from streamgen.media.video import ffmpeg_exe


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
    ffmpeg_exe()
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

        for name in frame_files(Path(path)):
            try:
                with Image.open(name) as image:
                    frame = np.array(image.convert("RGB"))
            except (OSError, SyntaxError) as error:  # Pillow says SyntaxError for some of what may be wrong
                raise _damaged(name, error) from None
            yield frame
        return
    info, frames = _open_video(path)
    with contextlib.closing(frames):  # type: ignore[type-var]
        try:
            for data in frames:
                yield np.frombuffer(data, np.uint8).reshape(info.height, info.width, 3)
        except (OSError, RuntimeError) as error:
            raise _damaged(path, error) from None


def _damaged(path: str | os.PathLike[str], error: Exception) -> InputError:
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(": ")
    return InputError(f"cannot read {path}: it is damaged ({reason}); give another file")


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
