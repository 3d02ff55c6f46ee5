"""Render jobs: batches that go on where they stopped, records that reproduce, states that continue, raw frames."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from streamgen import hub
from streamgen.cli import main, records
from streamgen.cli.jobs import Clip, parse_prompts, place, with_seeds
from streamgen.cli.timeline import Entry
from streamgen.errors import InputError
from streamgen.media import MediaError, read_video, video_info
from streamgen.session import StreamSession

RED, BLUE = "a red circle", "a blue star"
SIZE = ["--height", 32, "--width", 64]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """A pipeline folder with random weights."""
    from streamgen.models.text import TextEncoder, build_tokenizer
    from streamgen.models.vae import StreamingVAE
    from streamgen.pipelines import StreamingVideoPipeline

    tokenizer = build_tokenizer("a red blue circle star".split(), 8)
    text = TextEncoder(len(tokenizer), dim=8, num_layers=1, num_heads=2, max_length=8).eval()
    model = tiny.model(text_len=8)
    vae = StreamingVAE(latent_channels=4, widths=(8, 8, 8)).eval()
    with torch.no_grad():  # a fresh codec ignores the frame before: its last convolutions start at zero
        for name, weight in vae.named_parameters():
            if name.endswith("conv2.weight"):
                weight.copy_(tiny.draw(*weight.shape, seed=len(name)) * 0.2)
    path = tmp_path_factory.mktemp("model")
    StreamingVideoPipeline(tokenizer, text, model, vae).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def load():
    """`hub.load`, once per model: `render` lays the configuration over it."""
    return functools.cache(lambda model, checkpoint, device, dtype: ORIGINAL(model, checkpoint, None, device, dtype))


ORIGINAL = hub.load


@pytest.fixture
def render(folder, load, tmp_path, capsys, monkeypatch):
    """Run `render` in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "load", lambda *args, **more: load(*args[:2], *args[3:5]))

    def run(*argv: object, head=("--model", folder, *SIZE, "--steps", 1)) -> tuple[int, str, str]:
        code = main(["render", *map(str, [*head, *argv])])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(render):
    """Run `render`; it must refuse in one line that holds all of `words`, load nothing and write nothing."""

    def run(*argv: object, words: tuple[str, ...], code: int = 2, **options) -> None:
        before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hub, "load", None)
            got, out, err = render(*argv, **options)
        assert (got, out, err.count("\n")) == (code, "", 1), err
        assert err.startswith("streamgen: error: ") and all(word in err for word in words), err
        assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before

    return run


def record(path: str) -> dict:
    return json.loads(Path(path).read_text())


def sha(path: str) -> str:
    return record(path)["result"]["sha256"]


