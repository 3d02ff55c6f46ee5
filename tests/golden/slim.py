"""Make the files of this folder from the originals: shared weights once, and only the tensors that tests read.

    python tests/golden/slim.py FOLDER

The originals (about 35 MB, see README.md here) are needed only to run this again; the tests read what it wrote. Of a
trace, what each denoising call saw is kept: [frames of the call, first and end], [position of each query frame], and
runs of keys [first frame, first position, frames], null where keys are blends.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

NAMES = (
    "self_forcing_full", "self_forcing_window9_sink3", "rolling_forcing_long", "reward_forcing_ema_sink_alpha09",
    "longlive_prompt_switch", "diagonal_distill", "anchor_forcing_switch", "memflow_bank", "streamdiffusionv2_stream",
)  # fmt: skip
WEIGHTS = "self_forcing_weights"
KEPT = {
    f"io.{key}"
    for key in (
        "noise", "renoise", "context", "context_1", "latents", "timesteps", "first_velocity", "clean_latents",
        "noise_scale", "first_step_timestep", "video_for_noise_scale",
    )
}  # fmt: skip


def slim(source: Path, target: Path) -> None:
    """Write `WEIGHTS` and one file of inputs and outputs per name in `target`."""
    shared = None
    for name in NAMES:
        with safe_open(source / f"{name}.safetensors", "pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys() if key.startswith("model.")}
            kept = {key: file.get_tensor(key) for key in file.keys() if key in KEPT}
            metadata = file.metadata()
        if shared is None:
            shared = weights
            save_file(weights, target / f"{WEIGHTS}.safetensors")
        if weights.keys() != shared.keys() or not all(torch.equal(weights[key], shared[key]) for key in shared):
            raise SystemExit(f"{name} has weights of its own: store them per file")
        config = json.loads(metadata["config"])
        config.pop("substitutions", None)
        calls = [call for call in json.loads(metadata.get("trace", "[]")) if call["kind"] == "denoise"]
        seen = [row for call in calls for row in rows(call, config, len(calls))]
        text = {"config": json.dumps(config), "seen": json.dumps(seen)}
        save_file(kept, target / f"{name}.safetensors", metadata=text)


def rows(call: dict, config: dict, calls: int) -> list:
    """What each row of a call saw; rows of a batch that hold nothing yet, or what only drains it, are left out."""
    if call["fn"] != "inference_stream":
        return [[call["frames"], call["q_pos"], [run[1:] for run in call["keys"]]]]
    tick = call["i"] - (calls - config["num_stream_calls"])
    parts = enumerate(zip(call["frames"], call["q_pos"], call["keys"], strict=True))
    real = ((row, part) for row, part in parts if 0 <= tick - row < config["num_chunks"] - 1)
    return [[frames, at, [run[2:] for run in keys]] for _, (frames, at, keys) in real]


if __name__ == "__main__":
    slim(Path(sys.argv[1]), Path(__file__).parent)
