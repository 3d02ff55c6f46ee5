"""`streamgen eval`: models × presets × suites, judged by the world's oracle; `streamgen eval report`: docs/results.md.

`eval video`, `eval vbench` and `eval vbench-results`, for any model, are in modules of their own.

    streamgen eval --presets default,self-forcing --suites short,switch --prompts 32 --output compare
    streamgen eval report compare long-300 --output docs/results.md
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import re
import shlex
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from streamgen.cli.console import talking
from streamgen.cli.parsing import Parser, whole
from streamgen.errors import InputError
from streamgen.evaluation.suites import NAMES, find_suite

log = logging.getLogger(__name__)

MODEL = "sprites"
EPILOG = f"""\
suites: {", ".join(NAMES)}, and other lengths as long-300 or identity-120 (seconds)
presets: names of `streamgen presets`, with settings laid over them: default+cache.window=9+cache.sink=0; and
  default+restart=5, a control that begins another stream every 5 seconds and so remembers nothing
--output gets results.json (records, differences to the first preset, confusions, failures), latency.json, results.md,
  plots, sheets/ and raw/; the same command again measures what is not finished yet

of any model, each with its own --help:
  streamgen eval video FILE|FOLDER...           metrics of videos, and their distance from a reference set
  streamgen eval vbench --prompts FILE          the folder that VBench and VBench-Long read, rendered or filled
  streamgen eval vbench-results FILE...         what they found, as a table

examples:
  streamgen eval --presets default,self-forcing --suites short,switch --prompts 32 --output compare
  streamgen eval report compare --output docs/results.md