def stop(monkeypatch, after: int, error: BaseException) -> None:
    """The chunk after `after` of them does not come."""
    original, left = StreamSession.next, [after]

    def next_chunk(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return original(self, *args)

    monkeypatch.setattr(StreamSession, "next", next_chunk)


# ---------------------------------------------------------------------------------------------- prompt files
BASE = Clip(entries=(), seed=7, num_frames=80)


def test_a_prompt_file_is_lines_or_objects():
    lines = [
        "# a comment", "", f"  {RED}  ",
        json.dumps({"prompt": BLUE, "seed": 3, "name": "star", "seconds": 1.5, "negative_prompt": "noise"}),
        json.dumps({"timeline": [{"at": 0, "prompt": RED}, {"frame": 9, "prompt": BLUE, "blend": 2}], "num_frames": 9}),
    ]  # fmt: skip
    text, star, story = parse_prompts("\n".join(lines), "p.txt", BASE, 16)
    assert text == Clip((Entry(0, RED),), 7, 80, index=1)
    assert star == Clip((Entry(0, BLUE),), 3, 24, "noise", "star", index=2)
    assert [(e.frame, e.prompt, e.blend) for e in story.entries] == [(0, RED, 0), (9, BLUE, 2)]
    assert (story.seed, story.num_frames, story.index) == (7, 9, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# nothing\n\n", ("prompts.jsonl", "empty")),
        ('{"prompt": "a"}\n{"prompt": "a",}', ("line 2", "not JSON")),
        ('\n{"promt": "a"}', ("line 2", "'promt'", "did you mean 'prompt'")),
        ("a red circle", ("line 1", "not JSON")),
        ('["a red circle"]', ("line 1", "no object")),
        ('{"seed": 1}', ("line 1", "prompt or a timeline")),
        ('{"prompt": " "}', ("line 1", "prompt")),
        ('{"prompt": "a", "seed": 1.5}', ("line 1", "seed", "1.5", "whole")),
        ('{"prompt": "a", "seed": true}', ("line 1", "seed", "True")),
        ('{"prompt": "a", "seconds": NaN}', ("line 1", "seconds", "nan")),
        ('{"prompt": "a", "num_frames": 0}', ("line 1", "num_frames", "0")),
        ('{"prompt": "a", "num_frames": 9, "seconds": 1}', ("line 1", "seconds", "num_frames")),
        ('{"prompt": "a", "name": "../b"}', ("line 1", "name", "'../b'")),
        ('{"timeline": [{"at": 1, "prompt": "a"}]}', ("line 1", "start at 0")),
        ('{"timeline": "story.yaml"}', ("line 1", "list")),
    ],
)
def test_a_bad_line_is_refused_by_its_number(text, words):
    with pytest.raises(InputError) as caught:
        parse_prompts(text, "prompts.jsonl", BASE, 16)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_a_bad_prompt_file_ends_the_command(refused, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": ["a"]}')
    refused("--prompt-file", "prompts.jsonl", words=("prompts.jsonl, line 2", "['a']"))
    late = {"timeline": [{"at": 0, "prompt": "a"}, {"at": 9, "prompt": "b"}]}
    (tmp_path / "prompts.txt").write_text(f"{RED}\n{json.dumps(late)}")
    refused("--prompt-file", "prompts.txt", words=("prompts.txt: prompt 2", "entry 2", "past the end"))


def targets(clips, output, batch=True):
    return [clip.target for clip in place(clips, output, batch)]


def test_names_are_index_prompt_and_seed():
    clips = with_seeds(parse_prompts(f'{RED}!\n{{"prompt": "x", "name": "Star"}}', "p.txt", BASE, 16), 2)
    assert targets(clips, "out/") == [
        "out/001-a-red-circle-s7.mp4", "out/001-a-red-circle-s8.mp4", "out/Star-s7.mp4", "out/Star-s8.mp4",
    ]  # fmt: skip
    assert targets(clips, "o/{index}/{prompt}-{seed}.webm")[1:3] == ["o/001/a-red-circle-8.webm", "o/002/x-7.webm"]
    assert targets(clips, "{name}/")[0] == "001-a-red-circle-s7/"
    assert targets(clips[:1], "clip.mp4") == ["clip.mp4"] and targets(clips[:1], "frames/", False) == ["frames/"]


def test_equal_names_are_told_apart_in_order():
    lines = [json.dumps({"prompt": "a", "name": name}) for name in ("x", "X", "x-2", "x")]
    clips = parse_prompts("\n".join(lines), "p.jsonl", BASE, 16)
    # capitals alone do not tell files apart everywhere
    assert targets(clips, "o") == ["o/x.mp4", "o/X-2.mp4", "o/x-2-2.mp4", "o/x-3.mp4"]
    assert targets(clips[:2], "o/{seed}/") == ["o/7/", "o/7-2/"]


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", "x", "--num-videos", "0"], ("--num-videos", "0", "at least 1")),
        (["--prompt", "x", "--num-videos", "2", "-o", "clip.mp4"], ("clip.mp4", "2 clips", "folder")),
        (["--prompt", "x", "--num-videos", "2", "-o", "taken"], ("taken", "it is a file", "folder")),
        (["--prompt", "x", "--num-videos", "2", "-o", "absent/clips"], ("absent", "mkdir")),
        (["--prompt", "x", "--num-videos", "2", "-o", "/proc/clips"], ("/proc/clips", "choose")),
        (["--prompt", "x", "--num-videos", "2", "-o", "{nam}.mp4"], ("{nam}", "{name}")),
        (["--prompt", "x", "--num-videos", "2", "-o", "{name}.avi"], (".avi", ".mp4")),
        (["--prompt", "x", "--num-videos", "2", "-o", "-"], ("-o -", "2 clips")),
        (["--prompt", "x", "--fps", "0"], ("--fps", "0")),
        (["--prompt", "x", "-o", "data.mp4"], ("data.json", "no record")),
        (["--prompt", "x", "--save-state", "cache.window=9"], ("--save-state", ".pt")),
        (["--prompt", "x", "--save-state", "absent/s.pt"], ("absent", "mkdir")),
        (["--prompt", "x", "--save-state", "--num-frames", "9", "cache.window=-1"], ("--save-state", "window")),
        (["--prompt", "x", "--save-state", "s.pt", "--num-videos", "2"], ("--save-state", "several")),
        (["--prompt", "x", "--save-state", "-o", "-"], ("--save-state", "stdout")),
        (["--from", "absent.json"], ("absent.json",)),
        (["--from", "data.json"], ("data.json", "no record")),
        (["--from", "data.json", "--extend", "x"], ("--from", "--extend")),
        (["--extend", "absent.mp4"], ("absent.mp4", "no such file")),
        (["--extend", "taken"], ("taken", "--save-state", "pixels")),
        (["--extend", "wrong.pt"], ("wrong.pt", "no state")),
    ],
)
def test_bad_input_is_one_line(refused, tmp_path, argv, words):
    (tmp_path / "taken").write_text("x")
    (tmp_path / "data.json").write_text('{"mine": 1}')
    torch.save({"a": torch.zeros(2)}, tmp_path / "wrong.pt")
    refused(*argv, words=words)


