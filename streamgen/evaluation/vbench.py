"""A bridge to VBench (arXiv:2311.17982) and VBench-Long, which are not needed here: what they read, what they write.

    layout = write_layout("vb", entries(prompts))      # vb/full_info.json, vb/prompts.json, vb/videos/
    for prompt, sample, path in layout.videos():       # then write every video to its path, and run VBench on vb/videos
        …
    read_results("evaluation_results/x_eval_results.json")      # -> one Score per dimension

VBench finds a video by name, `PROMPT-INDEX.mp4`, and takes the suffix of all from the first file it meets: nothing
but videos lies in the folder of videos.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from streamgen.errors import InputError
from streamgen.evaluation.statistics import mean_interval
from streamgen.media import check_folder

CUSTOM_DIMENSIONS = (
    "subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
    "imaging_quality",
)  # fmt: skip
LABELLED_DIMENSIONS = (  # need labels (`auxiliary_info`) that only VBench's own prompts have
    "object_class", "multiple_objects", "scene", "appearance_style", "color", "spatial_relationship",
)  # fmt: skip
DIMENSIONS = (
    *CUSTOM_DIMENSIONS, *LABELLED_DIMENSIONS, "temporal_style", "overall_consistency", "human_action",
    "temporal_flickering",
)  # fmt: skip
PERCENT = "imaging_quality"  # VBench reports its videos from 0 to 100 and their mean from 0 to 1
NAME_BYTES = 255  # of a file name, on every common file system


@dataclass(frozen=True)
class Entry:
    """One prompt, what is measured on its videos, and VBench's labels for it."""

    prompt: str
    dimensions: tuple[str, ...] = CUSTOM_DIMENSIONS
    labels: dict[str, Any] | None = None  # `auxiliary_info`

    def __post_init__(self) -> None:
        unknown = [name for name in self.dimensions if name not in DIMENSIONS]
        if unknown or not self.dimensions:
            what = f"unknown VBench dimension {unknown[0]!r}" if unknown else f"no dimension for {self.prompt!r}"
            raise InputError(f"{what}: choose from {', '.join(DIMENSIONS)}")
        bare = [name for name in self.dimensions if name in LABELLED_DIMENSIONS and not self.labels]
        if bare:
            raise InputError(f"{bare[0]} needs VBench's labels for {self.prompt!r}: read its own VBench_full_info.json")


def entries(prompts: Sequence[str], dimensions: Sequence[str] = CUSTOM_DIMENSIONS) -> list[Entry]:
    """Prompts of one's own. Raises: InputError for dimensions that VBench measures on its own prompts only."""
    return [Entry(prompt, tuple(dimensions)) for prompt in prompts]


@dataclass(frozen=True)
class Layout:
    """Where VBench looks for what; see `write_layout`."""

    folder: Path
    entries: tuple[Entry, ...]
    samples: int
    numbered: bool
    long: bool

    @property
    def videos_path(self) -> Path:
        """What VBench calls `--videos_path`."""
        return self.folder / "videos"

    @property
    def mode(self) -> str:
        """`--mode`: VBench's own way of finding videos, or names that prompts.json explains."""
        return ("long_" if self.long else "") + ("custom_input" if self.numbered else "vbench_standard")

    def video(self, prompt: int, sample: int) -> Path:
        """The file of one sample of a prompt, both counted from 0."""
        if not (0 <= prompt < len(self.entries) and 0 <= sample < self.samples):
            raise IndexError(f"sample {sample} of prompt {prompt}: {len(self.entries)} prompts × {self.samples}")
        stem = f"{prompt:05d}" if self.numbered else self.entries[prompt].prompt
        return self.videos_path / f"{stem}-{sample}.mp4"

    def videos(self) -> Iterator[tuple[str, int, Path]]:
        """(prompt, sample, file) of all videos that are to be written."""
        for index, entry in enumerate(self.entries):
            for sample in range(self.samples):
                yield entry.prompt, sample, self.video(index, sample)

    def strangers(self) -> list[Path]:
        """Files among the videos that are none of these: VBench would measure them too."""
        known = {path for _, _, path in self.videos()}
        return sorted(path for path in self.videos_path.iterdir() if path not in known)

    def missing(self) -> list[Path]:
        """Videos that are not there yet."""
        return [path for _, _, path in self.videos() if not path.is_file()]


def _check_names(prompts: Sequence[str], samples: int) -> None:
    """Refuse prompts that cannot be file names. Raises: InputError."""
    instead = "change it, or choose numbered names (VBench's mode custom_input)"
    for prompt in prompts:
        length = len(f"{prompt}-{samples - 1}.mp4".encode())
        if length > NAME_BYTES:
            raise InputError(f"{prompt[:40]!r}… makes a file name of {length} bytes, above {NAME_BYTES}; {instead}")
        if re.search(r"[/\x00\r\n]", prompt) or prompt != prompt.strip() or not prompt:
            raise InputError(f"the prompt {prompt!r} cannot be a file name; {instead}")


