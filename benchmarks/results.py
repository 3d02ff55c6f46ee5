"""docs/results.md: every comparison it shows, measured resumably within a time, then the report.

    python benchmarks/results.py --minutes 180        # or `make results`; the same again measures what is missing

What to compare is said here; all else is `streamgen eval`. A comparison that time runs out for is reported with the
presets that are finished. The prompts are those of the `test` side, which nothing was tuned on.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PRINCIPAL = ("default", "self-forcing", "longlive", "rolling-forcing", "deep-forcing", "reward-forcing")
MEMORY = (  # what could matter to what is kept
    "default",  # static sink of 3, packed positions, window 21, separate commit, recache
    "default+restart=5",  # the control that remembers nothing
    "default+cache.sink=0", "default+cache.ema_decay=0.999", "default+cache.sink=10",  # none, EMA, deep
    "default+positions.rule=absolute",
    "default+cache.window=9", "default+cache.window=12",
    "default+cache.window=12+positions.rule=tri-region",  # as wide as the trained span, it would be packed
)  # fmt: skip
ABLATIONS = (
    *MEMORY,
    "default+schedule.coupling=joint+schedule.stagger=3",  # rolling against self-forcing, all else equal
    "default+ladder.solver=euler",  # the path of an ODE against fresh noise at every step
    "default+schedule.commit=inplace",
    "default+positions.rule=absolute+schedule.commit=fused",  # against absolute alone: packed positions refuse it
)  # fmt: skip
SWITCHES = ("default+switch.mode=keep", "default+switch.mode=reset", "default+switch.mode=cut")
LONGEST = ("default", "longlive", "rolling-forcing")
HEADLINE = 300  # prompts the model as it ships is asked: 70 % of them have one actor


@dataclass(frozen=True)
class Comparison:
    """A folder of results: presets × suites, and cases per suite."""

    folder: str
    presets: tuple[str, ...]
    suites: tuple[str, ...]
    prompts: int


def comparisons(prompts: int, long_prompts: int, few: int, long_few: int, longest: int) -> list[Comparison]:
    """In the order in which they are measured."""
    from streamgen.config import available

    others = ("default", *(name for name in available("presets") if name not in PRINCIPAL))
    return [
        Comparison("model", ("default",), ("short",), HEADLINE),
        Comparison("presets", PRINCIPAL, ("short", "switch"), prompts),
        Comparison("minute", PRINCIPAL, ("long",), long_prompts),
        Comparison("others", others, ("short", "switch"), few),
        Comparison("others-minute", others, ("long",), long_few),
        Comparison("ten-minutes", LONGEST, ("long-600",), longest),  # bins: its first 300 s are in it
        Comparison("ablations", ABLATIONS, ("long",), long_prompts),
        Comparison("switching", (*ABLATIONS, *SWITCHES), ("switch",), few),
        Comparison("keeping", MEMORY, ("identity", "memory"), long_few),
        Comparison("speed", (*PRINCIPAL, *others[1:]), ("latency",), 1),
    ]


def evaluate(it: Comparison, presets: Sequence[str], args: argparse.Namespace, seconds: float) -> int:
    """`streamgen eval`, interrupted when the time is over, as by Ctrl-C; its exit code, 130 then."""
    command = [
        sys.executable, "-m", "streamgen", "eval", "--model", args.model, "--presets", ",".join(presets),
        "--suites", ",".join(it.suites), "--prompts", str(it.prompts), "--split", args.split, "--seed", str(args.seed),
        "--jobs", str(args.jobs), "--batch", str(args.batch), "--output", str(args.output / it.folder),
    ]  # fmt: skip
    print(f"== {it.folder}: {len(presets)} presets, {', '.join(it.suites)}", file=sys.stderr, flush=True)
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        return 130


def finished(it: Comparison, args: argparse.Namespace) -> list[str]:
    """Presets of which every suite is there."""
    from streamgen.evaluation.results import slug

    raw = args.output / it.folder / "raw"
    there = lambda preset: all((raw / f"{slug(args.model, preset, suite)}.json").is_file() for suite in it.suites)
    return [preset for preset in it.presets if there(preset)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=180, help="after which nothing more is begun (180)")
    parser.add_argument("--prompts", type=int, default=32, help="of short and switch, six presets (32)")
    parser.add_argument("--long-prompts", type=int, default=8, help="of a minute, six presets and ablations (8)")
    parser.add_argument("--few", type=int, default=6, help="of short and switch, all others (6)")
    parser.add_argument("--long-few", type=int, default=3, help="of a minute, all others (3)")
    parser.add_argument("--longest", type=int, default=2, help="of ten minutes (2)")
    parser.add_argument("--only", help="names of comparisons, with commas: model, presets, minute, …")
    parser.add_argument("--model", default="sprites")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes (one per core)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("runs/results"))
    parser.add_argument("--report", type=Path, default=Path("docs/results.md"))
    args = parser.parse_args()

    end = time.monotonic() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    wanted = comparisons(args.prompts, args.long_prompts, args.few, args.long_few, args.longest)
    known = [it.folder for it in wanted]
    only = args.only.split(",") if args.only else known
    if set(only) - set(known):
        parser.error(f"--only {args.only}: choose of {', '.join(known)}")
    for it in wanted:
        if it.folder not in only or time.monotonic() >= end:
            continue
        code = evaluate(it, it.presets, args, max(1.0, end - time.monotonic()))
        if code == 130 and (done := finished(it, args)):
            code = evaluate(it, done, args, 600.0)  # the files of what is there
        if code not in (0, 130):  # it has said why, and a report would hide it
            return code
    folders = [str(args.output / it.folder) for it in wanted if (args.output / it.folder / "results.json").is_file()]
    command = [sys.executable, "-m", "streamgen", "eval", "report", *folders, "--output", str(args.report)]
    return subprocess.run(command).returncode if folders else 1


if __name__ == "__main__":
    sys.exit(main())
