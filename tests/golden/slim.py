"""Make the files of this folder from the originals: shared weights once, and only the tensors that tests read.

    python tests/golden/slim.py FOLDER

The originals (about 35 MB, see README.md here) are needed only to run this again; the tests read what it wrote.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

NAMES = ("self_forcing_full", "self_forcing_window9_sink3")
WEIGHTS = "self_forcing_weights"
KEPT = ("io.noise", "io.renoise", "io.context", "io.latents", "io.timesteps", "io.first_velocity")


def slim(source: Path, target: Path) -> None:
    """Write `WEIGHTS` and one file of inputs and outputs per name in `target`."""
    shared = None
    for name in NAMES:
        with safe_open(source / f"{name}.safetensors", "pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys() if key.startswith("model.")}
            kept = {key: file.get_tensor(key) for key in KEPT}
            config = file.metadata()["config"]
        if shared is None:
            shared = weights
            save_file(weights, target / f"{WEIGHTS}.safetensors")
        if weights.keys() != shared.keys() or not all(torch.equal(weights[key], shared[key]) for key in shared):
            raise SystemExit(f"{name} has weights of its own: store them per file")
        save_file(kept, target / f"{name}.safetensors", metadata={"config": json.dumps(json.loads(config))})


if __name__ == "__main__":
    slim(Path(sys.argv[1]), Path(__file__).parent)
