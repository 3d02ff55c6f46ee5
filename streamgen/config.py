"""Configuration: dataclasses, filled from YAML and dotlist by OmegaConf, wrong keys and types refused in one line.

Order: defaults < preset < the model's overrides < dotlist. YAML is read here, where a program starts, nowhere below.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from streamgen.errors import InputError

T = TypeVar("T")


@cache
def config_root() -> Path:
    """The folder of the shipped YAML files."""
    return Path(str(resources.files("streamgen.configs")))


def available(kind: str) -> list[str]:
    """Names of the shipped files of a kind: presets, models, distill (as TARGET/RECIPE)."""
    root = config_root() / kind
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def suggest(word: str, choices: Sequence[str]) -> str:
    """" (did you mean …?)", or nothing."""
    close = difflib.get_close_matches(word, list(choices), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _keys(schema: type, prefix: str = "") -> list[str]:
    names = []
    for item in fields(schema):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        names.append(prefix + item.name)
        if is_dataclass(default):
            names += _keys(type(default), f"{prefix}{item.name}.")
    return names


def _refusal(error: OmegaConfBaseException, schema: type, source: str) -> InputError:
    key = getattr(error, "full_key", None) or ""
    reason = str(error).split("\n")[0]
    if "not in" in reason or "Key" in type(error).__name__:
        reason = f"unknown key {key!r}{suggest(key, _keys(schema))}"
    else:
        reason = f"{key}: {reason}"
    return InputError(f"{source}: {reason}")


def merge(schema: type[T], *layers: object, source: str = "configuration") -> T:
    """A `schema` object from layers (dataclass, dict, dotlist, path to YAML), later ones win.

    Raises: InputError naming the layer, the key and, for a typo, the nearest key.
    """
    config = OmegaConf.structured(schema)
    for layer in layers:
        name = source
        try:
            if isinstance(layer, Path):
                name, part = str(layer.name), OmegaConf.load(layer)
            elif isinstance(layer, (list, tuple)):
                name = "override"
                for item in layer:
                    if "=" not in item:
                        raise InputError(f"override {item!r} is not KEY=VALUE: e.g. cache.window=9")
                part = OmegaConf.from_dotlist(list(layer))
            else:
                part = OmegaConf.create(layer) if not is_dataclass(layer) else OmegaConf.structured(layer)
            config = OmegaConf.merge(config, part)
            # a value is checked against its field's type only when the object is made
            OmegaConf.to_object(config)
        except OmegaConfBaseException as error:
            raise _refusal(error, schema, name) from None
    return OmegaConf.to_object(config)


def read_config(schema: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """One YAML file and a dotlist over the defaults of `schema`."""
    return merge(schema, path, list(overrides))


# ---------------------------------------------------------------------------------------------- what a stream is
@dataclass
class ChunkConfig:
    """`latent_frames`: frames denoised together."""

    latent_frames: int = 3


@dataclass
class LadderConfig:
    """Steps of a chunk; see `streamgen.ladder.build_ladder`. A list of lists = one per chunk, the last one repeats."""

    timesteps: list[Any] = field(default_factory=lambda: [1000.0, 750.0, 500.0, 250.0])
    warp: bool = False
    shift: float = 1.0
    sigma: str = "exact"
    solver: str = "renoise"

    @property
    def lists(self) -> list:
        """A step list per chunk, the last one repeats."""
        nested = any(isinstance(item, (list, tuple)) for item in self.timesteps)
        return self.timesteps if nested else [self.timesteps]

    def __post_init__(self) -> None:
        for steps in self.lists:
            if isinstance(steps, str) or not all(isinstance(t, (int, float)) for t in steps):
                raise InputError(f"ladder.timesteps {self.timesteps} is no list of numbers, nor one of such lists")


@dataclass
class ScheduleConfig:
    """`coupling` names a registered schedule; the rest as in `streamgen.schedules.ScheduleOptions`.

    `commit_level` is the timestep of the commit forward.
    """

    coupling: str = "solo"
    stagger: Any = "solo"
    commit: str = "separate"
    commit_level: float = 0.0


@dataclass
class BankConfig:
    """A memory bank: see `streamgen.cache.bank.BankOptions`."""

    size: int = 3
    interval: int = 3
    sparse: bool = False
    kept: int = 3
    repeat: bool = False


@dataclass
class CacheConfig:
    """`policy` names a registered cache policy; sizes in latent frames; `options` go to external policies.

    `window` = sink + recent + flight, what a call may read; `capacity`, what is kept (None = the window).
    `commit_reads`: "same" as the steps, or "tail" = the last `window` frames with no sink before them.
    `ema_decay`: frames that leave the window are folded into the sink, α·sink + (1 - α)·frame.
    `anchors`: chunks kept for good, each the first one of a prompt; `anchor_every`: one of so many chunks instead, seen
    once `anchor_switch` has left the window.
    """

    policy: str = "window"
    window: int = 21
    capacity: int | None = None
    sink: int = 0
    commit_reads: str = "same"
    ema_decay: float | None = None
    ema_precision: str = "fp32"
    anchors: int = 0
    anchor_every: int | None = None
    anchor_switch: int = 0
    bank: BankConfig = field(default_factory=BankConfig)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class PositionsConfig:
    """`rule`: see `streamgen.cache.positions`; `span`: temporal positions the model was trained on.

    Streams that run past the span are warned about, or refused if `strict`.
    """

    rule: str = "absolute"
    span: int = 21
    strict: bool = False


@dataclass
class SwitchConfig:
    """What a new prompt does: to the cache keep | recache | reset | cut; to the sink keep | replace; to chunks in
    flight keep | follow."""

    mode: str = "recache"
    sink: str = "keep"
    in_flight: str = "keep"


@dataclass
class GuidanceConfig:
    """Classifier-free guidance; scale 1 = one branch. `commit_branch`: own, or positive for both branches."""

    scale: float = 1.0
    commit_branch: str = "own"


@dataclass
class ExpertsConfig:
    """Models of two transformers (Wan2.2-A14B): the second one works at timesteps below `boundary`, 0 to 1000."""

    boundary: float | None = None


@dataclass
class StreamConfig:
    """Everything that tells one published system from another: schedule × cache policy × ladder."""

    parity: str = "schedule"
    violates: dict[str, str] = field(default_factory=dict)
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    positions: PositionsConfig = field(default_factory=PositionsConfig)
    switch: SwitchConfig = field(default_factory=SwitchConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)

    def __post_init__(self) -> None:
        if self.chunk.latent_frames < 1:
            raise InputError(f"chunk.latent_frames must be at least 1, got {self.chunk.latent_frames}")
        check_choice("switch.mode", self.switch.mode, SWITCH_MODES)
        check_choice("switch.in_flight", self.switch.in_flight, ("keep", "follow"))
        check_choice("guidance.commit_branch", self.guidance.commit_branch, ("own", "positive"))
        if not 0 <= self.schedule.commit_level < 1000:
            raise InputError(f"schedule.commit_level is a timestep in 0-1000, got {self.schedule.commit_level}")


SWITCH_MODES = ("keep", "recache", "reset", "cut")


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raises InputError with the choices and, for a typo, the nearest one."""
    if value not in choices:
        raise InputError(f"{key}={value!r} is unknown{suggest(value, choices)}: use {', '.join(choices)}")


def check_next_prompt(prompt: str | list[str], now: str | list[str]) -> None:
    """Raises InputError unless `prompt` can follow `now`: a text for all, or a list with one for each of a batch."""
    many = isinstance(prompt, list)
    if many and (isinstance(now, str) or len(prompt) != len(now)):
        streams = 1 if isinstance(now, str) else len(now)
        raise InputError(f"{len(prompt)} prompts for a batch of {streams}: give one text, or a list with one for each")
    if not all(text.strip() for text in (prompt if many else [prompt])):
        raise InputError("the prompt is empty: say what to show")


def preset_path(name: str) -> Path:
    """The YAML of a preset. Raises InputError with a suggestion."""
    path = config_root() / "presets" / f"{name}.yaml"
    if "/" in name or not path.is_file():
        names = available("presets")
        raise InputError(f"unknown preset {name!r}{suggest(name, names)}: choose one of {', '.join(names)}")
    return path


def load_preset(name: str, overrides: Sequence[str] = (), model: dict | None = None) -> StreamConfig:
    """A preset, the model's overrides on top (none by default), and a dotlist above both.

    Raises: InputError for an unknown preset, key, or value of the wrong type.
    """
    return merge(StreamConfig, preset_path(name), model or {}, list(overrides))
