"""`streamgen render`: frames go into the file as they are made, so a long clip needs no more memory than a short one.

    streamgen render --prompt "a red circle bouncing on a navy background" --seconds 5 -o clip.mp4 cache.window=9
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from streamgen.cli.console import announced, hush_libraries, talking
from streamgen.cli.parsing import Parser, check_overrides, number, positive, read_text, whole
from streamgen.cli.timeline import Entry, check_timeline, parse_timeline
from streamgen.config import StreamConfig
from streamgen.errors import InputError

log = logging.getLogger(__name__)

DEFAULT_SECONDS = 5.0
FORGOTTEN = 'did you forget --prompt "…"?'


def parser(prog: str, description: str) -> Parser:
    out = Parser(prog, description)
    what = out.add_argument_group("what to show (exactly one)").add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT")
    what.add_argument("--prompt-file", metavar="FILE", help="its first line that is not empty; - is stdin")
    what.add_argument("--timeline", metavar="FILE", help="YAML list of {at: seconds, prompt:, mode:, blend:}")
    out.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    length = out.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=positive, help=f"length; {DEFAULT_SECONDS:g} if not given")
    length.add_argument("--num-frames", type=whole(1), metavar="N", help="length in frames, exactly")
    out.add_argument("--seed", type=whole(), default=0)
    out.add_argument("--height", type=whole(1), metavar="PIXELS", help="snapped to the model's grid")
    out.add_argument("--width", type=whole(1), metavar="PIXELS")
    out.add_argument("--model", default="sprites", help="an embedded model's name or a diffusers folder (sprites)")
    out.add_argument("--checkpoint", metavar="FILE", help=".pt or .safetensors whose transformer replaces the model's")
    out.add_argument("--preset", metavar="NAME", help="see `streamgen presets`; if not given, the model's own")
    out.add_argument("--steps", type=whole(1), metavar="N", help="evenly spaced denoising steps, not the preset's")
    out.add_argument("--guidance-scale", type=number, metavar="X", help="1 = without guidance")
    out.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cpu, cuda, cuda:N, mps")
    out.add_argument("--dtype", help="bf16, fp16 or fp32; if not given, bf16 where it is fast, else fp32")
    out.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads")
    out.add_argument(
        "-o", "--output", metavar="PATH", help=".mp4 .mkv .webm .gif, or a folder for PNG frames (named by the prompt)"
    )
    out.add_argument("--print-config", action="store_true", help="print the resolved configuration, render nothing")
    out.add_talk()
    out.add_overrides()
    return out


@dataclass(frozen=True)
class Job:
    """A render whose inputs have been checked."""

    entries: Sequence[Entry]
    num_frames: int
    fps: float
    output: str
    config: StreamConfig
    overrides: Sequence[str]


def run(args: argparse.Namespace) -> int:
    with talking(args.quiet, args.verbose):
        overrides = _overrides(args)
        if args.print_config:
            from omegaconf import OmegaConf

            config, _ = _configuration(args, overrides)
            print(OmegaConf.to_yaml(OmegaConf.structured(config)), end="")
            return 0
        _check_story(args)
        return _render(args, _job(args, overrides))


# ------------------------------------------------------------------------------------------- before anything loads
def _overrides(args: argparse.Namespace) -> list[str]:
    """The tail, and the options that are short for a part of it."""
    out = check_overrides(args.overrides, FORGOTTEN)
    if args.steps is not None:
        from streamgen.ladder import uniform_timesteps

        out += [f"ladder.timesteps={uniform_timesteps(args.steps)}", "ladder.warp=true"]
    if args.guidance_scale is not None:
        out.append(f"guidance.scale={args.guidance_scale}")
    return out


def _check_story(args: argparse.Namespace) -> None:
    if args.prompt is None and args.prompt_file is None and args.timeline is None:
        raise InputError('nothing to show: give --prompt "…", --prompt-file FILE or --timeline FILE')
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt is empty: say what to show, e.g. 'a red circle bouncing on a navy background'")
    if args.checkpoint is not None and not Path(args.checkpoint).exists():
        raise InputError(f"--checkpoint {args.checkpoint} does not exist: give a .pt or .safetensors file, or a folder")


def _configuration(args: argparse.Namespace, overrides: Sequence[str]):
    """(StreamConfig, ModelConfig), refused where they cannot run; no weights are read."""
    from streamgen import hub
    from streamgen.engine import Engine

    settings = hub.model_settings(args.model)
    try:
        config = hub.stream_config(args.preset or settings.preset, settings, overrides)
    except yaml.YAMLError as error:
        raise InputError(f"override: a value is not YAML: {' '.join(str(error).split())}") from None
    Engine(None, config)  # window floor, ladder, schedule
    return config, settings


def _job(args: argparse.Namespace, overrides: Sequence[str]) -> Job:
    config, settings = _configuration(args, overrides)
    fps = settings.fps
    seconds = DEFAULT_SECONDS if args.seconds is None else args.seconds
    num_frames = args.num_frames or max(1, round(seconds * fps))
    entries = _entries(args, fps)
    check_timeline(entries, num_frames, config, fps)
    if args.model == "sprites":
        _check_language(entries)
    if args.negative_prompt and config.guidance.scale == 1:
        log.warning("--negative-prompt has no effect without guidance: add --guidance-scale 3")
    return Job(entries, num_frames, fps, args.output or _name(entries[0].prompt), config, overrides)


def _entries(args: argparse.Namespace, fps: float) -> list[Entry]:
    if args.timeline is not None:
        return parse_timeline(read_text(args.timeline), args.timeline, fps)
    if args.prompt is not None:
        return [Entry(0, args.prompt)]
    lines = [line.strip() for line in read_text(args.prompt_file).splitlines()]
    if not any(lines):
        raise InputError(f"--prompt-file {args.prompt_file} is empty: its first line says what to show")
    return [Entry(0, next(filter(None, lines)))]


def _check_language(entries: Sequence[Entry]) -> None:
    """The embedded model knows one small world; other prompts run, and the user knows why they look odd."""
    from streamgen.worlds.sprites import parse

    for entry in entries:
        try:
            parse(entry.prompt)
        except InputError as error:
            log.warning("the embedded model was not trained on this prompt: %s", error)


def _name(prompt: str) -> str:
    """A file name that says what is in it."""
    words = "-".join(re.findall(r"\w+", prompt.lower()))
    return (words.encode()[:60].decode(errors="ignore").strip("-") or "clip") + ".mp4"


# ------------------------------------------------------------------------------------------- rendering
def _render(args: argparse.Namespace, job: Job) -> int:
    from streamgen.device import resolve_device
    from streamgen.media import open_sink

    resolve_device(args.device)
    sink = open_sink(job.output, job.fps)  # checks that it can be written; the file begins with the first frame
    try:
        with sink:
            _stream(args, job, _load(args, job), sink)
    except KeyboardInterrupt:
        if not sink.frames:
            raise
        log.error("interrupted: %s keeps the first %d of %d frames and plays", job.output, sink.frames, job.num_frames)
        return 130
    print(job.output)
    return 0


def _load(args: argparse.Namespace, job: Job):
    import torch

    from streamgen import hub

    if args.threads:
        torch.set_num_threads(args.threads)
    with announced(f"loading {args.model}"):
        hush_libraries(args.verbose)
        try:
            return hub.load(args.model, args.checkpoint, args.preset, args.device, args.dtype, job.overrides)
        except InputError:
            raise
        except (OSError, ValueError) as error:  # diffusers' and transformers' ways of saying that a file is not there
            log.debug("loading failed", exc_info=True)
            raise InputError(f"cannot load {args.model}: {str(error).strip().partition(chr(10))[0]}") from error


def _stream(args: argparse.Namespace, job: Job, pipe: Any, sink: Any) -> None:
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    begin = time.perf_counter()
    session = pipe.stream(
        job.entries[0].prompt, args.negative_prompt, args.height, args.width, job.num_frames, seed=args.seed
    )
    bar = tqdm(
        total=job.num_frames, unit="frame", file=sys.stderr, delay=1, disable=args.quiet, leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True,
    )  # fmt: skip
    pending = list(job.entries[1:])
    with session, bar, logging_redirect_tqdm([logging.getLogger("streamgen")]):
        while not session.finished:
            while pending and pending[0].frame <= session.delivered:
                entry = pending.pop(0)
                session.set_prompt(entry.prompt, entry.mode, entry.blend)
            chunk = session.next()
            frames = chunk.frames
            sink.write(frames)
            bar.update(len(frames))
            log.debug("chunk %d: %s", chunk.index, {name: round(value, 3) for name, value in chunk.timings.items()})
    sink.close()
    seconds = time.perf_counter() - begin
    size, rate = "×".join(map(str, frames.shape[2:0:-1])), sink.frames / seconds
    log.info("%d frames of %s in %.1f s: %.1f fps, %.1f× real time", sink.frames, size, seconds, rate, rate / job.fps)