# ---------------------------------------------------------------------------------------------- batches
def test_every_clip_of_a_batch_is_what_it_is_alone(render, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{RED}\n{BLUE}\n")
    code, out, err = render("--prompt-file", "prompts.txt", "--num-videos", 2, "--seed", 7, "--num-frames", 5)
    names = ["001-a-red-circle-s7", "001-a-red-circle-s8", "002-a-blue-star-s7", "002-a-blue-star-s8"]
    assert (code, out.split()) == (0, [f"clips/{name}.mp4" for name in names])
    assert len({sha(f"clips/{name}.json") for name in names}) == 4
    assert render("--prompt", BLUE, "--seed", 8, "--num-frames", 5, "-o", "alone.mp4", "-q")[0] == 0
    assert sha("alone.json") == sha(f"clips/{names[3]}.json")
    assert np.array_equal(read_video("alone.mp4"), read_video(f"clips/{names[3]}.mp4"))


def test_an_interrupted_batch_goes_on(render, refused, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text(f"{RED}\n{BLUE}\na circle\n")
    command = ["--prompt-file", "prompts.txt", "--num-frames", 30, "-o", "out"]  # three chunks each
    with monkeypatch.context() as patch:
        stop(patch, 4, KeyboardInterrupt())
        code, out, err = render(*command)
    first, second, third = (f"out/{name}" for name in ("001-a-red-circle-s0", "002-a-blue-star-s0", "003-a-circle-s0"))
    assert (code, out) == (130, f"{first}.mp4\n")
    said = f"{second}.mp4 keeps the first 9 of 30 frames and plays; 1 of 3 clips are finished, the same command"
    assert f"interrupted: {said}" in err
    assert len(read_video(f"{first}.mp4")) == 30 and len(read_video(f"{second}.mp4")) == 9
    assert [path.name for path in Path("out").glob("*.json")] == ["001-a-red-circle-s0.json"]

    kept, bars = Path(f"{first}.mp4").read_bytes(), []
    import tqdm

    class Bar(tqdm.tqdm):
        def close(self):
            bars.append((self.total, self.n))
            super().close()

    with monkeypatch.context() as patch:
        patch.setattr(tqdm, "tqdm", Bar)
        code, out, err = render(*command)
    assert (code, out.split()) == (0, [f"{name}.mp4" for name in (first, second, third)])
    assert "1 of 3 already there" in err and (60, 60) in bars
    assert Path(f"{first}.mp4").read_bytes() == kept and len(read_video(f"{second}.mp4")) == 30

    with monkeypatch.context() as patch:  # nothing to do: no weights are loaded
        patch.setattr(hub, "load", None)
        code, out, err = render(*command)
    assert (code, len(out.split())) == (0, 3) and "3 of 3 already there" in err

    refused(*command, "--steps", 2, words=("other settings (config)", "--overwrite"))
    Path(f"{second}.mp4").unlink()  # a clip that is gone is not finished, whatever its record says
    before = Path(f"{third}.json").stat().st_mtime_ns
    assert "2 of 3 already there" in render(*command)[2] and len(read_video(f"{second}.mp4")) == 30
    assert Path(f"{third}.json").stat().st_mtime_ns == before
    code, _, err = render(*command, "--steps", 2, "--overwrite", "-q")
    assert (code, err) == (0, "")
    assert record(f"{third}.json")["settings"]["config"]["ladder"]["timesteps"] == [1000, 500]


def test_prompts_may_come_through_a_pipe(render):
    """As `--prompt-file <(command)` gives it: what is read once is gone."""
    reading, writing = os.pipe()
    os.write(writing, f"{RED}\n".encode())
    os.close(writing)
    assert render("--prompt-file", f"/dev/fd/{reading}", "--num-frames", 1, "-q", "-o", "out/")[0] == 0
    os.close(reading)
    assert len(list(Path("out").glob("*.mp4"))) == 1


def test_an_unfinished_folder_of_frames_is_made_anew(render, monkeypatch):
    command = ["--prompt", RED, "--num-videos", 1, "--num-frames", 9, "-q", "-o", "out/{prompt}/"]
    with monkeypatch.context() as patch:
        stop(patch, 1, KeyboardInterrupt())
        assert render(*command, "--num-frames", 30)[0] == 130
    assert len(read_video("out/a-red-circle")) == 9
    for number in (9, 10):
        shutil.copy("out/a-red-circle/frame_000000.png", f"out/a-red-circle/frame_{number:06d}.png")
    assert render(*command)[0] == 0
    assert len(read_video("out/a-red-circle")) == 9 and record("out/a-red-circle/clip.json")["result"]["frames"] == 9

    one = ["--prompt", BLUE, "--num-frames", 2, "-q", "-o", "out/a-red-circle"]  # without --num-videos a single clip
    assert render(*one)[0] == 2 and len(read_video("out/a-red-circle")) == 9
    assert render(*one, "--overwrite")[0] == 0 and len(read_video("out/a-red-circle")) == 2


def test_frames_that_are_there_stay_until_there_are_new_ones(render, monkeypatch):
    command = ["--prompt", RED, "--num-videos", 1, "--num-frames", 9, "-q", "-o", "out/{prompt}/"]
    assert render(*command)[0] == 0
    frames = read_video("out/a-red-circle")
    with monkeypatch.context() as patch:
        stop(patch, 0, KeyboardInterrupt())
        assert render(*command, "--seed", 1, "--overwrite")[0] == 130
    assert np.array_equal(read_video("out/a-red-circle"), frames)
    assert record("out/a-red-circle/clip.json")["settings"]["seed"] == 0


def test_a_record_is_that_of_its_own_clip(render, refused, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{RED}\n")
    command = ["--prompt-file", "prompts.txt", "--num-frames", 2, "-q"]
    assert render(*command, "-o", "out/{prompt}.mp4")[0] == 0
    Path("out/a-red-circle.gif").write_bytes(b"half")  # as an interrupted command leaves it
    refused("--extend", "out/a-red-circle.gif", words=("is the record of out/a-red-circle.mp4",), head=())
    refused("--from", "out/a-red-circle.gif", words=("is the record of out/a-red-circle.mp4",), head=())
    assert render(*command, "-o", "out/{prompt}.gif")[0] == 0 and len(read_video("out/a-red-circle.gif")) == 2


def test_a_state_of_an_earlier_render_is_not_taken_for_this_one(render, refused, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{RED}\n")
    command = ["--prompt-file", "prompts.txt", "--num-frames", 2, "-q", "-o", "out/"]
    assert render(*command, "--save-state")[0] == 0
    assert render(*command, "--seed", 1, "--overwrite")[0] == 0  # its name says the seed: another clip
    state = next(Path("out").glob("*s0.state.pt"))
    assert render(*command, "--overwrite")[0] == 0 and state.exists()
    assert render(*command, "--save-state", "--overwrite")[0] == 0
    clip = str(state).replace(".state.pt", ".mp4")
    assert render("--extend", clip, "--num-frames", 2, "-q", "-o", "more.mp4", head=())[0] == 0
    words = ("the state that this clip starts from",)
    refused("--extend", clip, "--save-state", state, "-o", "again.mp4", words=words, head=())


def test_a_full_disk_keeps_what_is_finished(render, tmp_path, monkeypatch):
    from streamgen.media import FfmpegSink

    original = FfmpegSink._put

    def put(self, frame):
        if "002" in str(self.path):
            raise MediaError(f"{self.path}: No space left on device; nothing playable was kept")
        original(self, frame)

    monkeypatch.setattr(FfmpegSink, "_put", put)
    (tmp_path / "prompts.txt").write_text(f"{RED}\n{BLUE}\n")
    code, out, err = render("--prompt-file", "prompts.txt", "--num-frames", 5, "-q")
    assert (code, out, err.count("\n")) == (1, "clips/001-a-red-circle-s0.mp4\n", 1)
    assert "No space left" in err and "1 of 2 clips are finished" in err
    assert [path.name for path in Path("clips").glob("*.json")] == ["001-a-red-circle-s0.json"]


def test_weights_are_told_apart_by_what_they_hold(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("words")
    (copy / "manifest.json").write_text("{}")
    assert records.stamp(str(copy)) == records.stamp(str(folder))
    file = next(copy.glob("transformer/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert records.stamp(str(copy)) != records.stamp(str(folder))


# ---------------------------------------------------------------------------------------------- records
def test_a_record_reproduces_its_clip(render, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "load", ORIGINAL)  # two loads, as two runs of the program
    story = f"- {{at: 0, prompt: {RED}}}\n- {{at: 0.5, prompt: {BLUE}, mode: keep, blend: 1}}\n"
    (tmp_path / "story.yaml").write_text(story)
    options = ["--seed", 5, "--num-frames", 26, "--guidance-scale", 2, "--negative-prompt", BLUE, "cache.window=9"]
    assert render("--timeline", "story.yaml", *options, "-o", "clip/", "-q")[0] == 0
    told = record("clip/clip.json")
    assert told["settings"]["prompts"][1] == {"frame": 8, "prompt": BLUE, "mode": "keep", "blend": 1}
    assert told["settings"]["config"]["cache"]["window"] == 9 and told["settings"]["model"] == str(folder)
    assert told["settings"].keys() == records.SETTINGS.keys()
    assert told["result"]["frames"] == 26 and told["result"]["width"] == 64 and told["result"]["frames_per_second"] > 0
    assert told["made_with"]["torch"] and told["made_with"]["streamgen"]

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = render("--from", "../clip/clip.json", "-o", "again/", head=())
    assert (code, out) == (0, "again/\n") and "bit by bit" in err
    assert np.array_equal(read_video("again"), read_video("../clip"))
    assert record("again/clip.json")["settings"] == told["settings"]
    assert render("--from", "again", "-o", "other/", "--seed", 6, "-q", head=())[0] == 0
    assert not np.array_equal(read_video("other"), read_video("again"))
    code, out, _ = render("--from", "again", "--print-config", "cache.window=12", head=())
    assert code == 0 and "window: 12" in out and "scale: 2.0" in out


def test_other_weights_or_frames_are_said(render):
    assert render("--prompt", RED, "--num-frames", 2, "-o", "clip.mp4")[0] == 0
    told = record("clip.json")
    Path("clip.json").write_text(json.dumps({**told, "result": {**told["result"], "sha256": "0"}}))
    assert "not those of clip.json" in render("--from", "clip.json", "-o", "again.mp4", head=())[2]
    Path("clip.json").write_text(json.dumps({**told, "settings": {**told["settings"], "weights": "0"}}))
    assert "the weights are not those" in render("--from", "clip.mp4", head=())[2]
    assert len(read_video("clip-again.mp4")) == 2


def test_a_damaged_record_is_one_line(render, refused):
    assert render("--prompt", RED, "--num-frames", 2, "-o", "clip.mp4", "-q")[0] == 0
    told = record("clip.json")
    cases = [
        ({"settings": {}}, "settings.prompts"),
        ({"settings": {**told["settings"], "seed": "x"}}, "settings.seed"),
        ({"settings": {**told["settings"], "prompts": [{"frame": 0}]}}, "settings.prompts"),
        ({"settings": {**told["settings"], "prompts": []}}, "settings.prompts"),
        ({"settings": {**told["settings"], "config": {"cache": {"windw": 3}}}}, "did you mean 'cache.window'"),
        ({"result": None}, "no result"),
        ({"streamgen_clip": 99}, "version 99"),
    ]
    for change, word in cases:
        Path("clip.json").write_text(json.dumps({**told, **change}))
        refused("--from", "clip.json", "-o", "again.mp4", words=("clip.json", word), head=())


def test_the_clip_that_is_started_from_stays(render, refused):
    assert render("--prompt", RED, "--num-frames", 2, "-o", "clip.mp4", "--save-state", "-q")[0] == 0
    for start in (["--from", "clip.json"], ["--extend", "clip.mp4"], ["--extend", "clip.state.pt"]):
        refused(*start, "-o", "clip.mp4", words=("clip.mp4", "another name"), head=())


# ---------------------------------------------------------------------------------------------- states
def test_an_extended_clip_is_the_uninterrupted_one(render, folder):
    assert render("--prompt", RED, "--seed", 3, "--num-frames", 34, "-o", "whole/", "-q")[0] == 0
    whole = read_video("whole")
    # 14 frames end inside the second chunk (9 + 12): its other 7 are in the state
    assert render("--prompt", RED, "--seed", 3, "--num-frames", 14, "--save-state", "-o", "a.mkv", "-q")[0] == 0
    assert render("--prompt", RED, "--seed", 3, "--num-frames", 14, "-o", "a/", "-q")[0] == 0
    code, out, _ = render("--extend", "a.mkv", "--num-frames", 5, "--save-state", "b.pt", "-o", "b/", head=())
    assert (code, out) == (0, "b/\n") and record("b/clip.json")["result"]["first_frame"] == 14
    assert render("--extend", "b.pt", "--num-frames", 15, "-o", "c/", head=())[0] == 0
    assert record("c/clip.json")["result"]["first_frame"] == 19
    assert np.array_equal(np.concatenate([read_video(part) for part in "abc"]), whole)
    assert render("--from", "c/clip.json", "-o", "again/", "-q", head=())[0] == 0  # a continuation, reproduced
    assert np.array_equal(read_video("again"), read_video("c"))

    pipe = ORIGINAL(str(folder), device="cpu")  # the file is a session's state
    with pipe.resume(torch.load("a.state.pt", weights_only=True)) as session:
        assert np.array_equal(session.next().frames, whole[21:33])


def test_a_stream_goes_on_under_a_new_prompt(render, tmp_path):
    (tmp_path / "story.yaml").write_text(f"- {{at: 0, prompt: {RED}}}\n- {{frame: 14, prompt: {BLUE}}}\n")
    assert render("--timeline", "story.yaml", "--num-frames", 33, "-o", "whole/", "-q")[0] == 0
    assert render("--prompt", RED, "--num-frames", 14, "--save-state", "-o", "a.mp4", "-q")[0] == 0
    assert render("--extend", "a.mp4", "--prompt", BLUE, "--num-frames", 19, "-o", "b/", "-q", head=())[0] == 0
    assert np.array_equal(read_video("b"), read_video("whole")[14:])
    assert render("--extend", "a.mp4", "--num-frames", 19, "-o", "c/", "-q", head=())[0] == 0
    assert not np.array_equal(read_video("c"), read_video("b"))


def test_what_cannot_be_extended_is_refused(render, refused, folder):
    assert render("--prompt", RED, "--num-frames", 2, "-o", "clip.mp4", "-q")[0] == 0
    refused("--extend", "clip.mp4", words=("pixels", "--from clip.json --save-state"), head=())
    assert render("--prompt", RED, "--num-frames", 2, "--save-state", "-o", "clip.mp4", "-q")[0] == 0
    refused("--extend", "clip.mp4", "--seed", 2, "cache.window=9", words=("--seed, KEY=VALUE", "own settings"), head=())
    refused("--extend", "clip.mp4", "--prompt-file", "x", words=("--prompt-file", "one clip"), head=())
    assert render("--prompt", BLUE, "--num-frames", 2, "-o", "clip.mp4", "-q")[0] == 0
    refused("--extend", "clip.mp4", words=("clip.state.pt", "another render"), head=())
    assert render("--extend", "clip.state.pt", "--num-frames", 2, "-q", head=())[:2] == (0, "clip-continued.mp4\n")

    with ORIGINAL(str(folder), device="cpu").stream(RED, height=32, width=64, num_frames=12) as session:
        session.next()
        torch.save(session.state_dict(), "own.pt")  # saved from Python, with an end
    head = ("--model", folder)
    assert render("--extend", "own.pt", "--num-frames", 3, "-o", "own.mp4", "-q", head=head)[0] == 0
    refused("--extend", "own.pt", "--num-frames", 4, "-o", "own.mp4", words=("own.pt", "3 frames on"), head=head)


def test_a_clip_without_the_state_asked_for_is_not_finished(render, refused):
    command = ["--prompt", RED, "--num-videos", 2, "--num-frames", 2, "-o", "out/"]
    assert render(*command)[0] == 0
    refused(*command, "--save-state", "--fps", 8, words=("other settings (fps)",))  # finished it is, all the same
    assert "already there" not in render(*command, "--save-state")[2]
    assert len(list(Path("out").glob("*.state.pt"))) == 2
    assert "2 of 2 already there" in render(*command, "--save-state")[2]


# ---------------------------------------------------------------------------------------------- raw frames, rate
def test_raw_frames_go_to_stdout_and_words_do_not(render, tmp_path, monkeypatch):
    assert render("--prompt", RED, "--num-frames", 11, "-o", "frames/", "-q")[0] == 0
    with open(tmp_path / "raw", "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        code, _, err = render("--prompt", RED, "--num-frames", 11, "-o", "-")
    assert code == 0 and "-f rawvideo -pix_fmt rgb24 -s 64x32 -framerate 16 -i -" in err
    assert (tmp_path / "raw").read_bytes() == read_video("frames").tobytes()
    assert not list(tmp_path.glob("*.json"))


def test_a_reader_that_leaves_ends_it_quietly(render, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        code, _, err = render("--prompt", RED, "--num-frames", 90, "-o", "-", "-q")
    assert (code, err) == (0, "")


def test_what_is_snapped_is_said_once(render):
    code, _, err = render("--prompt", RED, "--num-videos", 3, "--height", 40, "--num-frames", 2)
    assert code == 0 and err.count("height 40 is not a multiple of 32") == 1


def test_fps_is_the_file_s_rate(render, tmp_path):
    (tmp_path / "story.yaml").write_text(f"- {{at: 0, prompt: {RED}}}\n- {{at: 1.5, prompt: {BLUE}}}\n")
    assert render("--timeline", "story.yaml", "--seconds", 2, "--fps", 8, "-o", "clip.mp4", "-q")[0] == 0
    assert video_info("clip.mp4").fps == 8 and len(read_video("clip.mp4")) == 16
    assert record("clip.json")["settings"]["prompts"][1]["frame"] == 12


def test_the_embedded_model_reproduces_its_clip(render, monkeypatch):
    monkeypatch.setattr(hub, "load", ORIGINAL)
    if "sprites" not in hub.embedded_models():
        pytest.skip("no embedded model in this checkout")
    prompt = "a red circle bouncing on a navy background"
    assert render("--prompt", prompt, *SIZE, "--steps", 2, "--num-frames", 3, "-o", "clip/", "-q", head=())[0] == 0
    code, _, err = render("--from", "clip", "-o", "again/", head=())
    assert code == 0 and "bit by bit" in err and np.array_equal(read_video("clip"), read_video("again"))
