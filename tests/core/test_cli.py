"""The command line: what is right gives a file, what is wrong gives one line and the right exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import streamgen
from streamgen.cli import COMMANDS, main
from streamgen.cli.timeline import Entry, unseen
from streamgen.config import available
from streamgen.media import MediaError, read_video, video_info

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle bouncing"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A pipeline folder with random weights: 2 layers, 2 heads, a VAE of width 8, prompts of at most 8 tokens."""
    from streamgen.models.text import TextEncoder, build_tokenizer
    from streamgen.models.transformer import CausalWanTransformer3DModel
    from streamgen.models.vae import StreamingVAE
    from streamgen.pipelines import StreamingVideoPipeline

    torch.manual_seed(0)
    tokenizer = build_tokenizer(["a", "red", "blue", "circle", "star", "bouncing"], 8)
    text = TextEncoder(len(tokenizer), dim=16, num_layers=1, num_heads=2, max_length=8)
    size = dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=2)
    transformer = CausalWanTransformer3DModel(in_channels=4, out_channels=4, text_dim=16, text_len=8, **size)
    folder = tmp_path_factory.mktemp("tiny")
    vae = StreamingVAE(latent_channels=4, widths=(8, 8, 8))
    StreamingVideoPipeline(tokenizer, text.eval(), transformer.eval(), vae.eval()).save_pretrained(folder)
    return folder


