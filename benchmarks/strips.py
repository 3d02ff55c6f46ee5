"""One strip per preset: the same prompts and the same noise, six seconds with a new prompt in the middle.

    python benchmarks/strips.py                                   # docs/strips.png
    python benchmarks/strips.py --presets default,magi --seconds 2 -o strips.png
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# coupling -> the pattern of the model's training batches that it meets, as `streamgen.distill.flow` names them
PATTERNS = {
    "solo": ("clean", "clean history"),
    "joint": ("window", "joint windows"),
    "held": ("window", "joint windows"),
    "rows": ("matched", "level-matched history"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="sprites")
    parser.add_argument("--presets", help="names with commas between them; if not given, all")
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--columns", type=int, default=12, help="frames of a strip")
    parser.add_argument("--shrink", type=int, default=2, help="pixels per side that become one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", default="a red circle bouncing on a navy background")
    parser.add_argument("--then", default="a green circle bouncing on a navy background")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/strips.png"))
    args = parser.parse_args()

    import torch

    import streamgen
    from streamgen.config import available
    from streamgen.hub import stream_config
    from streamgen.media import contact_sheet, save_image

    torch.set_num_threads(args.threads)
    names = args.presets.split(",") if args.presets else available("presets")
    pipe = streamgen.load(args.model, dtype=args.dtype)
    clips, labels = [], []
    for name in names:
        pipe.stream_config = stream_config(name, pipe.settings)
        clips.append(shrunk(strip(pipe, args), args.shrink))
        labels.append(f"{name} · {trained(pipe.stream_config)}")
    print(save_image(args.output, contact_sheet(clips, args.columns, labels)))


def strip(pipe, args):
    """A stream's frames, uint8 [F, H, W, 3]; the second prompt takes effect in the preset's own way."""
    import numpy as np

    frames = round(args.seconds * pipe.settings.fps)
    parts, shown = [], 0
    with pipe.stream(args.prompt, seed=args.seed, num_frames=frames) as session:
        for chunk in session:
            before, shown = shown, shown + len(chunk.frames)
            parts.append(chunk.frames)
            if before < frames / 2 <= shown < frames:
                session.set_prompt(args.then)
    return np.concatenate(parts)[:frames]


def shrunk(clip, by: int):
    """Means over squares of `by` pixels per side."""
    count, height, width, _ = clip.shape
    cells = clip[:, : height // by * by, : width // by * by].reshape(count, height // by, by, width // by, by, 3)
    return cells.mean((2, 4)).round().astype(clip.dtype)


def trained(config) -> str:
    """What the embedded model was trained for of what a configuration asks of it."""
    import yaml

    from streamgen.config import config_root

    recipe = yaml.safe_load((config_root() / "distill" / "sprites" / "causal.yaml").read_text())
    shares, coupling = recipe["flow"]["patterns"], config.schedule.coupling
    if coupling not in PATTERNS:
        return f"not trained for {coupling}, not distilled"
    pattern, words = PATTERNS[coupling]
    return f"trained: {words} ({100 * shares[pattern]:.0f} % of its batches), not distilled"


if __name__ == "__main__":
    main()
