"""`streamgen render`: frames go into the file as they are made, so a long clip needs no more memory than a short one.

    streamgen render --prompt "a red circle bouncing on a navy background" --seconds 5 -o clip.mp4 cache.window=9
    streamgen render --prompt-file prompts.txt --num-videos 4 -o clips/      # the same again goes on where it stopped
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from streamgen.cli import records
from streamgen.cli.console import talking
from streamgen.cli.jobs import FOLDER, Clip, Setup, folder_of, parse_prompts, place, with_seeds
from streamgen.cli.loading import add_parts, lora_option
from streamgen.cli.parsing import Parser, check_overrides, number, positive, read_text, whole
from streamgen.cli.records import Source
from streamgen.cli.rendering import Render
from streamgen.cli.timeline import Entry, check_timeline, parse_timeline
from streamgen.config import StreamConfig, merge, preset_path
from streamgen.errors import InputError

log = logging.getLogger(__name__)

DEFAULT_SECONDS = 5.0
FORGOTTEN = 'did you forget --prompt "…"?'
TOLD_PROMPTS = 3  # how many are said to be outside the embedded model's language, one by one
KEPT = (
    "prompt_file num_videos seed negative_prompt height width preset steps guidance_scale lora lora_2 codec tile image "
    "overrides"
).split()

EXAMPLES = """\
prompt files: one prompt per line (blank lines and # comments are skipped), or one JSON object per line with
  prompt or timeline (a list of {at, prompt, mode, blend}), and name, seed, negative_prompt, seconds or num_frames
several clips: -o is a folder (clips/ if not given) or a pattern such as out/{index}-{prompt}-{seed}.webm; {name} is
  the name in the prompt file, else index-prompt-seed; equal names become NAME-2, …; {name}/ makes folders of PNGs
beside each clip: clip.json, which reproduces it (--from) and marks it as finished, and with --save-state
  clip.state.pt, which continues it (--extend); the same command again renders what is not finished yet

examples:
  streamgen render --prompt-file prompts.txt --num-videos 4 --seed 7 -o clips/
  streamgen render --from clip.json -o again.mp4
  streamgen render --prompt "…" --save-state -o clip.mp4;  streamgen render --extend clip.mp4 --seconds 5 -o more.mp4
  streamgen render --prompt "…" -o - | ffmpeg -f rawvideo -pix_fmt rgb24 -s 128x128 -framerate 16 -i - clip.mp4
    (WIDTHxHEIGHT as rendered: 128x128 for sprites, 832x480 for Wan; the exact command is said on stderr)
"""


def parser(prog: str, description: str) -> Parser:
    out = Parser(prog, description, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = out.add_argument_group("what to show").add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT")
    what.add_argument("--prompt-file", metavar="FILE", help="a clip per line, see below; - is stdin")
    what.add_argument("--timeline", metavar="FILE", help="YAML list of {at: seconds, prompt:, mode:, blend:}")
    start = out.add_argument_group("start from an earlier clip").add_mutually_exclusive_group()
    start.add_argument("--from", dest="again", metavar="JSON", help="a clip's record: the same again")
    start.add_argument("--extend", metavar="FILE", help="go on from a clip's state, with a new prompt if given")
    out.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    length = out.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=positive, help=f"playing time; {DEFAULT_SECONDS:g} if not given")
    length.add_argument("--num-frames", type=whole(1), metavar="N", help="length in frames, exactly")
    out.add_argument("--seed", type=whole(), metavar="N", help="every prompt's first seed (0)")
    out.add_argument("--num-videos", type=whole(1), metavar="N", help="per prompt, with seeds seed, seed + 1, … (1)")
    out.add_argument("--height", type=whole(1), metavar="PIXELS", help="snapped to the model's grid")
    out.add_argument("--width", type=whole(1), metavar="PIXELS")
    out.add_argument("--fps", type=positive, help="frames per second of the file, for timelines too; the model's own")
    out.add_argument("--model", help="an embedded model's name, a diffusers folder or a Hub name (sprites)")
    out.add_argument("--checkpoint", metavar="FILE", help=".pt or .safetensors whose transformer replaces the model's")
    out.add_argument("--preset", metavar="NAME", help="see `streamgen presets`; if not given, the model's own")
    out.add_argument("--steps", type=whole(1), metavar="N", help="evenly spaced denoising steps, not the preset's")
    out.add_argument("--guidance-scale", type=number, metavar="X", help="1 = without guidance")
    out.add_argument("--device", help="auto (cuda > mps > cpu), cpu, cuda, cuda:N, mps")
    out.add_argument("--dtype", help="bf16, fp16 or fp32; if not given, bf16 where it is fast, else fp32")
    out.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads")
    add_parts(out)
    out.add_argument("--image", metavar="FILE", help="the first frame, for image-to-video models")
    out.add_argument(
        "-o", "--output", metavar="PATH",
        help=".mp4 .mkv .webm .gif, or a folder for PNG frames (named by the prompt); a folder of clips with "
        "--prompt-file or --num-videos; - for raw rgb24 on stdout",
    )  # fmt: skip
    out.add_argument("--overwrite", action="store_true", help="render finished clips again, replace folders of frames")
    out.add_argument(
        "--save-state", nargs="?", const="", metavar="FILE.pt", help="the stream's end, for --extend; beside the clip"
    )
    out.add_argument("--print-config", action="store_true", help="print the resolved configuration, render nothing")
    out.add_talk()
    out.add_overrides()
    return out


def run(args: argparse.Namespace) -> int:
    with talking(args.quiet, args.verbose):
        source = records.source_of(args.again, args.extend, args.device)
        overrides = _overrides(args)
        if args.print_config:
            from omegaconf import OmegaConf

            config, _ = _configuration(args, source, overrides)
            print(OmegaConf.to_yaml(OmegaConf.structured(config)), end="")
            return 0
        _check_options(args, source)
        _check_files(args, source)
        setup = _setup(args, source, overrides)
        clips = _clips(args, source, setup)
        output = args.output or _default_output(source, clips[0], _several(args))
        if output == "-":
            if len(clips) > 1:
                raise InputError(f"-o - is one stream of frames for {len(clips)} clips: give a folder")
            clips, folder = [replace(clips[0], target="-")], None
        else:
            clips, folder = place(clips, output, _several(args)), folder_of(output, _several(args))
            _check_source_stays(args, source, clips)
        return Render(args, source, setup, clips, folder, _several(args)).run()


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


def _check_files(args: argparse.Namespace, source: Source) -> None:
    """Refuse, before a model is fetched, what costs nothing to find out."""
    if args.preset is not None:
        preset_path(args.preset)
    for file in (args.prompt_file, args.timeline):
        if file not in (None, "-") and not os.path.exists(file):  # what is there is read once: it may be a pipe
            read_text(file)
    image = args.image or source.settings.get("image")
    if image and not Path(image).is_file():
        raise InputError(f"--image {image} does not exist: give a picture")


def _check_options(args: argparse.Namespace, source: Source) -> None:
    """Refuse options that contradict one another."""
    if not source.path and args.prompt is None and args.prompt_file is None and args.timeline is None:
        raise InputError('nothing to show: give --prompt "…", --prompt-file FILE or --timeline FILE')
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt is empty: say what to show, e.g. 'a red circle bouncing on a navy background'")
    if source.path and args.prompt_file is not None:
        raise InputError(f"--prompt-file cannot go with {source.path}: an earlier clip is one clip")
    fixed = [f"--{name.replace('_', '-')}" for name in KEPT if getattr(args, name) not in (None, [])]
    if source.state is not None and fixed:
        tail = ", ".join(fixed).replace("--overrides", "KEY=VALUE")
        raise InputError(f"{tail} cannot change in a stream that goes on: {source.path} keeps its own settings")
    if args.save_state is not None:
        if args.save_state and not args.save_state.endswith((".pt", ".pth")):
            raise InputError(f"--save-state {args.save_state}: a state's name ends in .pt; without one, give it last")
        if args.save_state:
            from streamgen.media import check_output

            check_output(args.save_state, (".pt", ".pth"))
        if args.save_state and _several(args):
            raise InputError("--save-state FILE is one file for several clips: leave FILE out, each gets its own")
        if not args.save_state and args.output == "-":
            raise InputError("--save-state needs a file name when frames go to stdout: --save-state clip.state.pt")
    if args.output == "-" and sys.stdout.isatty():
        raise InputError("-o - writes raw frames, which a terminal cannot show: pipe them, e.g. into ffmpeg (--help)")


def _several(args: argparse.Namespace) -> bool:
    """Whether a folder given as --output is one of clips: by the options, not by how many clips there happen to be."""
    return args.prompt_file is not None or args.num_videos is not None


def _configuration(args: argparse.Namespace, source: Source, overrides: Sequence[str]):
    """(StreamConfig, ModelConfig), refused where they cannot run; no weights are read."""
    from streamgen import hub
    from streamgen.engine import Engine

    settings = hub.model_settings(_model(args, source))
    if source.state is not None:
        config = merge(StreamConfig, source.state["config"], source=source.path)
    elif source.settings and args.preset is None:
        config = merge(StreamConfig, source.settings["config"], list(overrides), source=source.path)
    else:
        config = hub.stream_config(args.preset or settings.preset, settings, overrides)
    Engine(None, config)  # window floor, ladder, schedule
    return config, settings


def _model(args: argparse.Namespace, source: Source) -> str:
    """Its name, or a path that holds from any folder."""
    from streamgen.hub import embedded_models

    model = args.model or source.settings.get("model") or "sprites"
    return model if model in embedded_models() or not Path(model).exists() else str(Path(model).resolve())


def _checkpoint(args: argparse.Namespace, source: Source) -> str | None:
    from streamgen.download import resolve_checkpoint

    name = args.checkpoint or (source.settings.get("checkpoint") if args.model is None else None)
    if name is None:
        return None
    if not resolve_checkpoint(name).exists():
        raise InputError(f"--checkpoint {name} does not exist: give a .pt or .safetensors file, or a folder")
    return str(Path(name).resolve()) if Path(name).exists() else name


def _setup(args: argparse.Namespace, source: Source, overrides: list[str]) -> Setup:
    import torch

    from streamgen.device import default_dtype, resolve_dtype

    old = source.settings
    checkpoint = _checkpoint(args, source)
    config, settings = _configuration(args, source, overrides)
    device = records.pick_device(args.device, old.get("device"))
    dtype = resolve_dtype(args.dtype or old.get("dtype")) or default_dtype(torch.device(device))
    own = source.state is None  # sizes and noise are this command's to choose
    if args.save_state is not None and own and config.cache.window == -1:
        raise InputError("--save-state: cache.window=-1 keeps every frame, so it cannot go on: give cache.window=21")
    model = _model(args, source)
    parts = _parts(args, old)
    files = [*(lora_option(text)[0] for text in (*parts["lora"], *parts["lora_2"])), parts["codec"], parts["image"]]
    setup = Setup(
        model=model, checkpoint=checkpoint, preset=args.preset or old.get("preset") or settings.preset,
        overrides=[*(old.get("overrides", []) if args.preset is None else []), *overrides], config=config,
        height=args.height or old.get("height") or (settings.height if own else None),
        width=args.width or old.get("width") or (settings.width if own else None),
        fps=args.fps or old.get("fps") or settings.fps, device=device, dtype=str(dtype).removeprefix("torch."),
        threads=args.threads or old.get("threads"), weights=records.stamp(model, [checkpoint, *files]), **parts,
        endless=args.save_state is not None or old.get("endless", False), extend=old.get("extend"),
    )  # fmt: skip
    if source.record is not None and setup.weights != old["weights"]:
        log.warning("the weights are not those %s was made with: expect other frames", source.path)
    return setup


def _parts(args: argparse.Namespace, old: dict) -> dict:
    """What the model is put together from, as the command or the record says; files by paths that always hold."""
    found = {name: getattr(args, name) or old.get(name) for name in ("lora", "lora_2", "codec", "tile", "image")}
    whole = lambda name: str(Path(name).resolve()) if Path(name).exists() else name
    for name in ("lora", "lora_2"):
        split = map(lora_option, found[name] or [])
        found[name] = [f"{whole(file)}:{scale:g}" for file, scale in split]
    for name in ("codec", "image"):
        found[name] = found[name] and whole(found[name])
    return found


def _clips(args: argparse.Namespace, source: Source, setup: Setup) -> list[Clip]:
    """The clips of a command; they have no places yet."""
    old, spec = source.settings, (source.state or {}).get("spec", {})
    seconds = DEFAULT_SECONDS if args.seconds is None else args.seconds
    frames = args.num_frames or (old.get("num_frames") if args.seconds is None else None)
    negative = old.get("negative_prompt", spec.get("negative_prompt", ""))
    base = Clip(
        entries=() if args.prompt_file else _entries(args, source, setup.fps),
        seed=old.get("seed", spec.get("seed", 0)) if args.seed is None else args.seed,
        num_frames=frames or max(1, round(seconds * setup.fps)),
        negative_prompt=negative if args.negative_prompt is None else args.negative_prompt,
    )
    clips = [base]
    if args.prompt_file is not None:
        clips = parse_prompts(read_text(args.prompt_file), args.prompt_file, base, setup.fps)
    _check_clips(clips, source, setup, f"{args.prompt_file}: " if args.prompt_file else "")
    return with_seeds(clips, args.num_videos or 1)


def _entries(args: argparse.Namespace, source: Source, fps: float) -> tuple[Entry, ...]:
    if args.timeline is not None:
        return tuple(parse_timeline(read_text(args.timeline), args.timeline, fps, fresh=source.state is None))
    if args.prompt is not None:
        return (Entry(0, args.prompt),)
    return records.entries_of(source.settings, source.path) if "prompts" in source.settings else ()


def _check_clips(clips: Sequence[Clip], source: Source, setup: Setup, where: str) -> None:
    """Refuse what cannot be played; warn about what will not be seen."""
    given = None if source.state is None else (0 if source.surplus is None else len(source.surplus))
    for clip in clips:
        try:
            check_timeline(clip.entries, clip.num_frames, setup.config, setup.fps, given)
        except InputError as error:
            raise InputError(f"{where}prompt {clip.index}: {error}" if where else str(error)) from None
    if source.state is not None and source.state["spec"]["num_frames"] is not None:
        left = given + source.state["spec"]["num_frames"] - source.state["delivered"]
        if left < clips[0].num_frames:
            raise InputError(f"{source.path} ends {left} frames on: --num-frames {left}, or save an endless stream")
    if setup.model == "sprites":
        _check_language([entry for clip in clips for entry in clip.entries])
    guidance = setup.config.guidance
    if guidance.scale == 1 and guidance.commit_branch != "negative" and any(clip.negative_prompt for clip in clips):
        log.warning("the negative prompt has no effect without guidance: add --guidance-scale 3")


def _check_language(entries: Sequence[Entry]) -> None:
    """The embedded model knows one small world; other prompts run, and the user knows why they look odd."""
    from streamgen.worlds.sprites import parse

    strange = {}
    for entry in entries:
        try:
            parse(entry.prompt)
        except InputError as error:
            strange[entry.prompt] = error
    for error in list(strange.values())[:TOLD_PROMPTS]:
        log.warning("the embedded model was not trained on this prompt: %s", error)
    if len(strange) > TOLD_PROMPTS:
        log.warning("nor on %d others", len(strange) - TOLD_PROMPTS)


def _default_output(source: Source, clip: Clip, several: bool) -> str:
    if several:
        return FOLDER
    if not source.path:
        return f"{clip.slug}.mp4"
    name = Path(source.path).name
    for suffix in (".json", ".pt", ".state"):
        name = name.removesuffix(suffix)
    stem, suffix = os.path.splitext(name)
    return f"{stem}-{'continued' if source.record is None else 'again'}{suffix or '.mp4'}"


def _check_source_stays(args: argparse.Namespace, source: Source, clips: Sequence[Clip]) -> None:
    """The clip that this command starts from is not overwritten by the way."""
    starts = {os.path.realpath(path) for path in (source.path, source.settings.get("extend")) if path}
    if args.save_state and os.path.realpath(args.save_state) in starts:
        raise InputError(f"--save-state {args.save_state} is the state that this clip starts from: give another name")
    for clip in clips:
        files = (clip.target, records.record_path(clip.target), records.state_path(clip.target))
        if not args.overwrite and starts & {os.path.realpath(file) for file in files}:
            raise InputError(f"--output {clip.target} is the clip that this one starts from: give another name")