"""
ELSEWHERE = {  # action -> module of this package, and what makes its parser, whose default `run` does it
    "video": ("eval_video", "parser"),
    "vbench": ("eval_vbench", "parser"),
    "vbench-results": ("eval_vbench", "results_parser"),
}


class EvalParser(Parser):
    """Options of the suites; an action of `ELSEWHERE` in front of them has a parser of its own."""

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        if not argv or argv[0] not in ELSEWHERE:
            return super().read(argv)
        module, make = ELSEWHERE[argv[0]]
        return getattr(import_module(f"streamgen.cli.{module}"), make)(f"{self.prog} {argv[0]}").read(argv[1:])


def parser(prog: str, description: str) -> Parser:
    out = EvalParser(prog, description, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("words", nargs="*", metavar="report FOLDER", help="write results.md from folders that are there")
    out.add_argument("--model", default=MODEL, metavar="M[,M]", help=f"embedded, a folder or a Hub name ({MODEL})")
    out.add_argument("--checkpoint", metavar="FILE", help="whose transformer replaces the model's")
    out.add_argument("--presets", metavar="P,...", help="if not given, the model's own")
    out.add_argument("--suites", default="short,switch", metavar="S,...", help="see below (short,switch)")
    out.add_argument("--prompts", type=whole(1), default=32, metavar="N", help="cases per suite (32)")
    out.add_argument("--seed", type=whole(0), default=0, metavar="K", help="of prompts, noise and intervals (0)")
    out.add_argument("--split", default="val", choices=("val", "test"), help="test for published numbers alone (val)")
    out.add_argument("--output", metavar="DIR", help="a folder; with report, the .md file to write")
    out.add_argument("--jobs", type=whole(1), default=1, metavar="J", help="processes, which share the threads (1)")
    out.add_argument("--batch", type=whole(1), default=8, metavar="B", help="prompts streamed side by side (8)")
    out.add_argument("--switch-mode", metavar="MODE", help="keep, recache, reset or cut; if not given, the preset's")
    out.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cpu, cuda, cuda:N, mps")
    out.add_argument("--dtype", help="bf16, fp16 or fp32; if not given, bf16 where it is fast, else fp32")
    out.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads of one process")
    out.add_argument("--overwrite", action="store_true", help="measure everything again")
    out.add_talk()
    out.set_defaults(run=_run)
    return out


def run(args: argparse.Namespace) -> int:
    with talking(args.quiet, args.verbose):
        return args.run(args)


def _run(args: argparse.Namespace) -> int:
    if not args.output:
        raise InputError("--output is missing: say where results go, e.g. --output eval")
    return _report(args) if args.words else _evaluate(args)


def names(text: str, what: str) -> list[str]:
    """A comma-separated option; each name once. Raises InputError if there is none."""
    words = re.split(r",(?![^\[]*\])", text)  # not within [1000,500]
    found = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not found:
        raise InputError(f"--{what} is empty: give names with commas between them")
    return found


# ------------------------------------------------------------------------------------------- measuring
def _evaluate(args: argparse.Namespace) -> int:
    suites = names(args.suites, "suites")
    for suite in suites:
        find_suite(suite)
    from streamgen.cli.rendering import progress
    from streamgen.evaluation.runner import evaluate
    from streamgen.media import check_folder

    units = _units(args, suites)
    folder = check_folder(args.output, "results")
    if not folder.parent.is_dir():
        raise InputError(f"cannot write results to {folder}: there is no folder {folder.parent}")
    load_it = functools.partial(load, {name: getattr(args, name) for name in LOADING})
    try:
        with progress(sum(unit.frames for unit in units), args.quiet) as bar:
            raws = evaluate(units, folder, load_it, args.jobs, args.overwrite, bar.update)
    except KeyboardInterrupt:
        log.error("interrupted: finished parts are kept, the same command measures the rest")
        return 130
    _write(args, units, raws, folder)
    return 0 if any(raw["failure"] is None for raw in raws) else 1


LOADING = ("checkpoint", "device", "dtype", "threads", "verbose")


def load(common: dict[str, Any], model: str, preset: str):
    """A pipeline for one column of the comparison."""
    from streamgen.cli.loading import load_pipeline
    from streamgen.evaluation.runner import Preset

    chosen = Preset.parse(preset)
    parts = {"lora": None, "lora_2": None, "codec": None, "tile": None, "offload": None, "prompt_cache": False}
    pipe = load_pipeline(
        argparse.Namespace(model=model, preset=chosen.name, **common, **parts), list(chosen.overrides)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _units(args: argparse.Namespace, suites: Sequence[str]) -> list:
    """Everything there is to measure, in the order of the report. Raises InputError for what does not exist."""
    from streamgen import hub
    from streamgen.cli import records
    from streamgen.config import SWITCH_MODES, check_choice
    from streamgen.device import default_dtype, resolve_device, resolve_dtype
    from streamgen.evaluation.runner import Unit
    from streamgen.evaluation.suites.base import MEASURES, Options

    if args.switch_mode is not None:
        check_choice("--switch-mode", args.switch_mode, SWITCH_MODES)
    device = resolve_device(args.device)
    dtype = str(resolve_dtype(args.dtype) or default_dtype(device)).removeprefix("torch.")
    options, units = Options(args.prompts, args.seed, args.split), []
    for model in names(args.model, "model"):
        settings = hub.model_settings(model)
        weights = records.stamp(model, [args.checkpoint])
        for preset in names(args.presets, "presets") if args.presets is not None else [settings.preset]:
            config = configuration(preset, settings)
            facts = {"weights": weights, "configuration": digest(config), "device": str(device)}
            facts |= {"dtype": dtype, "checkpoint": args.checkpoint, "measures": MEASURES}
            more = (options, facts, args.batch, args.switch_mode, sampling(config))
            units += [Unit(model, preset, suite, *more) for suite in suites]
    return units


def configuration(preset: str, settings):
    """What a preset, as named, resolves to on a model."""
    from streamgen import hub
    from streamgen.evaluation.runner import Preset

    chosen = Preset.parse(preset)
    return hub.stream_config(chosen.name, settings, chosen.overrides)


def digest(config) -> str:
    """Of a configuration: two are the same if their digests are."""
    from omegaconf import OmegaConf

    text = json.dumps(OmegaConf.to_container(OmegaConf.structured(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sampling(config) -> str:
    """How chunks are denoised: what tells results of one network apart."""
    steps = ", ".join(str(len(steps)) for steps in config.ladder.lists)
    return f"{steps} {config.ladder.solver} steps, guidance {config.guidance.scale:g}"


def _write(args: argparse.Namespace, units: Sequence, raws: Sequence[dict[str, Any]], folder: Path) -> None:
    """The report's files; names on stdout."""
    from streamgen.cli.charts import draw_results
    from streamgen.cli.confusions import failings
    from streamgen.evaluation.results import TIMED, load_results, summary, versions, write_json

    setting = {
        "models": list(dict.fromkeys(unit.model for unit in units)),
        "presets": list(dict.fromkeys(unit.preset for unit in units)),
        "suites": list(dict.fromkeys(unit.suite for unit in units)),
        **{name: getattr(args, name) for name in ("prompts", "seed", "split", "batch", "switch_mode", "checkpoint")},
        "weights": {unit.model: unit.facts["weights"] for unit in units},
        "sampling": list(dict.fromkeys(unit.sampling for unit in units)),
        "device": units[0].facts["device"], "dtype": units[0].facts["dtype"], "versions": versions(raws),
    }  # fmt: skip
    apart = {"results.json": False, "latency.json": True}
    for name, timed in apart.items():
        mine = [raw for raw in raws if (raw["settings"]["suite"] == TIMED) == timed]
        if mine or not timed:
            write_json(folder / name, summary(mine, setting, args.seed))
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier command
    results = load_results(folder)
    pictures = _pictures(draw_results(results, folder), failings(results, folder))
    text = [*section(results, "Results", pictures), *glossary([results])]
    (folder / "results.md").write_text("\n".join(text), encoding="utf-8")
    for file in ("results.json", *(["latency.json"] if (folder / "latency.json").exists() else []), "results.md"):
        print(folder / file)




