"""Seconds and peak memory of Wan 1.3B at full size on this machine, with random weights, beside the estimates.

    python benchmarks/wan_geometry.py --threads 2 > benchmarks/results/wan-geometry-cpu.json

One denoise call and one commit of a chunk through the engine, with `--history` frames pretended to be in the cache
(zeros: attention does the same work), then the first and a later latent frame through the codec. The transformer is
let go before the codec is built.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

SMALL = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, ffn_dim=64, text_dim=32, text_len=8)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", choices=("full", "small"), default="full", help="small = a test of this file")
    parser.add_argument("--height", type=int, default=None, help="480, small: 64")
    parser.add_argument("--width", type=int, default=None, help="832, small: 96")
    parser.add_argument("--window", type=int, default=9, help="latent frames, the chunk's three among them")
    parser.add_argument("--history", type=int, default=None, help="frames before the chunk; all the window holds")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--codec-dtype", default="fp32", help="bf16 convolutions may be emulated on a CPU")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args(argv)


def shapes(args: argparse.Namespace):
    """The geometry to run, and the picture's size."""
    from streamgen.hub import model_config

    settings = model_config("wan-1.3b")
    geometry = settings.geometry
    if args.scale == "full":
        return geometry, args.height or settings.height, args.width or settings.width
    transformer = replace(geometry.transformer, **SMALL)
    geometry = replace(geometry, transformer=transformer, codec=replace(geometry.codec, base_dim=8))
    return geometry, args.height or 64, args.width or 96


def random_model(build: Callable, dtype):
    """A module born without memory, then filled with small normal numbers; norms stay 1, biases 0."""
    import torch

    with torch.device("meta"):
        model = build().to(dtype)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 or name.endswith("gamma"):
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            weight.normal_(std=0.02, generator=generator)
    return model


class Stages:
    """Seconds, peak resident memory and the estimate of one stage after the other."""

    def __init__(self) -> None:
        self.report: dict[str, dict] = {}

    def run(self, name: str, work: Callable, estimate: int | None = None):
        can_reset = _reset_peak()
        begin = time.perf_counter()
        result = work()
        entry = {"seconds": round(time.perf_counter() - begin, 3), "peak_bytes": _peak_bytes()}
        entry["peak_is_of"] = "this stage" if can_reset else "all stages so far"
        if estimate is not None:
            entry["estimated_peak_bytes"] = estimate
        self.report[name] = entry
        print(f"{name}: {entry['seconds']} s, {entry['peak_bytes'] / 2**30:.2f} GiB", file=sys.stderr)
        return result


def _reset_peak() -> bool:
    """Linux forgets this process's peak when asked to."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def transformer_stages(stages: Stages, geometry, config, latent_size, args, found) -> None:
    """Build, start a stream, denoise one chunk for one step, commit it."""
    import torch

    from streamgen import Engine, SeededNoise
    from streamgen.device import resolve_dtype
    from streamgen.models.transformer import CausalWanTransformer3DModel

    net = geometry.transformer
    build = lambda: CausalWanTransformer3DModel(**net.arguments())
    weights = found.runtime + found.transformers
    model = stages.run("build", lambda: random_model(build, resolve_dtype(args.dtype)), weights)
    engine = Engine(model, config)
    text = torch.randn(1, net.text_len, net.text_dim, generator=torch.Generator().manual_seed(1))
    kept = weights + found.cache + found.text_keys
    start = lambda: engine.start(text, SeededNoise(0), latent_size=latent_size)
    rollout = stages.run("start", start, kept)
    chunk = config.chunk.latent_frames
    room = config.cache.window - chunk
    history = room if args.history is None else min(args.history, room)
    history -= history % chunk
    if history:  # these frames count as committed; their keys and values are zeros
        rollout.policy.commit(range(history))
        rollout.next_chunk = rollout.next_entry = history // chunk
        rollout.next_tick = sum(engine.steps(k) for k in range(history // chunk))
    peak = kept + found.tables + max(found.forward, found.rotation)
    latents = stages.run("denoise", rollout.advance, peak).latents
    stages.run("commit", rollout.commit, peak)
    if not latents.isfinite().all():
        raise RuntimeError("the random transformer gave numbers that are not finite: its seconds may mislead")
    stages.report["denoise"]["history_frames"] = history


def codec_stages(stages: Stages, geometry, latent_size, args, found) -> None:
    """Build, decode the first latent frame of a stream (1 picture), then one more (4 pictures)."""
    import torch
    from diffusers import AutoencoderKLWan

    from streamgen.device import resolve_dtype
    from streamgen.models.codecs import WanCodec

    codec = geometry.codec
    build = lambda: AutoencoderKLWan(base_dim=codec.base_dim, z_dim=codec.latent_channels, dim_mult=codec.dim_mult)
    weights = found.runtime + found.codec
    model = stages.run("build_codec", lambda: random_model(build, resolve_dtype(args.codec_dtype)), weights)
    stream = WanCodec(model)
    latent = torch.randn(1, codec.latent_channels, 1, *latent_size, generator=torch.Generator().manual_seed(2))
    peak = weights + found.codec_state + found.decoding
    _, state = stages.run("decode_first", lambda: stream.decode(latent, None), peak)
    frames, _ = stages.run("decode", lambda: stream.decode(latent, state), peak)
    stages.report["decode"]["frames"] = frames.shape[2]


def extrapolated(stages: dict[str, dict], chunk: int, steps: int, ratio: int, fps: float) -> dict:
    """What one chunk of a stream would take: nobody ran it."""
    network = steps * stages["denoise"]["seconds"] + stages["commit"]["seconds"]
    decoding = chunk * stages["decode"]["seconds"]
    frames = chunk * ratio
    return {
        "extrapolated": True,
        "steps": steps,
        "seconds_per_chunk": round(network + decoding, 3),
        "fps": round(frames / (network + decoding), 4),
        "fps_without_decoding": round(frames / network, 4),
        "times_real_time": round(frames / (network + decoding) / fps, 5),
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    import torch

    import streamgen
    from streamgen.config import load_preset
    from streamgen.memory import estimate

    torch.set_num_threads(args.threads)
    geometry, height, width = shapes(args)
    whole = load_preset("self-forcing", [f"cache.window={args.window}"])
    config = replace(whole, ladder=replace(whole.ladder, timesteps=[1000.0]))  # one step: one denoise call per chunk
    found = estimate(geometry, config, height, width, dtype=args.dtype)
    one_latent = replace(config, chunk=replace(config.chunk, latent_frames=1))  # the codec decodes one at a time here
    decoding = estimate(geometry, one_latent, height, width, dtype=args.codec_dtype)
    latent_size, stages = geometry.latent_size(height, width), Stages()
    with torch.no_grad():
        transformer_stages(stages, geometry, config, latent_size, args, found)
        gc.collect()
        codec_stages(stages, geometry, latent_size, args, decoding)
    report = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "streamgen": streamgen.__version__},
        "setting": {**vars(args), "height": height, "width": width, "weights": "random"},
        "parameters": {"transformer": geometry.transformer.parameters, "codec": geometry.codec.parameters},
        "stages": stages.report,
        "estimated_bytes": {"engine": found.parts(), "codec": decoding.parts()},
        "stream": extrapolated(
            stages.report, config.chunk.latent_frames, len(whole.ladder.timesteps), geometry.codec.temporal_ratio, 16
        ),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
