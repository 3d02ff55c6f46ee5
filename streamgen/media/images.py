"""Still pictures: writing them whole or not at all, and clips side by side on one sheet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamgen.media.paths import IMAGE_SUFFIXES, MediaError, check_output


def write_image(path: Path, array: np.ndarray, **options: Any) -> None:
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
        write_image(target, array)
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
