"""Speed and memory of a stream, as one JSON: run it on a quiet machine.

    python benchmarks/stream.py --model sprites --seconds 10 > benchmarks/results/stream-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REAL_TIME = 16  # frames per second of the world


def python_seconds(code: str) -> float:
    """Wall time of a fresh interpreter running `code`."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin


def import_seconds() -> float:
    """What `import streamgen` costs beyond `import torch`."""
    both = statistics.median(python_seconds("import torch, streamgen") for _ in range(3))
    return both - statistics.median(python_seconds("import torch") for _ in range(3))


class Timed:
    """Counts the seconds spent inside the transformer's own forwards."""

    def __init__(self, transformer) -> None:
        self.transformer, self.seconds, self.calls = transformer, 0.0, 0

    def __getattr__(self, name):
        return getattr(self.transformer, name)

    def __call__(self, *args, **kwargs):
        begin = time.perf_counter()
        try:
            return self.transformer(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - begin
            self.calls += 1


def steady(pipe, prompt: str, frames: int, options: dict) -> dict:
    """Frames per second with decoding and mp4 writing, per-stage shares, and the engine's overhead."""
    from streamgen.media import open_sink

    stages: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, pipe.stream(prompt, seed=0, **options) as stream:
        timed = Timed(stream.engine.transformer)
        stream.engine.forward.experts = (timed,)
        with open_sink(Path(folder) / "clip.mp4", fps=REAL_TIME) as sink:
            for _ in range(9):  # until the window is full: warm-up, not counted
                sink.write(stream.next().frames)
            timed.seconds, timed.calls, count, begin = 0.0, 0, 0, time.perf_counter()
            while count < frames:
                chunk = stream.next()
                mark = time.perf_counter()
                sink.write(chunk.frames)
                count += len(chunk.frames)
                for name, value in {**chunk.timings, "write": time.perf_counter() - mark}.items():
                    stages[name] = stages.get(name, 0.0) + value
            total = time.perf_counter() - begin
    network = stages["denoise"] + stages["commit"]
    return {
        "frames": count,
        "fps": round(count / total, 1),
        "times_real_time": round(count / total / REAL_TIME, 2),
        "share": {name: round(value / total, 3) for name, value in stages.items()},
        "milliseconds_per_call": round(1000 * timed.seconds / timed.calls, 2),
        "engine_overhead": round(network / timed.seconds - 1, 4),
    }


def first_frame(pipe, prompt: str, options: dict) -> float:
    """Seconds from the request to the first chunk, text included; the median of five."""
    times = []
    for seed in range(5):
        begin = time.perf_counter()
        with pipe.stream(prompt, seed=seed, **options) as stream:
            stream.next()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def peak_megabytes(args, frames: int) -> float:
    """Peak resident memory of a render of `frames` frames in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import resource, sys; from streamgen.cli import main; "
            f"code = main(['render', '--model', {args.model!r}, '--prompt', {args.prompt!r}, '--num-frames', "
            f"'{frames}', '--steps', '2', '-o', {str(Path(folder) / 'clip.mp4')!r}, '--quiet']); "
            "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
        )
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return int(out.split("peak")[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="sprites")
    parser.add_argument("--preset", default=None)
    parser.add_argument("--prompt", default="a red circle bouncing on a navy background")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guidance-scale", type=float, default=None)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory", action="store_true", help="also compare peaks of 200 and 2000 frames (minutes)")
    args = parser.parse_args()

    import torch

    import streamgen

    torch.set_num_threads(args.threads)
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    begin = time.perf_counter()
    pipe = streamgen.load(args.model, preset=args.preset, dtype=args.dtype)
    loaded = time.perf_counter() - begin
    report = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "streamgen": streamgen.__version__},
        "setting": {**vars(args), "dtype": str(pipe.transformer.dtype)},
        "import_seconds_beyond_torch": round(import_seconds(), 2),
        "load_seconds": round(loaded, 2),
        "first_frame_seconds": round(first_frame(pipe, args.prompt, options), 3),
        "steady": steady(pipe, args.prompt, int(args.seconds * REAL_TIME), options),
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    if args.memory:
        short, long = peak_megabytes(args, 200), peak_megabytes(args, 2000)
        report["memory"] = {"200_frames": short, "2000_frames": long, "ratio": round(long / short, 4)}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
