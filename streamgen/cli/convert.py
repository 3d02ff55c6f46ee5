"""`streamgen convert SOURCE TARGET --layout LAYOUT`: a transformer's weights in the layout that another program reads.

    streamgen convert self_forcing_dmd.pt my-model --layout diffusers --dtype bf16 --lora style.safetensors:0.8
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from streamgen.cli.console import announced, hush_libraries, talking
from streamgen.cli.loading import lora_option
from streamgen.cli.parsing import Parser, read_text
from streamgen.errors import InputError
from streamgen.models.layouts import LAYOUTS

log = logging.getLogger(__name__)

FILE_SUFFIXES = (".pt", ".pth")
WEIGHT_SUFFIXES = (*FILE_SUFFIXES, ".safetensors", ".gguf", ".bin", ".ckpt")


def parser(prog: str, description: str) -> Parser:
    out = Parser(prog, description, usage=f"{prog} SOURCE TARGET --layout {'|'.join(LAYOUTS)} [options]")
    out.add_argument("source", metavar="SOURCE", help="a folder, .safetensors, .pt, .gguf, a model's name, hf://…")
    out.add_argument("target", metavar="TARGET", help="a folder; a .pt file for --layout self-forcing")
    out.add_argument("--layout", required=True, choices=LAYOUTS, help="whose names, and files, to write")
    out.add_argument("--config", metavar="PATH", help="what shapes cannot tell (num_heads …): a folder, YAML or JSON")
    out.add_argument("--subfolder", metavar="NAME", help="which of a pipeline's transformers, e.g. transformer_2")
    out.add_argument(
        "--dtype", metavar="DTYPE",
        help="bf16, fp16 or fp32, as diffusers casts: time embedder, modulation and affine norms keep float32",
    )  # fmt: skip
    out.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:SCALE]", help="merge a LoRA; may be given several times"
    )
    out.add_argument("--force", action="store_true", help="replace TARGET if it is there")
    out.add_talk()
    return out


def run(args: argparse.Namespace) -> int:
    from streamgen.device import resolve_dtype

    dtype, loras = resolve_dtype(args.dtype), [lora_option(text) for text in args.lora]
    target = Path(args.target)
    _check_target(target, args.layout, args.force)
    config = _config(Path(args.config)) if args.config else None
    with talking(args.quiet, args.verbose):
        hush_libraries(args.verbose)
        with announced(f"reading {args.source}"):
            transformer = _load(args, config, dtype, loras)
        with announced(f"writing {args.target}"):
            _write(transformer, target.resolve(), args.layout)
        log.info("%s", _summary(transformer, args.layout))
    print(args.target)
    return 0


# ------------------------------------------------------------------------------------------- what is asked for
def _check_target(target: Path, layout: str, force: bool) -> None:
    """Refuse before anything is read what would be refused when it is written."""
    if layout == "self-forcing" and target.suffix not in FILE_SUFFIXES:
        raise InputError(f"--layout {layout} writes one file: {target} should end in .pt")
    if layout != "self-forcing" and target.suffix in WEIGHT_SUFFIXES:
        raise InputError(f"--layout {layout} writes a folder with a config.json: {target} names a file")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if target.is_dir() != (layout != "self-forcing"):
        kind = "folder" if target.is_dir() else "file"
        raise InputError(f"{target} is a {kind}, --layout {layout} writes the other; choose another TARGET")
    if not force:
        raise InputError(f"{target} exists: --force replaces it")
    others = [] if target.is_file() else sorted(path.name for path in target.iterdir() if not _is_ours(path))
    if others:
        raise InputError(f"{target} holds more than a transformer ({', '.join(others[:3])}): choose another TARGET")


def _is_ours(path: Path) -> bool:
    """Whether a file is part of a transformer, by diffusers' names; a LoRA beside it is not."""
    weights = re.fullmatch(r"diffusion_pytorch_model.*\.safetensors(\.index\.json)?", path.name)
    return path.is_file() and (path.name == "config.json" or weights is not None)


def _config(path: Path) -> dict[str, Any]:
    """Constructor arguments from a folder's config.json, or from a YAML or JSON file."""
    if path.is_dir():
        places = [path / "config.json", path / "transformer" / "config.json"]
        found = [place for place in places if place.is_file()]
        if not found:
            raise InputError(f"--config {path}: the folder has neither config.json nor transformer/config.json")
        path = found[0]
    try:
        content = yaml.safe_load(read_text(str(path)))  # JSON is YAML too
    except yaml.YAMLError as error:
        raise InputError(f"--config {path} is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path} should hold keys and values, e.g. num_heads: 12")
    return content


# ------------------------------------------------------------------------------------------- doing it
def _load(args: argparse.Namespace, config: dict[str, Any] | None, dtype, loras: list[tuple[str, float]]):
    """The transformer as it will be written; LoRAs are merged before numbers get shorter."""
    import torch

    from streamgen.download import resolve_checkpoint
    from streamgen.models.loading import cast_weights, load_transformer
    from streamgen.models.lora import merge_lora, read_lora

    part = args.subfolder or "transformer"
    read = [(read_lora(resolve_checkpoint(file), part), scale) for file, scale in loras]  # typos fail before weights
    source = _source(args.source)
    early = dtype if not loras or dtype == torch.float32 else None
    transformer = load_transformer(source, config, subfolder=args.subfolder, dtype=early)
    for lora, scale in read:
        merge_lora(transformer, lora, scale)
    return transformer if dtype is None or early is not None else cast_weights(transformer, dtype)


def _source(text: str) -> Path:
    """A path here; the folder of an embedded model or of one on the Hub; a file on the Hub."""
    from streamgen.download import hub_name, resolve_checkpoint
    from streamgen.hub import embedded_models, model_folder

    name = hub_name(text)
    whole = text in embedded_models() or (name is not None and not name.path)
    return model_folder(text) if whole and not Path(text).exists() else resolve_checkpoint(text)


def _write(transformer, target: Path, layout: str) -> None:
    """All of it under a name of its own, then one rename: TARGET is never half a model."""
    from streamgen.models.saving import save_transformer

    if layout == "self-forcing":
        save_transformer(transformer, target, layout)
        return
    token = uuid.uuid4().hex[:8]
    new, old = (target.with_name(f".{target.name}.{token}.{kind}") for kind in ("new", "old"))
    try:
        save_transformer(transformer, new, layout)
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(old, ignore_errors=True)


def _summary(transformer, layout: str) -> str:
    from streamgen.models.loading import describe

    tensors = list(transformer.state_dict().values())
    gigabytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e9
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    dtypes = " and ".join(dtype for dtype, _ in counts.most_common())
    return f"a {describe(transformer.config)}: {len(tensors)} tensors in {dtypes}, {gigabytes:.2f} GB, layout {layout}"
