"""`streamgen doctor`: what is installed, what works on this machine, and the line that adds what is missing."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from streamgen.cli.console import table
from streamgen.cli.parsing import Parser

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "omegaconf", "numpy", "imageio", "imageio-ffmpeg")
EXTRAS = {
    "demo": ("gradio",),
    "train": ("tensorboard", "peft"),
    "video": ("av",),
    "triton": ("triton",),
    "xformers": ("xformers",),
    "tensorrt": ("torch-tensorrt",),
}


def parser(prog: str, description: str) -> Parser:
    out = Parser(prog, description)
    out.add_argument("--json", action="store_true", help="the same, for programs")
    return out


def run(args: argparse.Namespace) -> int:
    report = examine()
    print(json.dumps(report, indent=2) if args.json else _text(report))
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
