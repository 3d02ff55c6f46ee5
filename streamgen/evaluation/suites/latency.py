"""`latency`: how fast one stream is on this machine, with nothing beside it; three streams, one after the other."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from streamgen.evaluation.suites.base import Options, Suite, Values
from streamgen.worlds.sprites.renderer import FPS, SIZE

STREAMS = 3
WARM = 9  # chunks, until the window is full
STEADY = 10 * FPS  # frames that are timed
LENGTH = 30 * FPS  # of a stream: warm, steady, and a change of the prompt for all that are in flight
PROMPT, NEXT = "a red circle bouncing on a navy background", "a blue circle bouncing on a navy background"


def measure(pipe, options: Options) -> list[Values]:
    """One dict per stream."""
    return [_stream(pipe, options.seed + i) for i in range(STREAMS)]


def _stream(pipe, seed: int) -> Values:
    height, width = pipe.settings.height or SIZE, pipe.settings.width or SIZE
    device = pipe.transformer.device
    resettable, begin = _reset_peak(device), time.perf_counter()
    with pipe.stream(PROMPT, height=height, width=width, num_frames=LENGTH, seed=seed) as stream:
        _pixels(stream)
        first = time.perf_counter() - begin
        for _ in range(WARM - 1):
            _pixels(stream)
        gaps, frames, stages = [], 0, {}
        while frames < STEADY:
            mark = time.perf_counter()
            chunk, count = _pixels(stream)
            gaps.append(time.perf_counter() - mark)
            frames += count
            for name, seconds in chunk.timings.items():
                stages[name] = stages.get(name, 0.0) + seconds
        begin = time.perf_counter()
        change = stream.set_prompt(NEXT)
        while _pixels(stream)[0].epoch < change.epoch:
            pass
        switch = time.perf_counter() - begin
    p50, p99 = np.percentile(gaps, [50, 99])
    return {
        "fps": frames / sum(gaps),
        "first_frame_seconds": first,
        "chunk_p50_seconds": float(p50),
        "chunk_p99_seconds": float(p99),
        "switch_seconds": switch,
        "peak_megabytes": _peak(device) if resettable else None,
        **{f"{name}_seconds_per_chunk": seconds / len(gaps) for name, seconds in stages.items()},
    }


def _pixels(stream):
    """The next chunk, once its pixels are on the host, and how many frames it has."""
    chunk = stream.next()
    return chunk, len(chunk.frames)


def _reset_peak(device: torch.device) -> bool:
    """Forget the highest memory use so far; whether that is possible here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak(device: torch.device) -> float | None:
    """Megabytes: of the GPU if the stream is there, else resident ones of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def latency() -> Suite:
    return Suite(
        "latency",
        "one stream on this machine: frames per second once the window is full, seconds from the request to the first "
        "frame, between chunks (median and 99th percentile), from a new prompt to the first chunk that follows it",
        ("fps", "first_frame_seconds", "chunk_p50_seconds", "chunk_p99_seconds", "switch_seconds", "peak_megabytes"),
        measure=measure,
    )
