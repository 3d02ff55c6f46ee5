"""`streamgen eval vbench`: the folder that VBench and VBench-Long read; `eval vbench-results`: what they found.

    streamgen eval vbench --prompts prompts.txt --preset longlive --samples 5 --output vbench
    streamgen eval vbench --prompts prompts.txt --videos clips/ --output vbench
    streamgen eval vbench-results evaluation_results/*_eval_results.json --output vbench-found

VBench itself is not needed here: it is run in between, on what the first command prints.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamgen.cli.eval import LOADING, MODEL, configuration, digest, load
from streamgen.cli.parsing import Parser, positive, read_text, whole
from streamgen.errors import InputError

log = logging.getLogger(__name__)

SECONDS = 5.0
SETTINGS = "settings.json"  # beside the lists of prompts
EPILOG = """\
FILE is one prompt per line, or VBench's own VBench_full_info.json, whose labels are kept
--videos: as many .mp4 files as prompts x samples, sorted by name: the samples of the first prompt, of the second, …
videos that are there already stay: the same command again goes on where it stopped
"""


def parser(prog: str) -> Parser:
    what = "videos, named and listed as VBench reads them"
    out = Parser(prog, what, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--prompts", required=True, metavar="FILE", help="one per line, or a full_info.json")
    out.add_argument("--output", required=True, metavar="DIR", help="a folder for videos/ and the lists of prompts")
    out.add_argument("--videos", metavar="DIR", help="rendered clips that are taken over, in place of --model")
    out.add_argument("--model", default=MODEL, metavar="M", help=f"embedded, a folder or a Hub name ({MODEL})")
    out.add_argument("--checkpoint", metavar="FILE", help="whose transformer replaces the model's")
    out.add_argument("--preset", metavar="P", help="with settings as default+cache.window=9; else the model's own")
    out.add_argument("--seconds", type=positive, default=SECONDS, metavar="T", help=f"of each video ({SECONDS:g})")
    out.add_argument("--samples", type=whole(1), default=5, metavar="N", help="videos per prompt; VBench takes 5 (5)")
    out.add_argument("--seed", type=whole(0), default=0, metavar="K", help="of the first sample, then K + 1, … (0)")
    out.add_argument("--long", action="store_true", help="for VBench-Long")
    out.add_argument("--numbered", action="store_true", help="file names are numbers, for prompts that cannot be names")
    out.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cpu, cuda, cuda:N, mps")
    out.add_argument("--dtype", help="bf16, fp16 or fp32; if not given, bf16 where it is fast, else fp32")
    out.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads")
    out.add_talk()
    out.set_defaults(run=_run)
    return out


def _run(args: argparse.Namespace) -> int:
    from streamgen.evaluation.results import write_json
    from streamgen.evaluation.vbench import entries, read_full_info, write_layout

    if args.prompts.endswith(".json"):
        prompts = read_full_info(args.prompts)
    else:
        prompts = entries([line.strip() for line in read_text(args.prompts).splitlines() if line.strip()])
    given = None if args.videos is None else _given(Path(args.videos), len(prompts) * args.samples)
    settings = _settings(args, [entry.prompt for entry in prompts], given)
    _check_same(Path(args.output), settings)
    layout = write_layout(args.output, prompts, args.samples, numbered=args.numbered, long=args.long)
    if strangers := layout.strangers():
        raise InputError(f"{strangers[0]} is none of these videos, and VBench would measure it: give another --output")
    write_json(layout.folder / SETTINGS, settings)
    if given is not None:
        for source, (_, _, target) in zip(given, layout.videos(), strict=True):
            _put(functools.partial(_link, source), layout.folder, target)
    else:
        try:
            _render(args, layout)
        except KeyboardInterrupt:
            log.error("interrupted: finished videos are kept, the same command renders the rest")
            return 130
    lists = f" --full_json_dir {layout.folder / 'full_info.json'}"
    lists += f" --prompt_file {layout.folder / 'prompts.json'}" if args.numbered and not args.long else ""
    print(f"--videos_path {layout.videos_path}{lists} --mode {layout.mode}")
    return 0


def _settings(args: argparse.Namespace, prompts: list[str], given: list[Path] | None) -> dict[str, Any]:
    """What the videos of a folder follow from, beside their names."""
    own = {"numbered": prompts if args.numbered else None}
    if given is not None:
        return {**own, "videos": [str(path.resolve()) for path in given]}
    from streamgen import hub
    from streamgen.cli import records

    known = hub.model_settings(args.model)
    preset = args.preset or known.preset
    named = {"model": args.model, "checkpoint": args.checkpoint, "dtype": args.dtype, "preset": preset}
    config = configuration(preset, known)
    facts = {"weights": records.stamp(args.model, [args.checkpoint]), "configuration": digest(config)}
    return {**own, **named, **facts, "seed": args.seed, "seconds": args.seconds}


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    """Raises InputError where videos of something else lie."""
    from streamgen.evaluation.results import read_json, unlike

    path, instead = folder / SETTINGS, "give another --output"
    if path.is_file() and (apart := unlike(read_json(path, (), instead), settings)):
        raise InputError(f"{folder} holds videos of other settings ({', '.join(apart)}): {instead}")


def _given(folder: Path, count: int) -> list[Path]:
    """Rendered clips. Raises InputError unless there are as many as there should be."""
    if not folder.is_dir():
        raise InputError(f"cannot read {folder}: there is no such folder; give the folder of rendered clips")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".mp4" and path.name[0] != ".")
    if len(found) != count:
        raise InputError(f"{folder} holds {len(found)} .mp4 files, and prompts x samples are {count}: change --samples")
    return found


def _put(write: Callable[[Path], None], folder: Path, target: Path) -> None:
    """Whole or not at all; half a video lies beside the folder of videos, where VBench does not look."""
    partial = folder / ".partial.mp4"
    partial.unlink(missing_ok=True)
    try:
        write(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


# ------------------------------------------------------------------------------------------- rendering
def _render(args: argparse.Namespace, layout) -> None:
    """Every video that is not there yet."""
    from streamgen import hub
    from streamgen.cli.rendering import progress

    missing = layout.missing()
    if len(missing) < len(layout.entries) * layout.samples:
        log.info("%d videos are there already", len(layout.entries) * layout.samples - len(missing))
    if not missing:
        return
    preset = args.preset or hub.model_settings(args.model).preset
    pipe = load({name: getattr(args, name) for name in LOADING}, args.model, preset)
    num_frames = max(1, round(args.seconds * pipe.settings.fps))
    with progress(num_frames * len(missing), args.quiet) as bar:
        for prompt, sample, target in layout.videos():
            if target in missing:
                write = functools.partial(_clip, pipe, prompt, args.seed + sample, num_frames, bar)
                _put(write, layout.folder, target)


def _clip(pipe, prompt: str, seed: int, num_frames: int, bar, file: Path) -> None:
    from streamgen.media import open_sink

    with open_sink(file, pipe.settings.fps) as sink, pipe.stream(prompt, num_frames=num_frames, seed=seed) as stream:
        done = 0
        while done < num_frames:
            frames = stream.next().frames
            sink.write(frames)
            done += len(frames)
            bar.update(len(frames))


# ------------------------------------------------------------------------------------------- results
def results_parser(prog: str) -> Parser:
    out = Parser(prog, "result files of VBench and VBench-Long as one table")
    out.add_argument("files", nargs="+", metavar="FILE", help="*_eval_results.json; each is a column")
    out.add_argument("--output", metavar="DIR", help="a folder for vbench.json (records) and vbench.md")
    out.add_talk()
    out.set_defaults(run=_results)
    return out


def _results(args: argparse.Namespace) -> int:
    from streamgen.evaluation.results import write_json
    from streamgen.evaluation.vbench import read_results
    from streamgen.media import check_folder

    names = [Path(file).name.removesuffix(".json").removesuffix("_eval_results") for file in args.files]
    if len(set(names)) < len(names):
        raise InputError("two files have one name: rename one, for the columns of the table are called by it")
    found = {name: read_results(file) for name, file in zip(names, args.files)}
    folder = None if args.output is None else check_folder(args.output, "results")
    records = [score.record(name, "") for name, scores in found.items() for score in scores]
    text = _table(names, records)
    print(text)
    if folder is not None:
        folder.mkdir(exist_ok=True)
        write_json(folder / "vbench.json", {"records": records})
        (folder / "vbench.md").write_text(f"# VBench\n\n{text}\n", encoding="utf-8")
    return 0


def _table(names: list[str], records: list[dict]) -> str:
    """Markdown: a row per dimension, a column per file."""
    from streamgen.evaluation.results import result_cell

    found = {(record["metric"], record["model"]): record for record in records}
    lines = [f"| dimension | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for metric in dict.fromkeys(metric for metric, _ in found):
        lines.append(f"| {metric} | {' | '.join(result_cell(found.get((metric, name))) for name in names)} |")
    return "\n".join(lines)
