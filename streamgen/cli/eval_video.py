"""`streamgen eval video`: metrics of any video of any model, and how far a set of them is from a reference set.

    streamgen eval video clips/ story.mp4 --chunk-frames 9,12
    streamgen eval video clips/ --reference truth/ --features vae --output distances
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamgen.cli.parsing import Parser, positive, whole
from streamgen.errors import InputError

log = logging.getLogger(__name__)

VERSION = 1
ABREAST = 4  # videos that get a column each
MEANINGS = {
    "flicker": "what goes there and back within a frame, mean over pixels, 0-1",
    "frame_difference": "mean absolute difference of neighbouring frames, 0-1",
    "stagnation": "share of neighbouring frames between which nothing moves",
    "seam": "change at chunk borders against change inside chunks, 1 = no seam; needs --chunk-frames",
    "warping_error": "change that no motion explains, 0-1; warping_consistency: the share of change that it explains",
    "dynamic_degree": "mean speed over the picture, in widths per second",
    "drift_*": "of luminance, saturation, contrast and sharpness, 0-1: slope per minute, last five seconds minus first",
    "spectral_drift_*": "between spectra of the first and last five seconds, in space and in time, decibels",
    "frechet_distance": "of features of the two sets, squared units; spectral_distance_*: of their spectra, decibels",
}
EPILOG = "\n".join([
    "a FOLDER is one video if it holds frame_*.png, else all videos in it; - = undefined, for example too short",
    *(f"  {name:<18}{text}" for name, text in MEANINGS.items()),
    "--output gets metrics.json and metrics.md",
])  # fmt: skip


def parser(prog: str) -> Parser:
    what = "metrics of any video, with nothing known of what it should show"
    out = Parser(prog, what, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("videos", nargs="+", metavar="FILE|FOLDER", help="videos, folders of them, or of frame_*.png")
    out.add_argument("--chunk-frames", metavar="N[,N]", help="per chunk from the first on, the last repeats, e.g. 9,12")
    out.add_argument("--fps", type=positive, metavar="R", help="in place of what the files say; folders say nothing")
    out.add_argument("--reference", metavar="FOLDER", help="videos that they are compared with, as a set")
    out.add_argument("--features", metavar="F", help="to compare in: vae, MODULE:ATTRIBUTE or a TorchScript file (vae)")
    out.add_argument("--device", default="auto", help="for --features: auto (cuda > mps > cpu), cpu, cuda, mps")
    out.add_argument("--output", metavar="DIR", help="a folder for JSON and Markdown")
    out.add_talk()
    out.set_defaults(run=_run)
    return out


@dataclass(frozen=True)
class Video:
    """A file, or a folder of pictures."""

    path: Path
    fps: float
    frames: int  # as it says, for a progress bar


def _run(args: argparse.Namespace) -> int:
    from streamgen.cli.rendering import progress
    from streamgen.evaluation.video_change import check_chunks
    from streamgen.evaluation.video_features import load_features
    from streamgen.media import check_folder

    chunks = None if args.chunk_frames is None else check_chunks(_sizes(args.chunk_frames))
    if args.features is not None and args.reference is None:
        raise InputError("--features says what videos are compared in: give --reference FOLDER as well")
    folder = None if args.output is None else check_folder(args.output, "metrics")
    space = None if args.reference is None else load_features(args.features or "vae", args.device)
    videos = _videos(args.videos, args.fps)
    references = [] if args.reference is None else _videos([args.reference], args.fps)
    reads = [*videos, *videos, *references] if references else videos
    with progress(sum(video.frames for video in reads), args.quiet) as bar:
        found = [_measured(video, chunks, bar) for video in videos]
        distances = _compared(videos, references, space, bar) if references else None
    text = table([(_names(videos)[video.path], metrics) for video, metrics in zip(videos, found)], distances)
    print(text)
    if folder is not None:
        features = (args.features or "vae") if references else None
        setting = {"chunk_frames": chunks, "fps": args.fps, "reference": args.reference, "features": features}
        _write(folder, setting, videos, found, distances, text)
    return 0


def _sizes(text: str) -> list[int]:
    try:
        return [whole(1)(word) for word in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise InputError(f"--chunk-frames {text}: {error}; give frames per chunk, e.g. 12 or 9,12") from None


# ------------------------------------------------------------------------------------------- what there is
def _videos(places: Sequence[str], fps: float | None) -> list[Video]:
    """Everything named, in order, each once. Raises InputError where nothing is, or cannot be opened."""
    from streamgen.media.paths import VIDEO_SUFFIXES, frame_files

    found: list[Path] = []
    for place in map(Path, places):
        if not place.is_dir() or frame_files(place):
            found.append(place)
            continue
        seen = [path for path in sorted(place.iterdir()) if not path.name.startswith(".")]
        inside = [p for p in seen if (frame_files(p) if p.is_dir() else p.suffix.lower() in VIDEO_SUFFIXES)]
        if not inside:
            kinds = ", ".join(VIDEO_SUFFIXES)
            raise InputError(f"{place} holds no video: give a folder with {kinds} files, or with frame_*.png")
        found += inside
    return [_video(path, fps) for path in dict.fromkeys(found)]


def _video(path: Path, fps: float | None) -> Video:
    from streamgen.media import video_info
    from streamgen.media.paths import frame_files

    if path.is_dir():
        rate, frames = fps or 0.0, len(frame_files(path))
    else:
        info = video_info(path)
        rate, frames = fps or info.fps, round(info.seconds * info.fps)
    if not rate > 0:
        raise InputError(f"{path} does not say how many frames a second it has: give --fps")
    return Video(path, rate, frames)


# ------------------------------------------------------------------------------------------- what is measured
def _measured(video: Video, chunks: Sequence[int] | None, bar) -> dict[str, float | None]:
    from streamgen.evaluation.video import file_metrics

    try:
        found = file_metrics(video.path, chunks, video.fps)
    except InputError as error:
        raise _of(video, error) from None
    bar.update(video.frames)
    return _rounded(found)


def _of(video: Video, error: InputError) -> InputError:
    """The error, with the file's name in it."""
    return error if str(video.path) in str(error) else InputError(f"{video.path}: {error}")


