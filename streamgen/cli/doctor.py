"""`streamgen doctor`: what is installed, what works on this machine, and the line that adds what is missing.

With a model: what it will take in memory, whether that is there, and what would fit, before anything is loaded.

    streamgen doctor --model wan-1.3b --preset self-forcing --memory 24 cache.window=12
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from streamgen.cli.console import table
from streamgen.cli.parsing import Parser, check_overrides, positive, whole
from streamgen.errors import InputError

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "omegaconf", "numpy", "imageio-ffmpeg")
EXTRAS = {
    "demo": ("gradio",),
    "wan": ("ftfy", "gguf", "peft"),
    "triton": ("triton",),
    "xformers": ("xformers",),
}


def parser(prog: str, description: str) -> Parser:
    out = Parser(prog, description)
    out.add_argument("--json", action="store_true", help="the same, for programs")
    memory = out.add_argument_group("how much memory a model takes; nothing is loaded")
    memory.add_argument("--model", help="an embedded model, a name of configs/models such as wan-1.3b, or a folder")
    memory.add_argument("--preset", metavar="NAME", help="see `streamgen presets`; if not given, the model's own")
    memory.add_argument("--height", type=whole(1), metavar="PIXELS")
    memory.add_argument("--width", type=whole(1), metavar="PIXELS")
    memory.add_argument("--num-frames", type=whole(1), metavar="N", help="length, if the cache keeps every frame (81)")
    memory.add_argument("--batch", type=whole(1), metavar="N", help="samples side by side (1)")
    memory.add_argument("--dtype", help="bf16, fp16 or fp32; if not given, bf16 where it is fast, else fp32")
    memory.add_argument("--codec", metavar="NAME", help="wan = the model's own decoder (default), tiny = TAEHV")
    memory.add_argument("--tile", type=whole(1), metavar="N", help="decode in tiles of N latents per side")
    memory.add_argument("--weights", metavar="TYPE", help="fp8 = the transformer's matrices in one byte per value")
    memory.add_argument("--device", help="auto (cuda > mps > cpu), cpu, cuda, cuda:N, mps")
    memory.add_argument("--memory", type=positive, metavar="GIB", help="plan for a GPU of this size")
    out.add_overrides()
    return out


def run(args: argparse.Namespace) -> int:
    if args.model is None:
        options = {name: value for name, value in vars(args).items() if name not in ("json", "overrides")}
        given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
        if given := [*given, *args.overrides]:
            raise InputError(f"{given[0]} belongs to the memory estimate: add --model, e.g. --model wan-1.3b")
        report = examine()
        print(json.dumps(report, indent=2) if args.json else _text(report))
        return 0
    report = examine_memory(args)
    print(json.dumps(report, indent=2) if args.json else _memory_text(report))
    return 0


def examine() -> dict[str, Any]:
    """Everything `doctor` knows, as plain Python."""
    from streamgen.kernels.attention import available

    return {
        "versions": _versions(),
        "devices": _devices(),
        "attention": {name: reason or "works" for name, reason in available().items()},
        "models": _models(),
        "extras": {name: _extra(name, parts) for name, parts in EXTRAS.items()},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    from streamgen import __version__

    found = {"streamgen": __version__, "python": platform.python_version(), "system": platform.platform()}
    found |= {name: _version(name) or "not installed" for name in LIBRARIES}
    try:
        import imageio_ffmpeg

        found["ffmpeg"] = f"{imageio_ffmpeg.get_ffmpeg_version()} at {imageio_ffmpeg.get_ffmpeg_exe()}"
    except (ImportError, RuntimeError) as error:
        found["ffmpeg"] = f"none: {str(error).partition(chr(10))[0]}; PNG folders alone can be written"
    return found


def _devices() -> dict[str, str]:
    import torch

    name, threads = _cpu_name(), f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    found = {"cpu": f"{name}, {threads}, bf16 {_cpu_bf16()}"}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            bf16 = "bf16" if card.major >= 8 else "bf16 emulated: use --dtype fp16"
            found[f"cuda:{i}"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm{card.major}{card.minor}, {bf16}"
    else:
        found["cuda"] = "none visible" if torch.version.cuda or torch.version.hip else "this torch is built without it"
    mps, absent = torch.backends.mps, "this torch is built without it"
    found["mps"] = "works" if mps.is_available() else "no such device" if mps.is_built() else absent
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cpu_bf16() -> str:
    import torch

    from streamgen.device import default_dtype

    return "in hardware" if default_dtype(torch.device("cpu")) is torch.bfloat16 else "emulated: slow"


def _models() -> dict[str, str]:
    from streamgen.hub import assets_root, embedded_models

    found = {}
    for name in embedded_models():
        size = sum(file.stat().st_size for file in (assets_root() / name).rglob("*") if file.is_file())
        found[name] = f"{size / 1e6:.1f} MB at {assets_root() / name}"
    return found


def _extra(name: str, parts: tuple[str, ...]) -> dict[str, Any]:
    found = {part: _version(part) for part in parts}
    out: dict[str, Any] = {"installed": all(found.values()), "packages": found}
    if not out["installed"]:
        out["install"] = pip_line(name)
    return out


def pip_line(extra: str) -> str:
    """The command that adds an extra to this installation."""
    root = Path(__file__).resolve().parents[2]
    where = f"-e '{root}[{extra}]'" if (root / "pyproject.toml").is_file() else f"'streamgen[{extra}]'"
    return f"pip install {where}"


def _text(report: dict[str, Any]) -> str:
    extras = {}
    for name, state in report["extras"].items():
        have = ", ".join(f"{part} {version}" for part, version in state["packages"].items() if version)
        extras[name] = have if state["installed"] else f"add it with: {state['install']}"
    models = report["models"] or {"none": "this installation holds no weights: give --model FOLDER"}
    sections = {**report, "models": models, "extras": extras}
    blocks = []
    for title, items in sections.items():
        lines = table(("", ""), items.items()).splitlines()[1:]
        blocks.append("\n".join([title, *(f"  {line}" for line in lines)]))
    return "\n\n".join(blocks)


# ---------------------------------------------------------------------------------------------- memory of a model
PARTS = {
    "transformers": "transformer weights",
    "text_encoder": "text encoder weights",
    "image_encoder": "image encoder weights",
    "codec": "codec weights",
    "cache": "keys and values",
    "text_keys": "keys of the text",
    "tables": "position tables",
    "codec_state": "decoder's memory",
    "runtime": "libraries",
    "encoding": "encoding a prompt",
    "forward": "one forward",
    "rotation": "turning keys",
    "decoding": "decoding a chunk",
}
PASSING = ("encoding", "forward", "rotation", "decoding")


def examine_memory(args: argparse.Namespace) -> dict[str, Any]:
    """What a model takes, what there is and what would fit, as plain Python; sizes in bytes."""
    from dataclasses import asdict

    import torch

    from streamgen.device import default_dtype, resolve_device, resolve_dtype
    from streamgen.hub import stream_config
    from streamgen.memory import describe_model, device_memory, estimate, ways_to_fit

    overrides = check_overrides(args.overrides, "settings are KEY=VALUE, e.g. cache.window=9")
    settings, geometry = describe_model(args.model)
    preset = args.preset or settings.preset
    config = stream_config(preset, settings, overrides)
    if args.memory is not None and args.device is not None:
        raise InputError("give either --memory, to plan for a GPU of that size, or --device")
    device = torch.device("cuda") if args.memory is not None else resolve_device(args.device or "auto")
    dtype = resolve_dtype(args.dtype) or default_dtype(device)
    total, free = (int(args.memory * 2**30),) * 2 if args.memory is not None else device_memory(device)
    height, width = args.height or settings.height, args.width or settings.width
    if height is None or width is None:
        raise InputError(f"{args.model} has no size of its own: give --height and --width")
    frames = None
    if args.num_frames is not None:
        frames = 1 + -(-(args.num_frames - 1) // geometry.codec.temporal_ratio)
    setting = dict(
        height=height, width=width, batch=args.batch or 1, dtype=dtype, codec=args.codec or "wan", tile=args.tile,
        weights=args.weights, device=device.type, latent_frames=frames,
    )  # fmt: skip
    found = estimate(geometry, config, **setting)
    ways = ways_to_fit(free, geometry, config, **setting) if found.peak > free else []
    return {
        "model": args.model,
        "preset": preset,
        "window": config.cache.window,
        "setting": {**setting, "dtype": str(dtype).removeprefix("torch.")},
        "bytes": found.parts(),
        "frames_in_cache": found.frames_in_cache,
        "tokens_per_frame": found.tokens_per_frame,
        "peak": found.peak,
        "peak_released": found.peak_released,
        "peak_offloaded": found.peak_offloaded,
        "device": {"name": str(device), "total": total, "free": free},
        "fits": found.peak <= free,
        "ways": [asdict(way) for way in ways],
        "geometry": asdict(geometry),
    }


def _memory_text(report: dict[str, Any]) -> str:
    setting, device, parts = report["setting"], report["device"], report["bytes"]
    window = "every frame" if report["window"] == -1 else f"a window of {report['window']} latent frames"
    head = (
        f"{report['model']} with {report['preset']} at {setting['height']}×{setting['width']} in {setting['dtype']}: "
        f"{window}, {report['tokens_per_frame']} tokens per frame, {report['frames_in_cache']} frames in the cache"
    )
    stays = [(PARTS[name], _size(size)) for name, size in parts.items() if size and name not in PASSING]
    passes = [(PARTS[name], _size(parts[name])) for name in PASSING]
    peaks = [("all on the device", _size(report["peak"]))]
    if setting["device"] == "cpu":
        peaks += [("text encoder released after the prompt", _size(report["peak_released"]))]
    else:
        peaks += [("text encoder kept in RAM", _size(report["peak_offloaded"]))]
    blocks = [
        f"{title}\n" + "\n".join(f"  {line}" for line in table(("", ""), rows).splitlines()[1:])
        for title, rows in (("what stays", stays), ("what comes and goes", passes), ("peak", peaks))
    ]
    free, total = (_size(device[name]).strip() for name in ("free", "total"))
    there = f"{device['name']}: {free} free of {total}"
    verdict = f"{there}: it fits" if report["fits"] else f"{there}: it does not fit"
    if report["ways"]:
        verdict += "\nit fits with, least costly first"
        verdict += "".join(f"\n  {_size(way['peak'])}  {' + '.join(way['changes'])}" for way in report["ways"])
    elif not report["fits"]:
        verdict += ", and no smaller setting tried here would: take a smaller model or a larger device"
    return "\n\n".join([head, *blocks, verdict])


def _size(count: int) -> str:
    return f"{count / 2**30:8.2f} GiB" if count >= 2**29 else f"{count / 2**20:8.1f} MiB"