def write_layout(
    folder: str | os.PathLike[str], prompts: Sequence[Entry], samples: int = 5, *, numbered: bool = False,
    long: bool = False,
) -> Layout:  # fmt: skip
    """Make the folder and write full_info.json (`--full_json_dir`) and prompts.json (`--prompt_file`).

    Args:
        prompts: see `entries` and `read_full_info`.
        samples: videos per prompt; VBench's standard is 5.
        numbered: name files by number, for prompts that cannot be file names; VBench's mode is then custom_input,
            which learns the prompts from prompts.json (VBench-Long does without: its custom dimensions need none).
        long: for VBench-Long, which cuts the names of clips at the first `_`, so no prompt may have one.
    Raises: InputError.
    """
    texts = [entry.prompt for entry in prompts]
    if not texts or samples < 1:
        raise InputError(f"{len(texts)} prompts × {samples} samples make no video; give at least one of each")
    if len(set(texts)) < len(texts):
        twice = next(text for i, text in enumerate(texts) if text in texts[:i])
        raise InputError(f"the prompt {twice!r} occurs twice; VBench tells videos apart by prompt: name it once")
    if not numbered:
        _check_names(texts, samples)
    if long and not numbered and any("_" in text for text in texts):
        text = next(text for text in texts if "_" in text)
        raise InputError(f"VBench-Long does not find videos of {text!r}: it cuts names at `_`; change the prompt")
    labelled = [entry.prompt for entry in prompts if numbered and set(entry.dimensions) & set(LABELLED_DIMENSIONS)]
    if labelled:
        raise InputError(f"{labelled[0]!r}: VBench reads its labels in its standard mode only; do not number names")
    layout = Layout(check_folder(folder), tuple(prompts), samples, numbered, long)
    layout.videos_path.mkdir(parents=True, exist_ok=True)
    info = [
        {"prompt_en": e.prompt, "dimension": list(e.dimensions)} | ({"auxiliary_info": e.labels} if e.labels else {})
        for e in prompts
    ]
    _write(layout.folder / "full_info.json", info)
    _write(layout.folder / "prompts.json", {path.name: prompt for prompt, _, path in layout.videos()})
    return layout


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _load(path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; give a JSON file of VBench") from None
    except ValueError as error:
        raise InputError(f"cannot read {path}: it is no JSON ({error}); give a JSON file of VBench") from None


def read_full_info(path: str | os.PathLike[str], dimensions: Sequence[str] = DIMENSIONS) -> list[Entry]:
    """Prompts of VBench's own `VBench_full_info.json` for some dimensions, labels included. Raises: InputError."""
    data, found = _load(path), []
    if not isinstance(data, list):
        raise InputError(f"{path} is no full_info.json: it holds a {type(data).__name__}, not a list of prompts")
    for index, item in enumerate(data):
        measured = item.get("dimension") if isinstance(item, dict) else None
        if not isinstance(measured, list) or not isinstance(item.get("prompt_en"), str):
            raise InputError(f"{path} is no full_info.json: entry {index} lacks `prompt_en` or a list `dimension`")
        wanted = tuple(name for name in measured if name in dimensions)
        if wanted:
            found.append(Entry(item["prompt_en"], wanted, item.get("auxiliary_info")))
    return found


@dataclass(frozen=True)
class Score:
    """What VBench says about one dimension, from 0 to 1: its own mean, and its videos by file name."""

    dimension: str
    value: float
    videos: dict[str, float]

    def record(self, model: str, preset: str, suite: str = "vbench", seed: int = 0) -> dict[str, Any]:
        """A row of results.json: VBench's value, with the bootstrap interval of the mean over its videos."""
        spread = mean_interval(list(self.videos.values()), seed)
        names = {"model": model, "preset": preset, "suite": suite, "metric": self.dimension}
        return {**names, "value": self.value, "low": spread.low, "high": spread.high, "n": spread.n}


def _number(value: Any, where: str) -> float:
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
        raise InputError(f"{where} is {value!r}, not a number; give an unchanged *_eval_results.json")
    return float(value)


def _score(dimension: str, result: Any, path: str) -> Score:
    where = f"{path}: {dimension}"
    if not isinstance(result, list) or len(result) < 2 or not all(isinstance(part, list) for part in result[1:]):
        raise InputError(f"{where} is not [score, videos]; give an unchanged *_eval_results.json")
    value = _number(result[0], f"{where}'s score")
    scale = 100.0 if dimension == PERCENT else 1.0
    videos: dict[str, float] = {}
    for row in result[-1]:  # VBench-Long: [score, clips, videos]
        if not isinstance(row, dict) or not isinstance(row.get("video_path"), str) or "video_results" not in row:
            raise InputError(f"{where} has a video without `video_path` and `video_results`")
        name = PurePath(row["video_path"]).name
        videos[name] = _number(row["video_results"], f"{where}, {name}") / scale
    return Score(dimension, value / scale if value > 1 else value, videos)


def read_results(path: str | os.PathLike[str]) -> list[Score]:
    """Scores of a `*_eval_results.json` of VBench or VBench-Long. Raises: InputError where it is not one."""
    data = _load(path)
    if not isinstance(data, dict) or not data:
        raise InputError(f"{path} is no result of VBench: give its *_eval_results.json, dimensions with their scores")
    return [_score(dimension, result, str(path)) for dimension, result in data.items()]
