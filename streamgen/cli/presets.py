"""`streamgen presets`: the table of presets; `streamgen presets show NAME`: one of them, resolved, tick by tick."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice

import yaml

from streamgen.cli.console import table
from streamgen.cli.parsing import Parser, check_overrides, whole
from streamgen.config import StreamConfig, available, load_preset, preset_path
from streamgen.errors import InputError

HEADER = ("NAME", "SCHEDULE", "WINDOW", "SINK", "POSITIONS", "STEPS", "COMMIT", "PARITY", "PAPER")


def parser(prog: str, description: str) -> Parser:
    out = Parser(prog, description, usage=f"{prog} [show NAME [KEY=VALUE ...]] [--ticks N]")
    out.add_argument("words", nargs="*", metavar="show NAME", help="nothing = the table of all presets")
    out.add_argument("--ticks", type=whole(1), default=12, metavar="N", help="rows of the tick table (12)")
    return out


def run(args: argparse.Namespace) -> int:
    if not args.words:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(table(HEADER, map(_row, available("presets")), width))
        return 0
    action, *rest = args.words
    if action != "show" or not rest:
        raise InputError(f"cannot {' '.join(args.words)!r}: use `presets` or `presets show NAME`")
    overrides = check_overrides(rest[1:], "settings are KEY=VALUE, e.g. cache.window=9")
    _show(rest[0], overrides, args.ticks)
    return 0


def paper(name: str) -> str:
    """The first comment line of a preset: where it comes from."""
    with open(preset_path(name), encoding="utf-8") as file:
        line = file.readline().lstrip("# ").strip()
    return line.removeprefix(f"{name}: ")


def _row(name: str) -> tuple:
    config = load_preset(name)
    window = "all" if config.cache.window == -1 else config.cache.window
    commit = config.schedule.commit
    if commit != "none" and config.schedule.commit_level:
        commit = f"{commit}@{config.schedule.commit_level:g}"
    steps = _steps(config.ladder.timesteps)
    return (
        name, config.schedule.coupling, window, config.cache.sink, config.positions.rule, steps, commit,
        config.parity, paper(name),
    )  # fmt: skip


def _steps(timesteps: list) -> str:
    """Length of the ladder; of each chunk's, where they differ."""
    ladders = timesteps if timesteps and isinstance(timesteps[0], (list, tuple)) else [timesteps]
    return "/".join(str(sum(1 for t in ladder if t)) for ladder in ladders)


def _show(name: str, overrides: list[str], ticks: int) -> None:
    from omegaconf import OmegaConf

    from streamgen.engine import Engine

    try:
        config = load_preset(name, overrides)
    except yaml.YAMLError as error:
        raise InputError(f"override: a value is not YAML: {' '.join(str(error).split())}") from None
    engine = Engine(None, config)  # no weights: schedules know step counts alone
    print(f"# {name}: {paper(name)}")
    print(OmegaConf.to_yaml(OmegaConf.structured(config)))
    print(tick_table(islice(engine.schedule.ticks(engine.steps, None), ticks)))
    print(_legend(config))


def _legend(config: StreamConfig) -> str:
    frames = config.chunk.latent_frames
    return (
        f"rows: ticks; columns: chunks of {frames} latent frames; a number: that step of the chunk's ladder is taken; "
        "= held as context; * leaves; c its keys and values are committed"
    )


def tick_table(ticks: Iterable) -> str:
    """A schedule as text: which chunk takes which step at which tick."""
    from streamgen.schedules import SlotOp

    rows: list[tuple[int, dict[int, str]]] = []
    for tick in ticks:
        cells: dict[int, str] = defaultdict(str)
        for call in tick.calls:
            for slot in (slot for row in call.rows for slot in row.slots):
                mark = {SlotOp.STEP: str(slot.p_in), SlotOp.HOLD: "=", SlotOp.CLEAN: "c"}[slot.op]
                cells[slot.chunk] += mark if mark not in cells[slot.chunk] else ""
        for chunk in tick.emits:
            cells[chunk] += "*"
        for chunk in {slot.chunk for call in tick.commits for row in call.rows for slot in row.slots}:
            cells[chunk] += "c"
        rows.append((tick.index, cells))
    chunks = sorted({chunk for _, cells in rows for chunk in cells})
    return table(("TICK", *map(str, chunks)), [(index, *(cells.get(k, ".") for k in chunks)) for index, cells in rows])
