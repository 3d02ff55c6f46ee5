"""Places that can be written, found out before anything is computed; and the error for writing that failed."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from streamgen.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class MediaError(RuntimeError):
    """Writing failed on the way (disk full, encoder gone). The one-line message says what was kept."""


def is_folder(path: str | os.PathLike[str]) -> bool:
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


def check_folder(path: str | os.PathLike[str], what: str = "files", instead: str = "") -> Path:
    """Refuse a folder that nothing can be put into; one that is not there yet must be possible to make.

    Args:
        what: is to be written, for the message; `instead`: what else may be chosen.
    Returns: the path. Raises: InputError.
    """
    target = Path(path)
    if target.is_dir():
        _check_file(target / f".streamgen-{os.getpid()}", shown=target)
    elif os.path.lexists(target):
        raise InputError(f"cannot write {what} to {target}: it is a file; choose a folder{instead}")
    else:
        _check_file(target)
    return target


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder of frames, in order."""
    return sorted(folder.glob("frame_*.png"))


def check_kind(path: str | os.PathLike[str], suffixes: Sequence[str] = VIDEO_SUFFIXES) -> None:
    """Refuse a name that ends in none of `suffixes`; where a video is meant, a folder's name is fine. InputError."""
    suffix, video = Path(path).suffix.lower(), tuple(suffixes) == VIDEO_SUFFIXES
    if suffix not in suffixes and not (video and is_folder(path)):
        folder = ", or a folder of PNG frames (trailing slash)" if video else ""
        raise InputError(f"cannot write {Path(path)}: unknown kind '{suffix}'; use {', '.join(suffixes)}{folder}")


def check_output(path: str | os.PathLike[str], suffixes: Sequence[str] = VIDEO_SUFFIXES) -> Path:
    """Refuse a path that cannot be written, before anything is computed; an existing file is left as it is.

    Args:
        path: a file with one of `suffixes`; where a video is meant, also a folder (no suffix, or a trailing slash).
        suffixes: what is accepted; the default is every kind of video.
    Returns: the path. Raises: InputError.
    """
    target = Path(path)
    check_kind(path, suffixes)
    if tuple(suffixes) != VIDEO_SUFFIXES or not is_folder(path):
        _check_file(target)
        return target
    if frame_files(target):
        raise InputError(f"cannot write {target}: it holds frames already; empty it or choose another folder")
    return check_folder(target, "frames", f" or a name ending in {', '.join(VIDEO_SUFFIXES)}")
