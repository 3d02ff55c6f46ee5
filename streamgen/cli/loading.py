"""Models for the commands that stream: loaded by the command's options, with failures in one line."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from streamgen.cli.console import announced, hush_libraries
from streamgen.cli.parsing import Parser, whole
from streamgen.errors import InputError

log = logging.getLogger(__name__)


def add_parts(out: Parser) -> None:
    """Options for what a model is put together from, beside --model and --checkpoint."""
    out.add_argument("--lora", metavar="FILE[:SCALE]", action="append", help="merged into the transformer; repeatable")
    out.add_argument("--lora-2", metavar="FILE[:SCALE]", action="append", help="into the second one of a Wan2.2 A14B")
    out.add_argument("--codec", metavar="FILE", help="a tiny decoder in TAEHV's layout (taew2_1.pth), not the VAE")
    out.add_argument("--tile", type=whole(2), metavar="N", help="decode in tiles of N latents a side")
    out.add_argument("--prompt-cache", action="store_true", help="keep embedded prompts in ~/.cache/streamgen/prompts")
    out.add_argument("--offload", help="none, text (the text encoder stays off the device) or group (transformers too)")


def lora_option(text: str) -> tuple[str, float]:
    """FILE or FILE:SCALE; a file's name may hold colons itself. Raises InputError."""
    file, colon, scale = text.rpartition(":")
    if not colon or scale.startswith("//") or Path(text).exists():  # hf://…
        return text, 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--lora {text}: {scale!r} is not a number, and there is no such file; use FILE or FILE:SCALE")
    return file, value


def load_pipeline(args: argparse.Namespace, overrides: Sequence[str]):
    """`hub.load` by --model, --checkpoint, --preset, --device, --dtype, --threads and `add_parts`.

    Raises: InputError, also where diffusers or transformers find a file missing or unreadable.
    """
    import torch

    from streamgen import hub

    if args.threads:
        torch.set_num_threads(args.threads)
    with announced(f"loading {args.model}"):
        hush_libraries(args.verbose)
        try:
            pipe = hub.load(
                args.model, args.checkpoint, args.preset, args.device, args.dtype, overrides,
                loras=list(map(lora_option, args.lora or [])), loras_2=list(map(lora_option, args.lora_2 or [])),
                codec=args.codec, tile=args.tile, offload=args.offload or "none",
            )  # fmt: skip
        except InputError:
            raise
        except (OSError, ValueError) as error:  # diffusers' and transformers' ways of saying that a file is not there
            log.debug("loading failed", exc_info=True)
            raise InputError(f"cannot load {args.model}: {str(error).strip().partition(chr(10))[0]}") from error
    if args.prompt_cache:
        from streamgen.models.prompts import EmbeddingCache

        pipe.prompts.cache = EmbeddingCache()
    return pipe
