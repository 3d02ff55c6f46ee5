"""The oracle on the world's own clips, where every answer is known; and on the same clips after the VAE, as one JSON.

    python benchmarks/oracle.py --vae --jobs 2 --sheet runs/oracle.png > benchmarks/results/oracle.json

Clip `i` follows from the seed and `i` alone: its scene from one side of the split after the other, two actors in 30 %.
What the oracle gets wrong here is the ceiling of every number that it gives about a model.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

SIDES = ("train", "val", "test")
BATCH = 8  # clips encoded together, and handed to a process together
TOLD = 100  # failures that are listed


def scene_of(index: int, seed: int):
    """(scene, seed of its rendering) of a clip."""
    from streamgen.worlds.sprites.language import sample_scene

    rng = np.random.default_rng([seed, 23, index])
    return sample_scene(rng, SIDES[index % len(SIDES)], 0.3), int(rng.integers(2**31))


def clip_of(index: int, seed: int, frames: int) -> np.ndarray:
    from streamgen.worlds.sprites import render

    return render(scene_of(index, seed)[0], frames, scene_of(index, seed)[1])


@cache
def codec():
    """The embedded VAE of this process."""
    from streamgen.hub import assets_root
    from streamgen.models.vae import StreamingVAE

    return StreamingVAE.from_pretrained(assets_root() / "sprites" / "vae").eval()


def round_trip(clips: np.ndarray) -> np.ndarray:
    """Encoded and decoded: uint8 [B, F, H, W, 3] -> the same."""
    import torch

    with torch.inference_mode():
        pixels = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1  # [B, 3, F, H, W]
        decoded = codec().decode(codec().encode(pixels)[0])[0]
        return ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def look(indices: list[int], seed: int, frames: int, vae: bool) -> list[dict]:
    """What the oracle says about some clips, and how much of that is right."""
    from streamgen.evaluation.confusions import pairs, said
    from streamgen.evaluation.suites.readings import attributes
    from streamgen.worlds.sprites.language import describe
    from streamgen.worlds.sprites.oracle import read

    clips = np.stack([clip_of(index, seed, frames) for index in indices])
    clips = round_trip(clips) if vae else clips
    found = []
    for index, clip in zip(indices, clips, strict=True):
        scene = scene_of(index, seed)[0]
        reading = read(clip, actors=len(scene.actors))
        values, part = attributes(reading, scene), "one" if len(scene.actors) == 1 else "two"
        values["unchanged"] = float(reading.identity_changes == 0)
        found.append({"index": index, "prompt": describe(scene), "part": part, "values": values,
                      "said": said(reading), "pairs": pairs(reading, scene)})  # fmt: skip
    return found


def summary(found: list[dict]) -> dict:
    """Accuracy per attribute, with one actor, two, and all; what was confused; what failed."""
    from streamgen.evaluation.confusions import count

    report: dict = {}
    for name, parts in {"one": ("one",), "two": ("two",), "all": ("one", "two")}.items():
        values = [clip["values"] for clip in found if clip["part"] in parts]
        means = {key: round(float(np.mean([v[key] for v in values])), 5) for key in (values[0] if values else ())}
        report[name] = {**means, "n": len(values)}
    wrong = failures(found)
    told = [{key: clip[key] for key in ("index", "prompt", "said")} for clip in wrong[:TOLD]]
    return {**report, "confusions": count(clip["pairs"] for clip in found), "failed": len(wrong), "failures": told}


def failures(found: list[dict]) -> list[dict]:
    return [clip for clip in found if min(clip["values"].values()) < 1]


def draw_sheet(path: Path, found: list[dict], args: argparse.Namespace, vae: bool) -> None:
    """Failures, ten frames each; nothing is written if there are none."""
    from streamgen.media import contact_sheet, save_image

    wrong = failures(found)[: args.sheet_clips]
    if wrong:
        clips = np.stack([clip_of(clip["index"], args.seed, args.frames) for clip in wrong])
        labels = [f"{clip['index']}: {clip['prompt']}   ->   {clip['said']}" for clip in wrong]
        save_image(path, contact_sheet(list(round_trip(clips) if vae else clips), 10, labels))


def start(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", action="store_true", help="also after encoding and decoding by the embedded VAE")
    parser.add_argument("--vae-clips", type=int, help="the first so many of them; if not given, all")
    parser.add_argument("--sheet", type=Path, help="a picture of failures; those after the VAE beside it, as NAME-vae")
    parser.add_argument("--sheet-clips", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    args = parser.parse_args()

    from tqdm import tqdm

    import streamgen

    begin, report = time.perf_counter(), {}
    counts = {"truth": args.clips}
    if args.vae:
        counts["vae"] = args.clips if args.vae_clips is None else min(args.vae_clips, args.clips)
    pool, bar = ProcessPoolExecutor(args.jobs, get_context("spawn"), start, (1,)), tqdm(total=sum(counts.values()))
    with pool, bar:
        for name, total in counts.items():
            batches = [list(range(first, min(first + BATCH, total))) for first in range(0, total, BATCH)]
            waiting = [pool.submit(look, batch, args.seed, args.frames, name == "vae") for batch in batches]
            found = []
            for future, batch in zip(waiting, batches, strict=True):
                found += future.result()
                bar.update(len(batch))
            report[name] = summary(found)
            if args.sheet:
                path = args.sheet if name == "truth" else args.sheet.with_stem(f"{args.sheet.stem}-vae")
                draw_sheet(path, found, args, name == "vae")
    setting = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    seconds = round(time.perf_counter() - begin)
    print(json.dumps({"setting": setting, "version": streamgen.__version__, "seconds": seconds, **report}, indent=1))


if __name__ == "__main__":
    main()
