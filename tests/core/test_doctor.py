"""`streamgen doctor --model`: the memory a model takes, told before anything is loaded."""

from __future__ import annotations

import json

import pytest
import torch

from streamgen.cli import main
from streamgen.config import load_preset
from streamgen.hub import model_config
from streamgen.memory import device_memory, estimate


@pytest.fixture
def doctor(capsys, monkeypatch):
    """Run it; loading weights is an error. (exit code, stdout, stderr)."""
    monkeypatch.setattr("streamgen.hub.load", None)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)

    def run(*argv: object) -> tuple[int, str, str]:
        code = main(["doctor", *map(str, argv)])
        return (code, *capsys.readouterr())

    return run


def test_json_holds_the_estimate_of_the_configuration_asked_for(doctor):
    argv = ["--model", "wan-1.3b", "--preset", "self-forcing", "--height", 480, "--width", 832, "--dtype", "bf16"]
    code, out, err = doctor(*argv, "--memory", 80, "--json", "cache.window=9")
    report = json.loads(out)
    config = load_preset("self-forcing", ["cache.window=9"])
    found = estimate(model_config("wan-1.3b").geometry, config, 480, 832, dtype="bf16", device="cuda")
    assert (code, err) == (0, "")
    assert report["bytes"] == found.parts() and report["peak"] == found.peak
    assert report["device"] == {"name": "cuda", "total": 80 * 2**30, "free": 80 * 2**30}
    assert (report["fits"], report["ways"], report["window"]) == (True, [], 9)
    assert report["geometry"]["transformer"]["num_layers"] == 30


def test_text_says_that_it_does_not_fit_and_what_would(doctor):
    code, out, _ = doctor("--model", "wan-1.3b", "--memory", 16, "cache.window=9")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("wan-1.3b with self-forcing at 480×832 in bfloat16: a window of 9 latent frames")
    assert any("keys and values" in line and "3.62 GiB" in line for line in lines)
    assert "cuda: 16.00 GiB free of 16.00 GiB: it does not fit" in lines
    first = lines[lines.index("it fits with, least costly first") + 1]
    assert "offload=text: the text encoder stays in RAM + tile=32" in first and float(first.split()[0]) <= 16
    assert "and no smaller setting" in doctor("--model", "wan-14b", "--memory", 4)[1]


def test_every_frame_kept_grows_with_the_length(doctor):
    def cache(frames):
        return json.loads(doctor("--model", "wan-1.3b", "--json", "--num-frames", frames)[1])["bytes"]["cache"]

    short, clip, long = cache(33), cache(81), cache(161)  # 9, 21, 41 -> 42 latent frames, and 3 in flight
    assert (short * 24, long * 24) == (clip * 12, clip * 45)


def test_the_embedded_model_fits_here_on_the_chosen_device(doctor):
    code, out, _ = doctor("--model", "sprites", "--device", "cpu")
    total, _ = device_memory(torch.device("cpu"))
    assert code == 0 and "text encoder released" in out and f"of {total / 2**30:.2f} GiB: it fits" in out
    report = json.loads(doctor("--model", "sprites", "--device", "cpu", "--json", "--dtype", "fp32")[1])
    assert report["setting"]["height"] == 128 and report["bytes"]["transformers"] < 2**28


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "wan-13b"], ("'wan-13b'", "did you mean 'wan-1.3b'", "sprites")),
        (["--preset", "self-forcing"], ("--preset", "--model")),
        (["cache.window=9"], ("cache.window=9", "--model")),
        (["--model", "wan-1.3b", "--height", "481"], ("481x832", "480x832")),
        (["--model", "wan-1.3b", "--codec", "tini"], ("codec", "did you mean 'tiny'")),
        (["--model", "sprites", "--codec", "tiny"], ("codec=tiny", "streaming")),
        (["--model", "wan-1.3b", "--preset", "self-forcin"], ("did you mean 'self-forcing'",)),
        (["--model", "wan-1.3b", "--memory", "8", "--device", "cpu"], ("--memory", "--device")),
        (["--model", "wan-1.3b", "--dtype", "int3"], ("unknown dtype 'int3'",)),
        (["--model", "wan-1.3b", "cache.windw=9"], ("did you mean 'cache.window'",)),
    ],
)
def test_bad_input_is_one_line_that_names_the_culprit(doctor, argv, words):
    code, out, err = doctor(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert all(word in err for word in words), err
