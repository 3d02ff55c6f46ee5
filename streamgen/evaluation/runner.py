"""Model × preset × suite, one unit after the other or several at a time; what is finished is not run again.

Every preset gets the same prompts and seeds. A preset that does not fit a model is a line in the report, not the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from torch import OutOfMemoryError

from streamgen.errors import BrokenStreamError, InputError, UnavailableError
from streamgen.evaluation.confusions import count
from streamgen.evaluation.playing import Strip, draw_sheet, play
from streamgen.evaluation.results import DIGITS, TIMED, Raw, made_with, read_raw, slug, unlike, write_json
from streamgen.evaluation.suites import find_suite
from streamgen.evaluation.suites.base import Options, Values
from streamgen.evaluation.suites.scenes import ATTRIBUTES
from streamgen.worlds.sprites.renderer import FPS

log = logging.getLogger(__name__)

SHEET = 8  # cases on a contact sheet
NO_FRAMES = lambda frames: None


@dataclass(frozen=True)
class Preset:
    """One column: a preset, what is laid over it, and seconds after which the stream is restarted (the control)."""

    name: str
    overrides: tuple[str, ...] = ()
    restart: float | None = None

    @classmethod
    def parse(cls, text: str) -> Preset:
        """`default`, `default+cache.window=9+cache.sink=0`, `default+restart=5`. Raises InputError."""
        name, *more = re.split(r"\+(?=[^\d])", text)
        stray = [word for word in more if "=" not in word]
        if stray:
            raise InputError(f"preset {text!r}: {stray[0]!r} is not KEY=VALUE: write it like default+cache.window=9")
        given = dict(word.split("=", 1) for word in more)
        restart = given.pop("restart", None)
        try:
            seconds = None if restart is None else float(restart)
        except ValueError:
            seconds = -1.0
        if seconds is not None and not 1 <= seconds < float("inf"):
            raise InputError(f"preset {text!r}: restart={restart} is no number of seconds from 1 on")
        return cls(name, tuple(f"{key}={value}" for key, value in given.items()), seconds)


@dataclass(frozen=True)
class Unit:
    """What is measured in one go. `facts`: what the frames follow from beside its own fields (weights, configuration,
    device), for telling whether a result that is there is this unit's."""

    model: str
    preset: str
    suite: str
    options: Options
    facts: dict[str, Any] = field(default_factory=dict)
    batch: int = 8
    mode: str | None = None
    sampling: str = ""  # in words, for the report; `facts` hold all of the configuration

    @property
    def name(self) -> str:
        return slug(self.model, self.preset, self.suite)

    @property
    def frames(self) -> int:
        """That will be made, for a progress bar."""
        return sum(case.num_frames for case in find_suite(self.suite).cases(self.options))

    def settings(self) -> dict[str, Any]:
        """All its numbers follow from, as plain Python."""
        cases = [(c.prompts, c.frames, c.num_frames, c.seed) for c in find_suite(self.suite).cases(self.options)]
        digest = hashlib.sha256(json.dumps(cases).encode()).hexdigest()[:16]
        own = {"model": self.model, "preset": self.preset, "suite": self.suite, "batch": self.batch, "mode": self.mode}
        return {**own, **vars_of(self.options), "cases": digest, **self.facts}


def vars_of(options: Options) -> dict[str, Any]:
    return {name: getattr(options, name) for name in Options.__dataclass_fields__}


Load = Callable[[str, str], Any]  # (model, preset as named) -> a pipeline


# ------------------------------------------------------------------------------------------- one unit
def measure(pipe, unit: Unit, folder: Path, tell: Callable[[int], None] = NO_FRAMES) -> list[dict[str, Any]]:
    """Every case's numbers; contact sheets of the first ones, and of the worst, go into `folder`/sheets."""
    suite = find_suite(unit.suite)
    if suite.measure is not None:
        timed = suite.measure(pipe, unit.options)
        return [{"prompts": [], "seed": i, "part": "", "values": _plain(values)} for i, values in enumerate(timed)]
    cases = suite.cases(unit.options)
    judges = [suite.judge(case) for case in cases]
    kept = len(cases) if suite.confusions else SHEET
    judges[:kept] = strips = [Strip(judge, case.num_frames) for judge, case in zip(judges[:kept], cases)]
    restart = Preset.parse(unit.preset).restart
    play(pipe, cases, judges, unit.batch, unit.mode, restart and round(restart * FPS), tell)
    values = [judge.close() for judge in judges]
    found = [
        {"prompts": case.prompts, "seed": case.seed, "part": case.part, "values": _plain(numbers), **judge.notes()}
        for case, numbers, judge in zip(cases, values, judges, strict=True)
    ]
    sheet = folder / "sheets" / f"{unit.name}.png"
    draw_sheet(sheet, strips[:SHEET], [" / ".join(case.prompts) for case in cases[:SHEET]])
    if suite.confusions:
        _draw_worst(worst_path(folder, unit.name), strips, found)
    return found


def _plain(values: Values) -> Values:
    return {name: None if value is None else round(float(value), DIGITS) for name, value in values.items()}


