"""`streamgen presets`: the table; `streamgen presets show NAME`: one of them, resolved, tick by tick; or a picture."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from streamgen.cli.console import table
from streamgen.cli.parsing import Parser, check_overrides, whole
from streamgen.config import StreamConfig, available, load_preset, preset_path
from streamgen.errors import InputError

if TYPE_CHECKING:
    from streamgen.engine import Engine
    from streamgen.walk import PlannedCall

HEADER = (
    "NAME", "SCHEDULE", "REGIONS (FRAMES)", "POSITIONS", "TICKS TO FIRST", "FRAMES KEPT", "CALLS/CHUNK", "FRAMES/CHUNK",
    "STEPS", "COMMIT", "PARITY", "PAPER",
)  # fmt: skip
TICKS = 12  # rows of a tick table
CHUNKS = 8  # rows of a picture
PICTURED = 200  # ticks in a picture, at most


def parser(prog: str, description: str) -> Parser:
    out = Parser(
        prog, description, usage=f"{prog} [show NAME [KEY=VALUE ...]] [--ticks N] [--switch FRAME] [--plot FILE]",
        epilog="The table: ticks until the first chunk leaves; latent frames in memory; calls of every further chunk, "
        "its commit too, and the frames in them.",
    )  # fmt: skip
    out.add_argument("words", nargs="*", metavar="show NAME", help="nothing = the table of all presets")
    out.add_argument(
        "--ticks", type=whole(1), metavar="N", help=f"ticks shown ({TICKS}; in a picture what {CHUNKS} chunks take)"
    )
    out.add_argument(
        "--switch", type=whole(0), action="append", default=[], metavar="FRAME",
        help="a new prompt from this latent frame on; may be given again",
    )  # fmt: skip
    out.add_argument("--plot", metavar="FILE", help="a picture instead: schedule, and what each chunk reads (.png)")
    return out


def run(args: argparse.Namespace) -> int:
    if not args.words:
        if args.plot or args.switch or args.ticks:
            raise InputError("--ticks, --switch and --plot belong to one preset: use `presets show NAME`")
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(table(HEADER, map(_row, available("presets")), width))
        return 0
    action, *rest = args.words
    if action != "show" or not rest:
        raise InputError(f"cannot {' '.join(args.words)!r}: use `presets` or `presets show NAME`")
    name, overrides = rest[0], check_overrides(rest[1:], "settings are KEY=VALUE, e.g. cache.window=9")
    config = load_preset(name, overrides)
    if args.plot:
        _plot(name, overrides, config, args)
    else:
        _show(name, config, args)
    return 0


def paper(name: str) -> str:
    """The first comment line of a preset: where it comes from."""
    with open(preset_path(name), encoding="utf-8") as file:
        line = file.readline().lstrip("# ").strip()
    return line.removeprefix(f"{name}: ")


# ---------------------------------------------------------------------------------------------- the table
def _row(name: str) -> tuple:
    from streamgen.engine import Engine
    from streamgen.walk import cost

    config = load_preset(name)
    engine = Engine(None, config)  # no weights: schedules know step counts alone
    spent = cost(engine)
    steps = "/".join(str(len(ladder)) for ladder in engine.ladders)
    commit = config.schedule.commit
    if commit != "none" and config.schedule.commit_level:
        commit = f"{commit}@{config.schedule.commit_level:g}"
    return (
        name, _schedule(config), regions(engine), config.positions.rule, spent.first,
        "all" if spent.kept is None else spent.kept, f"{spent.calls:g}", f"{spent.frames:g}", steps, commit,
        config.parity, paper(name),
    )  # fmt: skip


def _schedule(config: StreamConfig) -> str:
    """The coupling, and the ticks between two entries where chunks are in flight together."""
    gap = config.schedule.stagger
    return config.schedule.coupling if gap == "solo" else f"{config.schedule.coupling} +{str(gap).replace(' ', '')}"


def regions(engine: Engine) -> str:
    """What a call may read in steady state, in latent frames; of a policy from outside its name."""
    config, cache = engine.config, engine.config.cache
    flight = engine.schedule.in_flight(engine.steps) * config.chunk.latent_frames
    if cache.policy == "rebuild":
        return f"context {cache.window - flight}, flight {flight}"
    if cache.policy not in ("window", "anchor", "bank", "look-back", "shots", "deep", "merged", "refresh"):
        return f"{cache.policy}, flight {flight}"
    parts = {"sink" if cache.ema_decay is None else "EMA sink": cache.sink}
    if cache.policy == "anchor":
        parts["anchors"] = cache.anchors * config.chunk.latent_frames
    if cache.policy == "bank":
        parts["bank"] = cache.bank.size
    if cache.policy == "shots":
        parts["context"] = cache.context.frames
    if cache.policy == "merged":
        parts["merged"] = cache.merged.size
    unbounded, recent = cache.window == -1, cache.window - cache.sink - flight
    if cache.policy == "deep" and cache.deep.kept:
        chunk, deep = config.chunk.latent_frames, cache.deep
        grows = (cache.window - cache.sink - deep.kept - deep.recent) // chunk * chunk  # until the next choice
        parts["chosen"], recent = deep.kept, deep.recent - chunk + grows
    parts["recent"] = "all" if unbounded else recent
    parts["flight"] = flight
    return ", ".join(f"{name} {frames}" for name, frames in parts.items() if frames)


# ---------------------------------------------------------------------------------------------- one preset
def _show(name: str, config: StreamConfig, args: argparse.Namespace) -> None:
    from omegaconf import OmegaConf

    from streamgen.engine import Engine

    engine = Engine(None, config)
    print(f"# {name}: {paper(name)}")
    print(OmegaConf.to_yaml(OmegaConf.structured(config)))
    print(tick_table(_walked(engine, args.ticks or TICKS, args.switch)))
    print(
        f"rows: ticks; columns: chunks of {config.chunk.latent_frames} latent frames; a number: that step of the "
        "chunk's ladder is taken; = held as context, ~ as noise that waits; * leaves; "
        "c its keys and values are committed; r encoded again"
    )
    print("\n".join(["in steady state:", *(f"  {line}" for line in steady(engine))]))


def steady(engine: Engine) -> list[str]:
    """The kinds of call that a long stream repeats, in words."""
    from streamgen.walk import steady_calls

    lines = []
    for call in steady_calls(engine):
        groups = call.plan.groups
        read = ", ".join(f"{segment.region} {len(segment.pages)}" for segment in groups[-1].segments)
        parts = f" in {len(groups)} groups, the last" if len(groups) > 1 else ""
        lines.append(f"{call.call.kind.value}: {sum(len(g.query_frames) for g in groups)} frames{parts} reading {read}")
    return lines or ["it keeps every frame, so no two calls are alike"]


def _plot(name: str, overrides: list[str], config: StreamConfig, args: argparse.Namespace) -> None:
    from streamgen.cli.plots import picture, save
    from streamgen.engine import Engine
    from streamgen.walk import cost

    if args.ticks is not None and args.ticks > PICTURED:
        raise InputError(f"--ticks {args.ticks} does not fit a picture: give {PICTURED} or fewer")
    engine = Engine(None, config)
    spent = cost(engine)
    calls = f"{spent.calls:g} call{'s' if spent.calls != 1 else ''}"
    kept = "every frame" if spent.kept is None else f"{spent.kept} frames"
    notes = [
        paper(name),
        f"{regions(engine)} (latent frames) · first chunk after {spent.first} ticks · then {calls} over "
        f"{spent.frames:g} frames per chunk · {kept} in memory",
    ]
    if overrides:
        notes.insert(0, " ".join(overrides))
    print(save(args.plot, picture(engine, _walked(engine, args.ticks, args.switch), name, notes)))


def _walked(engine: Engine, ticks: int | None, switches: list[int]) -> Iterator[PlannedCall]:
    """The calls of so many ticks; None = until `CHUNKS` chunks have left. The stream goes on behind them."""
    from streamgen.walk import walk

    last, flight = ticks, engine.chunks_in_flight
    for call in walk(engine, (ticks or CHUNKS) + flight, switches):
        if last is not None and call.tick >= last:
            return
        yield call
        if last is None and any(chunk >= CHUNKS - 1 for chunk in call.emits):
            last = call.tick + 1  # with what is committed at its end


def tick_table(calls: Iterable[PlannedCall]) -> str:
    """A walk as text: which chunk takes which step at which tick."""
    rows: list[tuple[str, dict[int, str]]] = []
    for call in calls:
        again = call.call.source != "flight"
        label = "switch" if again and not call.rebuilt else str(call.tick)
        if not rows or rows[-1][0] != label:
            rows.append((label, {}))
        for chunk, mark in _marks(call):
            rows[-1][1][chunk] = rows[-1][1].get(chunk, "") + mark
    chunks = sorted({chunk for _, cells in rows for chunk in cells})
    return table(("TICK", *map(str, chunks)), [(label, *(cells.get(k, ".") for k in chunks)) for label, cells in rows])


def _marks(call: PlannedCall) -> Iterator[tuple[int, str]]:
    """What a call does to its chunks."""
    from streamgen.schedules import SlotOp

    if call.call.source != "flight":
        yield from ((slot.chunk, "r") for slot in call.row.slots)
        return
    for slot in call.row.slots:
        mark = {SlotOp.STEP: str(slot.p_in), SlotOp.HOLD: "=" if slot.p_in else "~", SlotOp.CLEAN: ""}[slot.op]
        yield slot.chunk, mark + "*" * (slot.chunk in call.emits) + "c" * (slot.chunk in call.committed)