# ------------------------------------------------------------------------------------------- the report
def section(results: dict[str, Any], title: str, pictures: dict[str, list[str]]) -> list[str]:
    """One folder's results as Markdown: its setting, then a table and pictures per suite, then what did not run.

    `pictures`: by suite, lines that are ready.
    """
    from streamgen.evaluation.results import suites_of, table

    it = results["setting"]
    versions = ", ".join(f"{name} {version}" for name, version in it["versions"].items())
    models = ", ".join(f"{name} ({it['weights'][name][:6]})" for name in it["models"])
    lines = [
        f"## {title}", "",
        f"{models} · {' or '.join(it['sampling'])} · {it['prompts']} prompts of `{it['split']}` per suite, "
        f"seed {it['seed']} · {it['device']}, {it['dtype']} · {versions}", "",
    ]  # fmt: skip
    for suite in suites_of(results):
        lines += [table(results, suite), "", *pictures.get(suite, [])]
    for item in results["failures"]:
        lines += [f"- {item['model']} with {item['preset']}, {item['suite']}: not measured: {item['failure']}"]
    return [*lines, ""] if results["failures"] else lines


def glossary(all_results: Sequence[dict[str, Any]]) -> list[str]:
    """How to read the tables, and what the suites of some results mean."""
    from streamgen.evaluation.results import ENOUGH, suites_of

    read = (
        "Values are means over clips with 95 % bootstrap intervals; ▲ ▼: above or below the first row on the same "
        f"prompts and seeds, with an interval of the differences that leaves 0 out (of {ENOUGH} pairs or more); n: how "
        "many clips a value has, where that is not all of them; –: undefined, or not measured. Weights are told apart "
        "by the digits behind a model's name."
    )
    suites = dict.fromkeys(suite for results in all_results for suite in suites_of(results))
    meanings = [f"- `{suite}`: {find_suite(suite).purpose}." for suite in suites]
    return ["## How to read this", "", read, "", *meanings, ""]


def _pictures(plots: dict[str, list[Path]], failing: dict[str, list[str]], beside: str = "") -> dict[str, list[str]]:
    """By suite, as Markdown: plots, then lines about what goes wrong."""
    lines: dict[str, list[str]] = {}
    for suite, paths in plots.items():
        for path in paths:
            lines.setdefault(suite, []).extend([f"![{path.stem}]({beside}{path.name})", ""])
    for suite, said in failing.items():
        lines.setdefault(suite, []).extend([*said, ""])
    return lines


def _report(args: argparse.Namespace) -> int:
    """results.md of several folders, its plots in a folder beside it."""
    action, *folders = args.words
    if action != "report" or not folders:
        raise InputError(f"cannot {shlex.join(args.words)}: use `eval report FOLDER --output docs/results.md`")
    from streamgen.cli.charts import draw_results
    from streamgen.cli.confusions import copy_failings
    from streamgen.evaluation.results import load_results
    from streamgen.media import check_output

    target = check_output(args.output, (".md",))
    beside = target.with_suffix("")
    parts = {Path(folder).resolve().name: load_results(Path(folder)) for folder in folders}
    if len(parts) < len(folders):
        raise InputError("two folders have one name: rename one, for the sections of the report are called by it")
    command = f"streamgen eval report {' '.join(folders)} --output {args.output}"
    lines = ["# Results", "", f"Generated by `{command}`; not to be edited by hand.", ""]
    beside.mkdir(exist_ok=True)
    for (name, results), folder in zip(parts.items(), folders):
        plots = draw_results(results, beside, f"{name}-")
        failing = copy_failings(results, Path(folder), beside, f"{name}-")
        lines += section(results, name, _pictures(plots, failing, f"{beside.name}/"))
    target.write_text("\n".join([*lines, *glossary(list(parts.values()))]), encoding="utf-8")
    print(target)
    return 0
