"""The embedded model against its world's oracle, as one JSON, with a contact sheet.

    python benchmarks/quality.py --sheet docs/sprites-val.png > benchmarks/results/quality.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="sprites")
    parser.add_argument("--preset", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guidance-scale", type=float, default=None)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--side", default="val", choices=("val", "test"), help="test only for a published number")
    parser.add_argument("--two-actors", type=float, default=0.3, help="share of prompts with two actors")
    parser.add_argument("--suites", default="specified,underspecified,switch")
    parser.add_argument("--sheet", type=Path, help="write a picture: one row of frames per prompt")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()

    import numpy as np
    import torch

    import streamgen
    from streamgen.evaluation.sprites import generate, measure, measure_switch, specified, underspecified
    from streamgen.media import contact_sheet, save_image

    torch.set_num_threads(args.threads)
    pipe = streamgen.load(args.model, preset=args.preset, dtype=args.dtype)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    wanted, begin, report = args.suites.split(","), time.perf_counter(), {}
    clips: list[np.ndarray] = []
    if "specified" in wanted:
        suite = specified(args.prompts, args.side, two_actors=args.two_actors)
        found = generate(pipe, suite.prompts, args.frames, **options)
        report["specified"] = measure(found, suite, keep=clips.append)
        if args.sheet:
            rows = [clip[:: max(1, args.frames // 9)] for clip in clips[:24]]
            labels = suite.prompts[:24]
            save_image(args.sheet, contact_sheet([np.concatenate(list(r), 1)[None] for r in rows], 1, labels))
    if "underspecified" in wanted:
        suite = underspecified(args.prompts // 2, args.side)
        report["underspecified"] = measure(generate(pipe, suite.prompts, args.frames, **options), suite)
    if "switch" in wanted:
        report["switch"] = measure_switch(pipe, args.prompts // 4, **options)
    setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    versions = {"streamgen": streamgen.__version__, "torch": torch.__version__}
    seconds = round(time.perf_counter() - begin)
    print(json.dumps({"setting": setting, "versions": versions, "seconds": seconds, **report}, indent=1))


if __name__ == "__main__":
    main()