def worst_path(folder: Path, name: str) -> Path:
    """Where the sheet of a unit's worst clips lies."""
    return folder / "sheets" / f"{name}--worst.png"


def _draw_worst(path: Path, strips: Sequence[Strip], found: list[dict[str, Any]]) -> None:
    """The clips with most wrong attributes, and what was read; no sheet if all is right."""
    path.unlink(missing_ok=True)  # of an earlier run
    single = [name for name in ATTRIBUTES if name != "all_right"]
    wrong = [sum(1 - case["values"][n] for n in single if case["values"][n] is not None) for case in found]
    worst = [i for i in sorted(range(len(found)), key=lambda i: -wrong[i]) if wrong[i] > 0][:SHEET]
    if worst:
        labels = [f"{found[i]['prompts'][0]}   ->   {found[i]['said']}" for i in worst]
        draw_sheet(path, [strips[i] for i in worst], labels)


def run_unit(unit: Unit, folder: Path, load: Load, tell: Callable[[int], None] = NO_FRAMES) -> Raw:
    """Measure a unit and write its raw result. What the model or preset refuses is the result, then."""
    raw: Raw = {"settings": unit.settings(), "versions": made_with(), "failure": None, "cases": []}
    try:
        raw["cases"] = measure(_loaded(load, unit), unit, folder, tell)
        raw["confusions"] = count(case["pairs"] for case in raw["cases"] if "pairs" in case)
    except UnavailableError:
        raise
    except (InputError, BrokenStreamError, FloatingPointError, MemoryError, OutOfMemoryError) as error:
        raw["failure"] = " ".join(str(error).split())
    write_json(raw_path(folder, unit), raw)
    return raw


_held: list[Any] = []  # [key, pipeline] of this process: units of one model and preset follow each other


def _loaded(load: Load, unit: Unit):
    key = (unit.model, unit.preset)
    if not _held or _held[0] != key:
        _held.clear()  # before the next one is loaded: two may not fit
        _held.extend([key, load(unit.model, unit.preset)])
    return _held[1]


# ------------------------------------------------------------------------------------------- all of them
def raw_path(folder: Path, unit: Unit) -> Path:
    return folder / "raw" / f"{unit.name}.json"


def finished(unit: Unit, folder: Path) -> Raw | None:
    """The result that is there, if it need not be measured again; what failed is tried again.

    Raises: InputError for a damaged one, and for one of other settings.
    """
    path = raw_path(folder, unit)
    if not path.exists():
        return None
    raw, wanted = read_raw(path), unit.settings()
    apart = unlike(raw["settings"], wanted)
    if apart:
        was = ", ".join(f"{key} was {raw['settings'].get(key)!r}, is {wanted.get(key)!r}" for key in apart)
        raise InputError(f"{path} was measured otherwise ({was}): give another --output, or --overwrite to lose it")
    return raw if raw["failure"] is None else None


def evaluate(
    units: Sequence[Unit], folder: Path, load: Load, jobs: int = 1, overwrite: bool = False,
    tell: Callable[[int], None] = NO_FRAMES,
) -> list[Raw]:  # fmt: skip
    """The raw results of all units, in order.

    Args:
        load: has to be importable by name (or a `functools.partial` of such a function) with several jobs.
        jobs: processes; what is timed comes last and runs alone.
        tell: hears of frames.
    """
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    _held.clear()
    there = {} if overwrite else {unit.name: finished(unit, folder) for unit in units}
    found = {name: raw for name, raw in there.items() if raw is not None}
    if found:
        log.info("%d of %d parts are there already (--overwrite measures them again)", len(found), len(units))
        tell(sum(unit.frames for unit in units if unit.name in found))
    todo = [unit for unit in units if unit.name not in found]
    alone = [unit for unit in todo if jobs == 1 or unit.suite == TIMED]
    if len(alone) < len(todo):
        found |= _pooled([unit for unit in todo if unit not in alone], folder, load, jobs, tell)
    for unit in sorted(alone, key=lambda unit: unit.suite == TIMED):
        found[unit.name] = _reported(run_unit(unit, folder, load, tell))
    _held.clear()
    return [found[unit.name] for unit in units]


def _reported(raw: Raw) -> Raw:
    if raw["failure"] is not None:
        model, preset, suite = (raw["settings"][name] for name in ("model", "preset", "suite"))
        log.warning("%s with %s: %s could not be measured: %s", model, preset, suite, raw["failure"])
    return raw


def _pooled(units: Sequence[Unit], folder: Path, load: Load, jobs: int, tell: Callable[[int], None]) -> dict[str, Raw]:
    found = {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (threads,)) as pool:
        waiting = {pool.submit(run_unit, unit, folder, load): unit for unit in units}
        try:
            for future in as_completed(waiting):
                unit = waiting[future]
                found[unit.name] = _reported(future.result())
                tell(unit.frames)
        except BrokenProcessPool:
            raise UnavailableError(
                "a process was killed, most likely for memory: the same command with fewer --jobs, or a smaller "
                "--batch, measures the rest"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _start_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