def _compared(videos: Sequence[Video], references: Sequence[Video], space, bar) -> dict[str, float | None]:
    from streamgen.evaluation.video import compare_videos

    rates = sorted({video.fps for video in (*videos, *references)})
    if len(rates) > 1:
        log.warning("videos of %s frames per second: what is told of time is not comparable", _listed(rates))
    return _rounded(compare_videos(_read(videos, bar), _read(references, bar), space))


def _listed(rates: Sequence[float]) -> str:
    return " and ".join(f"{rate:g}" for rate in rates)


def _read(videos: Sequence[Video], bar):
    """One video after the other, whole."""
    from streamgen.evaluation.video_frames import check_frames
    from streamgen.media import read_video

    for video in videos:
        try:
            frames = check_frames(read_video(video.path))
        except InputError as error:
            raise _of(video, error) from None
        yield frames
        bar.update(video.frames)


def _rounded(found: dict[str, float | None]) -> dict[str, float | None]:
    """Six digits: what differs below them is another machine's rounding."""
    return {name: None if value is None else float(f"{value:.6g}") for name, value in found.items()}


# ------------------------------------------------------------------------------------------- what is written
def _names(videos: Sequence[Video]) -> dict[Path, str]:
    """Files by their name where these differ, else as they were given."""
    short = {video.path.name for video in videos}
    return {video.path: video.path.name if len(short) == len(videos) else str(video.path) for video in videos}


def table(found: Sequence[tuple[str, dict[str, float | None]]], distances: dict[str, float | None] | None) -> str:
    """Markdown: a row per metric; a column per video and their mean, or for many their mean, lowest and highest."""
    from streamgen.evaluation.statistics import summary

    means = summary([metrics for _, metrics in found])
    few = len(found) <= ABREAST
    head = [name for name, _ in found] if few else ["lowest", "highest"]
    head += [f"mean of {len(found)}"] if len(found) > 1 else []
    lines = [f"| metric | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for metric, mean in means.items():
        known = [(metrics[metric], name) for name, metrics in found if metrics[metric] is not None]
        cells = [_cell(metrics[metric]) for _, metrics in found]
        if not few:
            cells = [f"{_cell(v)} ({name})" for v, name in (min(known), max(known))] if known else ["-", "-"]
        span = f" [{_cell(mean.low)}, {_cell(mean.high)}]" if mean.low is not None else ""
        cells += [f"{_cell(mean.value)}{span}"] if len(found) > 1 else []
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    if distances is not None:
        lines += ["", "| from the reference set | |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in distances.items()]
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    from streamgen.evaluation.results import number

    return "-" if value is None else number(value)


def _write(folder: Path, setting: dict[str, Any], videos, found, distances, text: str) -> None:
    from streamgen.evaluation.results import write_json
    from streamgen.evaluation.statistics import summary

    folder.mkdir(exist_ok=True)
    write_json(folder / "metrics.json", {
        "streamgen_eval_video": VERSION,
        "setting": setting,
        "videos": [{"file": str(v.path), "fps": v.fps, "metrics": metrics} for v, metrics in zip(videos, found)],
        "means": {name: mean._asdict() for name, mean in summary(found).items()},
        "distances": distances,
    })  # fmt: skip
    notes = "\n".join(f"- `{name}`: {meaning}." for name, meaning in MEANINGS.items())
    page = f"# Video metrics\n\n{text}\n\n[low, high] are 95 % bootstrap intervals of the mean.\n\n{notes}\n"
    (folder / "metrics.md").write_text(page, encoding="utf-8")
    for name in ("metrics.json", "metrics.md"):
        log.info("written: %s", folder / name)
