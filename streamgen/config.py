"""Configuration: dataclasses, filled from YAML and dotlist by OmegaConf, wrong keys and types refused in one line.

Order: defaults < preset < the model's overrides < those it has for this preset < dotlist. YAML is read here, where a
program starts, nowhere below.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
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
        except TypeError as error:  # a list where keys belong
            raise InputError(f"{name}: {error}: give keys and values where they belong, lists elsewhere") from None
        except yaml.YAMLError as error:
            raise InputError(f"{name}: a value is not YAML: {' '.join(str(error).split())}") from None
    return OmegaConf.to_object(config)


def read_config(schema: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """One YAML file and a dotlist over the defaults of `schema`."""
    return merge(schema, path, list(overrides))


# ---------------------------------------------------------------------------------------------- what a stream is
@dataclass
class ChunkConfig:
    """`latent_frames`: frames denoised together; `first_latent_frames`: those of the first chunk, if it differs."""

    latent_frames: int = 3
    first_latent_frames: int | None = None

    @property
    def first(self) -> int:
        """Latent frames of the first chunk."""
        return self.first_latent_frames or self.latent_frames

    @property
    def largest(self) -> int:
        return max(self.first, self.latent_frames)

    def frames(self, chunk: int) -> range:
        """The latent frames of a chunk."""
        start = self.first + (chunk - 1) * self.latent_frames if chunk else 0
        return range(start, start + (self.latent_frames if chunk else self.first))

    def holding(self, frame: int) -> int:
        """The chunk that holds a latent frame."""
        return 0 if frame < self.first else 1 + (frame - self.first) // self.latent_frames

    def whole(self, frames: int) -> int:
        """The least number of latent frames in whole chunks, one at least, that covers so many."""
        return self.frames(self.holding(max(1, frames) - 1)).stop

    def count(self, frames: int) -> int:
        """Chunks in so many latent frames. Raises InputError if they are not whole chunks."""
        if frames < 1 or self.whole(frames) != frames:
            first = "" if self.first == self.latent_frames else f" after a first chunk of {self.first}"
            raise InputError(
                f"{frames} latent frames are not a positive multiple of chunk.latent_frames={self.latent_frames}{first}"
            )
        return self.holding(frames - 1) + 1


@dataclass
class LadderConfig:
    """Steps of a chunk; see `streamgen.ladder.build_ladder`. A list of lists = one per chunk, the last one repeats.

    `fixed_noise`: every chunk begins from, and is re-noised with, the noise of the first frames (StreamDiffusion).
    """

    timesteps: list[Any] = field(default_factory=lambda: [1000.0, 750.0, 500.0, 250.0])
    warp: bool = False
    shift: float = 1.0
    sigma: str = "exact"
    solver: str = "renoise"
    fixed_noise: bool = False

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
class HeldConfig:
    """Chunks that ride along unchanged: see `streamgen.held.HeldOptions`, and, for the levels, `held_level`."""

    chunks: int = 5
    overlap: int | None = None
    waiting: bool = True
    waiting_level: float | None = None
    done_level: float | None = 0.0
    overlap_level: float = 0.0

    def __post_init__(self) -> None:
        for name in ("waiting_level", "done_level", "overlap_level"):
            level = getattr(self, name)
            if level is not None and not 0 <= level <= 1000:
                raise InputError(f"schedule.held.{name} is a timestep in 0-1000, got {level}")


@dataclass
class ScheduleConfig:
    """`coupling` names a registered schedule; the rest as in `streamgen.schedules.ScheduleOptions`.

    `commit_level` is the timestep of the commit forward. `clone`: see `streamgen.schedules.RowsOptions`; `held`: see
    `streamgen.held.HeldOptions`; `options` go to external schedules.
    """

    coupling: str = "solo"
    stagger: Any = "solo"
    commit: str = "separate"
    commit_level: float = 0.0
    clone: bool = False
    held: HeldConfig = field(default_factory=HeldConfig)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class BankConfig:
    """A memory bank: see `streamgen.cache.bank.BankOptions`."""

    size: int = 3
    interval: int = 3
    sparse: bool = False
    kept: int = 3
    repeat: bool = False


@dataclass
class ContextConfig:
    """Past frames that run once more, clean, before a chunk. Policy `rebuild` takes `lag` and `pixels`, see
    `streamgen.cache.context`; `shots` takes `frames`, `phase`, `blank` and `pixels`, see `streamgen.cache.shots`."""

    frames: int = 6
    lag: bool = False
    phase: float = 0.0
    blank: bool = False
    pixels: bool = False


@dataclass
class DeepConfig:
    """What a compressed window keeps: see `streamgen.cache.deep.DeepOptions`."""

    kept: int = 2
    recent: int = 4
    reuse: int = 7


@dataclass
class MergedConfig:
    """Entries that stand for many keys: see `streamgen.cache.merged.MergedOptions`."""

    size: int = 6
    threshold: float = 0.95
    most: int = 8
    half_life: float = 120.0


@dataclass
class CacheConfig:
    """`policy` names a registered cache policy; sizes in latent frames; `options` go to external policies.

    `window` = sink + recent + flight, what a call may read; `capacity`, what is kept (None = the window).
    `commit_reads`: "same" as the steps, or "tail" = the last `window` frames with no sink before them.
    `ema_decay`: frames that leave the window are folded into the sink, α·sink + (1 - α)·frame.
    `anchors`: chunks kept for good, each the first one of a prompt; `anchor_every`: one of so many chunks instead, seen
    once `anchor_switch` has left the window.
    `look_back`: see `streamgen.cache.look_back`; `refresh`: the threshold of policy refresh, `streamgen.cache.refresh`.
    `attention_bias`: what a key of a recent frame counts in the steps, 1 = as much as any; ln of it is added to logits.
    `collapse_text`: rows of zeros behind a prompt are read as one key that counts for all of them (FAST-AR).
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
    look_back: list[int] = field(default_factory=list)
    refresh: float = 0.2
    bank: BankConfig = field(default_factory=BankConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    attention_bias: float = 1.0
    deep: DeepConfig = field(default_factory=DeepConfig)
    merged: MergedConfig = field(default_factory=MergedConfig)
    collapse_text: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class PositionsConfig:
    """`rule`: see `streamgen.cache.positions`; `span`: temporal positions the model was trained on; `lead`: frames that
    rule "ahead" puts the sink ahead of the call; `restart`: the number that rule "restart" counts up to.

    Streams that run past the span are warned about, or refused if `strict`.
    """

    rule: str = "absolute"
    span: int = 21
    lead: int = 0
    restart: int = 0
    strict: bool = False


@dataclass
class SwitchConfig:
    """What a new prompt does: to the cache keep | recache | reset | cut; to the sink keep | refresh | replace; to
    chunks in flight keep | follow. `mask`: what frames that are encoded again see of each other, bidirectional |
    block-causal (a chunk sees itself and those before it)."""

    mode: str = "recache"
    sink: str = "keep"
    in_flight: str = "keep"
    mask: str = "bidirectional"


@dataclass
class GuidanceConfig:
    """Classifier-free guidance; scale 1 = one branch. `commit_branch`: what a commit is told: each branch its own, or
    all of them the positive, or the negative prompt."""

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
        if self.chunk.first_latent_frames is not None and self.chunk.first_latent_frames < 1:
            raise InputError(f"chunk.first_latent_frames must be at least 1, got {self.chunk.first_latent_frames}")
        check_choice("switch.mode", self.switch.mode, SWITCH_MODES)
        check_choice("switch.in_flight", self.switch.in_flight, ("keep", "follow"))
        check_choice("guidance.commit_branch", self.guidance.commit_branch, ("own", "positive", "negative"))
        if not 0 <= self.schedule.commit_level < 1000:
            raise InputError(f"schedule.commit_level is a timestep in 0-1000, got {self.schedule.commit_level}")


SWITCH_MODES = ("keep", "recache", "reset", "cut")


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raises InputError with the choices and, for a typo, the nearest one."""
    if value not in choices:
        raise InputError(f"{key}={value!r} is unknown{suggest(value, choices)}: use {', '.join(choices)}")


def check_switch(mode: str, config: StreamConfig, blend: int = 0) -> None:
    """Raises InputError unless a switch of this mode, spread over so many chunks, is one in such a stream."""
    check_choice("mode", mode, SWITCH_MODES)
    if blend < 0:
        raise InputError(f"blend is a number of chunks, got {blend}")
    if mode == "reset" and blend:
        raise InputError("mode=reset begins a new stream, which has no old prompt to blend from: leave blend out")
    if mode == "cut" and config.schedule.commit == "none":
        raise InputError(
            "mode=cut drops recent frames from the cache, and with schedule.commit=none they stand in the calls "
            "themselves: use keep or reset"
        )


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


def load_preset(name: str, overrides: Sequence[str] = (), *model: dict) -> StreamConfig:
    """A preset, layers of a model's overrides on top (none by default), and a dotlist above all.

    Raises: InputError for an unknown preset, key, or value of the wrong type.
    """
    return merge(StreamConfig, preset_path(name), *model, list(overrides))