@pytest.fixture
def render(tiny, tmp_path, capsys, monkeypatch):
    """Run `render` in an empty folder on the tiny model: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object, model: bool = True) -> tuple[int, str, str]:
        head = ["--model", tiny, "--height", 32, "--width", 64, "--steps", 1] if model else []
        code = main(["render", *map(str, [*head, *argv])])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(render):
    """Run `render`; it must refuse with `code` and one line holding all of `words`, and write nothing."""

    def run(*argv: object, words: tuple[str, ...], code: int = 2) -> None:
        before = set(Path().rglob("*"))
        got, out, err = render(*argv)
        assert (got, out, err.count("\n")) == (code, "", 1), err
        assert err.startswith("streamgen: error: ") and err.endswith("\n")
        assert all(word in err for word in words), err
        assert set(Path().rglob("*")) == before

    return run


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", "x", "--preset", "self-forcin"], ("'self-forcin'", "did you mean 'self-forcing'")),
        (["--prompt", "x", "cache.windw=9"], ("'cache.windw'", "did you mean 'cache.window'")),
        (["--prompt", "x", "cache.window=many"], ("cache.window", "many")),
        (["--prompt", "x", "cache.window=["], ("override", "YAML")),
        (["--prompt", "x", "cache.window=5", "cache.sink=3"], ("cache.window=5", "floor 6")),
        (["--prompt", "x", "ladder.shift=-1"], ("ladder.shift", "-1")),
        (["--prompt", " "], ("--prompt", "empty")),
        ([], ("--prompt", "--timeline")),
        (["--prompt", "x", "--timeline", "y"], ("--timeline", "--prompt")),
        (["a", "red", "circle"], ("'a red circle'", "did you forget --prompt")),
        (["--promt", "x"], ("'--promt'", "did you mean '--prompt'")),
        (["--prompt", "x", "--num-frames", "0"], ("--num-frames", "0")),
        (["--prompt", "x", "--seconds", "-1"], ("--seconds", "-1")),
        (["--prompt", "x", "--seconds", "nan"], ("--seconds", "nan")),
        (["--prompt", "x", "--seconds", "1", "--num-frames", "9"], ("--seconds", "--num-frames")),
        (["--prompt", "x", "--seed", "1.5"], ("--seed", "1.5")),
        (["--prompt", "x", "--height", "0"], ("--height", "0")),
        (["--prompt", "x", "--steps", "none"], ("--steps", "none")),
        (["--prompt", "x", "--device", "toaster"], ("toaster",)),
        (["--prompt", "x", "--checkpoint", "absent.pt"], ("absent.pt", "does not exist")),
        (["--prompt", "x", "-o", "absent/clip.mp4"], ("absent/clip.mp4", "mkdir")),
        (["--prompt", "x", "-o", "clip.avi"], (".avi", ".mp4")),
        (["--prompt-file", "absent.txt"], ("absent.txt",)),
    ],
)
def test_bad_input_is_one_line_that_names_the_culprit(refused, argv, words):
    refused(*argv, words=words)


def test_a_missing_model_is_named(refused):
    refused("--prompt", "x", "--model", "absent", words=("'absent'", "model_index.json"))


@pytest.mark.parametrize("argv", [["rendr"], ["--promt"]])
def test_an_unknown_command_lists_the_commands(capsys, argv):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert argv[0] in err and all(name in err for name in COMMANDS) and err.count("\n") == 1


def test_bad_checkpoints_are_one_line(refused, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save({"generator": {"a": torch.zeros(3)}}, folder / "wrong.pt")
    (folder / "cut.pt").write_bytes((folder / "wrong.pt").read_bytes()[:200])
    torch.save({"model": {"a": torch.zeros(3)}, "run": subprocess.run}, folder / "code.pt")
    (folder / "cut.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    words = {"wrong.pt": "not a Wan", "code.pt": "code", "cut.pt": "truncated", "cut.safetensors": "truncated"}
    for name, word in words.items():
        refused("-q", "--prompt", PROMPT, "--checkpoint", folder / name, words=(name, word))


def test_an_absent_device_is_exit_3(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("--prompt", "x", "--device", "cuda", words=("'cuda'", "not available"), code=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- {at: 0, prompt: a}\n- {at: 2, prompt: b}\n- {at: 1, prompt: c}", ("backwards", "entry 3", "1 s", "2 s")),
        ("- {at: 0, prompt: a}\n- {at: 7, prompt: b}", ("entry 2", "past the end", "80 frames")),
        ("- {at: 1, prompt: a}", ("start at 0",)),
        ("- {at: 0, prompt: ''}", ("entry 1", "prompt")),
        ("- {at: 0, prompt: yes}", ("entry 1", "True")),
        ("- {at: 0, promt: a}", ("'promt'", "did you mean 'prompt'")),
        ("- {at: 0, prompt: a}\n- {at: 1, prompt: b, mode: recash}", ("recash", "did you mean 'recache'")),
        ("- {at: 0, prompt: a}\n- {frame: 20, prompt: b, blend: 1.5}", ("blend", "1.5")),
        ("prompt: a", ("list",)),
        ("- {at: 0", ("YAML",)),
    ],
)
def test_a_timeline_is_refused_before_anything_loads(refused, tmp_path, monkeypatch, text, words):
    (tmp_path / "story.yaml").write_text(text)
    monkeypatch.setattr("streamgen.hub.load", None)
    refused("--timeline", "story.yaml", words=words)


def test_unseen_prompts_are_found():
    at = [Entry(frame, "x") for frame in (0, 8, 9, 30)]
    # chunks of 3 latent frames begin at pixel frames 0, 9, 21, 33: two entries fall on 9, the last after 21
    assert unseen(at, 33, 3) == [at[1], at[3]]
    assert unseen(at, 34, 3) == [at[1]]
    # after a reset at 9 the next chunk begins at 18, then 30
    assert unseen([at[0], Entry(9, "y", "reset"), at[3]], 31, 3) == []


# ---------------------------------------------------------------------------------------------- rendering
def test_render_writes_exactly_the_frames_asked_for(render):
    code, out, err = render("--prompt", PROMPT, "--num-frames", 23, "-o", "clip.mp4")
    assert (code, out) == (0, "clip.mp4\n") and "23 frames of 64×32" in err
    frames, info = read_video("clip.mp4"), video_info("clip.mp4")
    assert frames.shape == (23, 32, 64, 3) and info.fps == 16


def test_render_to_gif_folder_and_a_name_of_its_own(render):
    assert render("--prompt", PROMPT, "--seconds", 0.5, "-q") == (0, "a-red-circle-bouncing.mp4\n", "")
    assert len(read_video("a-red-circle-bouncing.mp4")) == 8
    for name in ("clip.gif", "frames/"):
        assert render("--prompt", PROMPT, "--num-frames", 5, "-o", name, "-q") == (0, f"{name}\n", "")
        assert read_video(name).shape == (5, 32, 64, 3)


def test_render_is_what_the_library_gives(render, tiny):
    render("--prompt", PROMPT, "--num-frames", 12, "--seed", 7, "-o", "frames/", "cache.window=9", "cache.sink=0")
    steps = ["ladder.timesteps=[1000]", "ladder.warp=true"]
    pipe = streamgen.load(str(tiny), device="cpu", overrides=["cache.window=9", "cache.sink=0", *steps])
    pipe.set_progress_bar_config(disable=True)
    with pipe.stream(PROMPT, seed=7, num_frames=12, height=32, width=64) as stream:
        expected = np.concatenate([chunk.frames for chunk in stream])
    assert np.array_equal(read_video("frames"), expected)


def test_a_timeline_switches_at_the_first_chunk_at_or_after(render, tmp_path, monkeypatch):
    from streamgen.session import StreamSession

    (tmp_path / "story.yaml").write_text(
        f"- {{at: 0, prompt: {PROMPT}}}\n- {{frame: 10, prompt: a blue star, mode: keep}}\n"
        "- {at: 1.75, prompt: a star, blend: 1}"
    )
    calls, original = [], StreamSession.set_prompt

    def spy(self, prompt, mode=None, blend=0):
        calls.append((self.delivered, prompt, mode, blend))
        return original(self, prompt, mode, blend)

    monkeypatch.setattr(StreamSession, "set_prompt", spy)
    assert render("--timeline", "story.yaml", "--seconds", 3, "-o", "clip.mp4")[0] == 0
    assert calls == [(21, "a blue star", "keep", 0), (33, "a star", None, 1)]
    assert len(read_video("clip.mp4")) == 48


def test_what_is_changed_is_said(render):
    code, _, err = render("--prompt", "a red " * 9, "--height", 50, "--num-frames", 3, "-o", "clip.mp4")
    assert code == 0 and "warning: height 50 is not a multiple of 32: using 64" in err
    assert re.search(r"warning: the prompt has 19 tokens, the model reads the first 8", err)
    assert read_video("clip.mp4").shape[1:3] == (64, 64)


def test_print_config_needs_no_weights(render, monkeypatch):
    monkeypatch.setattr("streamgen.hub.load", None)
    code, out, err = render("--print-config", "--preset", "self-forcing", "--steps", 2, "cache.window=9", model=False)
    assert (code, err) == (0, "")
    assert "window: 9" in out and "- 500.0" in out
    from omegaconf import OmegaConf

    assert OmegaConf.create(out).switch.mode == "keep"


def test_a_full_disk_is_one_line_and_exit_1(render, monkeypatch):
    from streamgen.media import FfmpegSink

    def full(self, frame):
        raise MediaError("clip.mp4: No space left on device; what was written before stays and plays")

    monkeypatch.setattr(FfmpegSink, "_put", full)
    code, out, err = render("--prompt", PROMPT, "-q", "-o", "clip.mp4")
    assert (code, out) == (1, "")
    assert err == "streamgen: error: clip.mp4: No space left on device; what was written before stays and plays\n"


def test_ctrl_c_leaves_a_playable_file_and_130(tiny, tmp_path):
    command = [sys.executable, "-m", "streamgen", "render", "--model", tiny, "--prompt", PROMPT, "--seconds", "36000"]
    command += ["--height", "32", "--width", "64", "--steps", "1", "-o", "clip.mp4", "-v"]
    child = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job is started deaf to it
    )  # fmt: skip
    lines = []
    for line in child.stderr:  # one line per chunk, because of -v
        lines.append(line)
        if line.startswith("chunk 3:"):
            break
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=300)
    assert (child.returncode, out) == (130, ""), "".join(lines) + err
    kept = int(re.search(r"interrupted: clip.mp4 keeps the first (\d+) of 576000 frames and plays", err)[1])
    assert kept >= 33 and len(read_video(tmp_path / "clip.mp4")) in (kept, kept + 1)


# ---------------------------------------------------------------------------------------------- other commands
def test_help_is_fast_and_lists_the_commands():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([sys.executable, "-m", "streamgen", "--help"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)
    imported = set(re.findall(r"\| +(\S+)\n", done.stderr))
    assert not imported & {"torch", "diffusers", "transformers", "numpy"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys, name):
    assert main([name, "--help"]) == 0
    assert f"streamgen {name}" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"streamgen {streamgen.__version__}\n"


def test_presets_table_lists_every_preset(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == available("presets")


def test_presets_show_is_the_configuration_and_its_ticks(capsys):
    assert main(["presets", "show", "self-forcing", "--ticks", "5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# self-forcing: Self-Forcing: Bridging") and "window: -1" in out
    rows = [line.split() for line in out.partition("TICK")[2].splitlines()]
    assert rows[:6] == [["0", "1"], *([str(p), str(p), "."] for p in range(3)), ["3", "3*c", "."], ["4", ".", "0"]]
    for argv, word in ((["show", "self-forcin"], "self-forcing"), (["sho"], "presets show")):
        assert main(["presets", *argv]) == 2
        assert word in capsys.readouterr().err


def test_doctor_names_what_is_here_and_how_to_get_the_rest(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "native" in text and "ffmpeg" in text
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["attention"]["native"] == "works" and report["devices"]["cpu"]
    assert all(state["installed"] or "pip install" in state["install"] for state in report["extras"].values())


def test_doctor_knows_the_extras_of_pyproject():
    tomllib = pytest.importorskip("tomllib")
    from streamgen.cli.doctor import EXTRAS

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {name: tuple(re.match(r"[\w-]+", item)[0] for item in items) for name, items in extras.items()}
    assert EXTRAS == {name: parts for name, parts in names.items() if name != "dev"}


# ---------------------------------------------------------------------------------------------- training
class Trainer:
    """Stands for `streamgen.distill.trainer.Trainer`."""

    def __init__(self, folder: Path, fits: bool = True) -> None:
        self.folder, self.fits, self.step, self.resumed = folder, fits, 3, False
        self.checkpoint = folder / "checkpoint.pt"
        self.config = type("Config", (), {"steps": 3})
        self.stopping = False

    def resume(self) -> None:
        self.resumed = True
        if not self.fits:
            raise RuntimeError("Error(s) in loading state_dict:\n\tsize mismatch")

    def run(self, quiet: bool) -> bool:
        return not self.stopping


def test_train_passes_its_options_on_and_prints_the_export(capsys, monkeypatch, tmp_path):
    seen, trainer = [], Trainer(tmp_path)
    monkeypatch.setattr("streamgen.distill.recipes.build", lambda *args: seen.append(args) or trainer)
    argv = ["train", "sprites/vae", "train.steps=3", "--output", f"{tmp_path}/a: b", "--minutes", "2", "--no-resume"]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"{tmp_path}/export\n" and not trainer.resumed
    ((name, overrides),) = seen
    assert name == "sprites/vae"
    from streamgen.config import merge
    from streamgen.distill.recipes import Recipe

    train = merge(Recipe, overrides).train
    assert (train.steps, train.output, train.max_minutes) == (3, f"{tmp_path}/a: b", 2.0)
    trainer.stopping = True  # by Ctrl-C
    assert main(argv) == 130
    capsys.readouterr()
    trainer.fits = False
    assert main(argv[:-1]) == 2
    err = capsys.readouterr().err
    assert "checkpoint.pt" in err and "--no-resume" in err and err.count("\n") == 1


def test_train_lists_and_suggests_recipes(capsys):
    assert main(["train", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in available("distill"))
    for argv, word in (
        (["sprites/va"], "did you mean 'sprites/vae'"),
        ([], "which recipe"),
        (["sprites/vae", "train.stepz=3"], "did you mean 'train.steps'"),
    ):
        assert main(["train", *argv]) == 2
        err = capsys.readouterr().err
        assert word in err and err.count("\n") == 1
