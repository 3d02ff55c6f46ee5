"""`streamgen eval`: the runner on a pipeline that shows the world's truth, what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from streamgen.cli import charts, confusions, main
from streamgen.cli import eval as command
from streamgen.errors import InputError
from streamgen.evaluation import runner
from streamgen.evaluation.playing import RESTART, batches, play
from streamgen.evaluation.results import FIELDS, result_cell
from streamgen.evaluation.runner import Preset
from streamgen.evaluation.suites import base, latency
from streamgen.evaluation.suites.base import Case, Judge
from streamgen.worlds.sprites import Change, Timeline, parse
from streamgen.worlds.sprites.renderer import SIZE, draw
from streamgen.worlds.sprites.renderer import play as script_of

RED, BLUE = "a red circle bouncing on a navy background", "a blue circle bouncing on a navy background"


class Painter:
    """A pipeline whose streams are the world's own: 9 frames, then 12 at a time. `flaw`: deaf | refuses | blue."""

    settings = SimpleNamespace(height=None, width=None)
    transformer = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, flaw: str | None = None) -> None:
        self.flaw, self.streams, self.modes = flaw, [], []

    def stream(self, prompt, height, width, num_frames, generator=None, seed=0):
        assert (height, width) == (SIZE, SIZE)
        if self.flaw == "refuses":
            raise InputError("cache.window=3 leaves no room\nfor 24 frames in flight")
        seeds = [seed] if generator is None else [g.initial_seed() for g in generator]
        self.streams.append((prompt, seeds, num_frames))
        return Show(self, prompt, seeds, num_frames)


class Show:
    def __init__(self, pipe: Painter, prompt, seeds: list[int], num_frames: int) -> None:
        self.pipe, self.single, self.seeds, self.num_frames = pipe, isinstance(prompt, str), seeds, num_frames
        self.changes = [[Change(0, self.scene(p))] for p in ([prompt] if self.single else prompt)]
        self.done, self.epoch = 0, 0

    def scene(self, prompt: str):
        scene = parse(prompt)
        if self.pipe.flaw == "blue":
            scene = replace(scene, actors=tuple(replace(actor, colour="blue") for actor in scene.actors))
        return scene

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...

    def set_prompt(self, prompt, mode=None):
        self.epoch += 1
        self.pipe.modes.append(mode)
        if self.pipe.flaw != "deaf":
            for changes, text in zip(self.changes, [prompt] if self.single else prompt, strict=True):
                changes.append(Change(self.done, parse(text), cut=mode == "cut"))
        return SimpleNamespace(epoch=self.epoch)

    def next(self):
        count = min(12 if self.done else 9, self.num_frames - self.done)
        until = self.done + count
        clips = [
            draw(script_of(Timeline(tuple(changes)), until, seed), count, self.done)
            for changes, seed in zip(self.changes, self.seeds)
        ]
        self.done = until
        frames = clips[0] if self.single else np.stack(clips)
        return SimpleNamespace(frames=frames, epoch=self.epoch, timings={"denoise": 0.01, "decode": 0.001})


class Notes(Judge):
    """Writes down what it is given."""

    def __init__(self) -> None:
        self.frames, self.asked = [], []

    def take(self, frames):
        self.frames.append(frames)

    def change(self, index):
        self.asked.append((sum(map(len, self.frames)), index))


@pytest.fixture
def pipes(monkeypatch) -> dict[str, Painter]:
    """Pipelines by preset; others are made when they are asked for."""
    made: dict[str, Painter] = {}

    def load(common, model, preset):
        assert model == "sprites" and set(common) == set(command.LOADING)
        return made.setdefault(preset, Painter())

    monkeypatch.setattr(command, "load", load)
    return made


@pytest.fixture
def evaluate(tmp_path, capsys, monkeypatch):
    """Run `eval` in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object, output: str | None = "out") -> tuple[int, str, str]:
        tail = ["--output", output] if output else []
        code = main(["eval", *map(str, argv), *tail])
        return (code, *capsys.readouterr())

    return run


def records(folder: str = "out", file: str = "results.json") -> dict[tuple[str, str, str], dict]:
    found = json.loads(Path(folder, file).read_text())
    return {(r["preset"], r["suite"], r["metric"]): r for r in found["records"]}


# ------------------------------------------------------------------------------------------- playing
def cases(*frames: int) -> list[Case]:
    return [Case(Timeline((Change(0, parse(RED)), Change(f, parse(BLUE)))), 60, seed=i) for i, f in enumerate(frames)]


def test_cases_share_a_batch_only_where_their_requests_coincide():
    assert list(batches(cases(24, 30, 24, 24, 30, 24), 3)) == [[0, 2, 3], [5], [1, 4]]


def test_requests_come_before_the_first_chunk_at_their_frame():
    pipe, judges, heard = Painter(), [Notes(), Notes(), Notes()], []
    play(pipe, cases(20, 21, 21), judges, mode="keep", tell=heard.append)
    assert [judge.asked for judge in judges] == [[(21, 1)]] * 3 and pipe.modes == ["keep"] * 2
    assert [stream[1:] for stream in pipe.streams] == [([0], 60), ([1, 2], 60)]
    assert sum(heard) == 180 and all(sum(map(len, judge.frames)) == 60 for judge in judges)
    clip = np.concatenate(judges[2].frames)
    wanted = Timeline((Change(0, parse(RED)), Change(21, parse(BLUE))))
    np.testing.assert_array_equal(clip, draw(script_of(wanted, 60, 2), 60))


def test_a_restarted_stream_remembers_nothing():
    pipe, judge = Painter(), Notes()
    play(pipe, cases(40), [judge], restart=25)
    assert pipe.streams == [([RED], [0], 25), ([RED], [RESTART], 25), ([BLUE], [2 * RESTART], 10)]
    assert judge.asked == [(46, 1)]


def test_presets_take_settings_and_a_control():
    assert Preset.parse("default") == Preset("default")
    assert Preset.parse("a+cache.window=9+ladder.shift=1e+0") == Preset("a", ("cache.window=9", "ladder.shift=1e+0"))
    assert Preset.parse("a+restart=5") == Preset("a", (), 5.0)
    for wrong in ("a+restart=x", "a+restart=0", "a+window"):
        with pytest.raises(InputError, match=r"^preset 'a\+"):
            Preset.parse(wrong)


# ------------------------------------------------------------------------------------------- what is written
def test_a_comparison_is_written_whole_and_twice_the_same(evaluate, pipes, tmp_path):
    pipes["self-forcing"] = Painter("deaf")
    argv = ("--presets", "default,self-forcing", "--suites", "short,switch", "--prompts", 1, "--seed", 3)
    code, out, err = evaluate(*argv)
    assert code == 0 and out.split() == ["out/results.json", "out/results.md"]
    found, results = records(), json.loads(Path("out/results.json").read_text())
    assert all(tuple(record) == FIELDS for record in results["records"])
    right = found["default", "short", "all_right"]
    assert (right["value"], right["low"], right["high"], right["n"], right["model"]) == (1, None, None, 1, "sprites")
    assert found["default", "switch", "success"]["value"] == 1
    assert found["self-forcing", "switch", "new"]["value"] == 0
    never = found["self-forcing", "switch", "frames_until"]
    assert (never["value"], never["low"], never["n"]) == (None, None, 0)
    apart = {(d["preset"], d["metric"]): d for d in results["differences"] if d["suite"] == "switch"}
    assert {preset for preset, _ in apart} == {"self-forcing"}
    assert (apart["self-forcing", "new"]["value"], apart["self-forcing", "new"]["to"]) == (-1, "default")
    assert pipes["default"].streams == pipes["self-forcing"].streams  # the same prompts, seeds and lengths
    text = Path("out/results.md").read_text()
    assert "| switch | success | new |" in text and "| default | 1.00 | 1.00 |" in text  # of one case no interval
    assert "| self-forcing | 0.00 | 0.00 |" in text and "–" in text
    for name in ("switch-latency.png", "sheets/sprites--default--short.png", "raw/sprites--default--short.json"):
        assert Path("out", name).is_file()
    shutil.move("out", "first")
    assert evaluate(*argv)[0] == 0
    for name in ("results.json", "results.md", "raw/sprites--self-forcing--switch.json"):
        assert Path("out", name).read_bytes() == Path("first", name).read_bytes()


def test_what_is_finished_is_not_run_again(evaluate, pipes):
    assert evaluate("--suites", "short", "--prompts", 1)[0] == 0
    first = Path("out/results.json").read_text()
    pipes.clear()
    code, _, err = evaluate("--suites", "short", "--prompts", 1)
    assert code == 0 and not pipes and "1 of 1 parts are there already" in err
    assert Path("out/results.json").read_text() == first
    assert evaluate("--suites", "short", "--prompts", 1, "--presets", "default,longlive")[0] == 0
    assert set(pipes) == {"longlive"}
    code, _, err = evaluate("--suites", "short", "--prompts", 2)
    assert code == 2 and "prompts was 1, is 2" in err and "--overwrite" in err and err.count("\n") == 1
    assert evaluate("--suites", "short", "--prompts", 2, "--overwrite")[0] == 0
    assert records()["default", "short", "colour"]["n"] == 2
    Path("out/raw/sprites--default--short.json").write_text('{"settings": 1')
    code, _, err = evaluate("--suites", "short", "--prompts", 2)
    assert code == 2 and "is damaged" in err and err.count("\n") == 1


def test_a_preset_that_does_not_fit_is_a_line_and_is_tried_again(evaluate, pipes):
    pipes["rolling-forcing"] = Painter("refuses")
    argv = ("--suites", "short", "--prompts", 1, "--presets", "rolling-forcing,default")
    code, _, err = evaluate(*argv)
    assert code == 0 and "rolling-forcing: short could not be measured: cache.window=3 leaves no room for 24" in err
    results = json.loads(Path("out/results.json").read_text())
    assert [item["preset"] for item in results["failures"]] == ["rolling-forcing"]
    assert records()["default", "short", "all_right"]["value"] == 1
    assert "not measured: cache.window=3 leaves no room for 24 frames" in Path("out/results.md").read_text()
    pipes["rolling-forcing"] = Painter()
    assert evaluate(*argv)[0] == 0 and records()["rolling-forcing", "short", "all_right"]["value"] == 1
    for pipe in pipes.values():
        pipe.flaw = "refuses"
    assert evaluate(*argv, "--overwrite")[0] == 1


def test_latency_is_kept_apart(evaluate, pipes, monkeypatch):
    monkeypatch.setattr(latency, "STEADY", 48)
    assert evaluate("--suites", "latency,short", "--prompts", 1)[0] == 0
    assert {suite for _, suite, _ in records()} == {"short"}
    timed = records(file="latency.json")
    assert {suite for _, suite, _ in timed} == {"latency"}
    value = lambda metric: timed["default", "latency", metric]["value"]
    assert value("fps") > 0 and value("first_frame_seconds") > 0 and value("switch_seconds") > 0
    assert value("chunk_p50_seconds") <= value("chunk_p99_seconds")
    assert value("denoise_seconds_per_chunk") == pytest.approx(0.01)
    assert timed["default", "latency", "fps"]["n"] == latency.STREAMS
    assert "| latency | fps |" in Path("out/results.md").read_text()


def test_what_is_confused_is_drawn_and_the_worst_are_shown(evaluate, pipes):
    pipes["default"] = Painter("blue")
    argv = ("--suites", "short", "--prompts", 6, "--presets", "default,self-forcing")
    assert evaluate(*argv)[0] == 0
    raw = json.loads(Path("out/raw/sprites--default--short.json").read_text())
    named = [named for case in raw["cases"] for named, _ in case["pairs"]["colour"]]
    assert {word: sum(line.values()) for word, line in raw["confusions"]["colour"].items()} == {
        word: named.count(word) for word in named
    }
    assert {read for line in raw["confusions"]["colour"].values() for read in line} <= {"blue", "none"}
    assert all(read == named for named, line in raw["confusions"]["background"].items() for read in line)
    assert all("blue" in case["said"] for case in raw["cases"])
    results = json.loads(Path("out/results.json").read_text())
    assert results["confusions"][0]["attributes"] == raw["confusions"]
    text, worst = Path("out/results.md").read_text(), "sprites--default--short--worst.png"
    assert "- default: short: what is confused with what, [in counts](sprites--default--short--confusions.png)" in text
    assert f"[the worst clips](sheets/{worst})" in text and Path("out/sheets", worst).is_file()
    assert "- self-forcing: short" in text and "no clip has a wrong attribute" in text
    columns, _, *rows = (line for line in text.splitlines() if line.startswith("|"))
    assert columns.split(" | ").index("colour") == 2 and rows[1].split(" | ")[2] == "1.00 [1.00, 1.00] ▲"
    assert not Path("out/sheets/sprites--self-forcing--short--worst.png").exists()
    assert evaluate("report", "out", output="results.md")[0] == 0
    report = Path("results.md").read_text()
    assert f"(results/out-{worst})" in report and Path(f"results/out-{worst}").is_file()
    assert Path("results/out-sprites--default--short--confusions.png").is_file()
    assert "- self-forcing: short: what" not in report  # pictures of the first preset alone
    Path("out/sheets", worst).unlink()  # without the picture, nothing is said that is not so
    assert evaluate(*argv)[0] == 0 and Path("out/results.md").read_text().count("no clip has a wrong attribute") == 1
    pipes["default"] = Painter()
    assert evaluate(*argv, "--overwrite")[0] == 0 and not Path("out/sheets", worst).exists()


def test_marks_take_six_pairs_and_a_smaller_number_is_said():
    record = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 5}
    apart = {"value": 0.2, "low": 0.1, "high": 0.3, "n": 5}
    assert result_cell(record, apart, 5) == "0.50 [0.40, 0.60]"
    assert result_cell(record, {**apart, "n": 6}, 8) == "0.50 [0.40, 0.60] (n=5) ▲"


def test_results_of_other_measures_are_not_gone_on_with(evaluate, pipes, monkeypatch):
    argv = ("--suites", "short", "--prompts", 1)
    assert evaluate(*argv)[0] == 0
    monkeypatch.setattr(base, "MEASURES", base.MEASURES + 1)
    code, _, err = evaluate(*argv)
    assert code == 2 and "measures was" in err and err.count("\n") == 1
    assert json.loads(Path("out/results.json").read_text())["setting"]["versions"]["torch"] == torch.__version__


def test_a_section_says_how_its_chunks_were_denoised(evaluate, pipes):
    presets = "default,deep-forcing,default+ladder.solver=euler+guidance.scale=1,diagonal"
    assert evaluate("--suites", "short", "--prompts", 1, "--presets", presets)[0] == 0
    ways = ["12 renoise steps, guidance 3", "12 euler steps, guidance 1", "12, 9, 6 renoise steps, guidance 3"]
    assert json.loads(Path("out/results.json").read_text())["setting"]["sampling"] == ways
    assert " · " + " or ".join(ways) + " · " in Path("out/results.md").read_text()


def test_a_preset_that_does_not_fit_into_memory_is_a_line(evaluate, pipes, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner, "measure", full)
    assert evaluate("--suites", "short", "--prompts", 1)[0] == 1
    assert json.loads(Path("out/results.json").read_text())["failures"][0]["failure"] == "CUDA out of memory"


def test_a_matrix_shows_how_often_and_how_right():
    white = lambda line: float((confusions.draw({"colour": {"red": line}}, "t") == 255).all(-1).mean())
    ink = lambda line, rgb: int((confusions.draw({"colour": {"red": line}}, "t") == rgb).all(-1).sum())
    assert ink({"red": 4}, confusions.RIGHT) > 1000 and ink({"red": 4}, confusions.WRONG) == 0
    assert ink({"blue": 4}, confusions.WRONG) > 1000 and ink({"blue": 4}, confusions.RIGHT) == 0
    assert white({"red": 2, "blue": 2}) < white({"red": 4})  # two cells are filled


def test_the_report_is_made_of_folders(evaluate, pipes):
    argv = ("--prompts", 1, "--presets", "default,default+restart=5")
    assert evaluate(*argv, "--suites", "long-10,switch", output="a")[0] == 0
    assert evaluate("--prompts", 1, "--suites", "short", output="b")[0] == 0
    code, out, _ = evaluate("report", "a", "b", output="results.md")
    text = Path("results.md").read_text()
    assert code == 0 and out == "results.md\n" and "not to be edited by hand" in text
    assert text.index("## a") < text.index("## b") and "| long-10 | all_right |" in text
    for name in ("a-long-10-over-time", "a-switch-latency"):
        assert f"(results/{name}.png)" in text and Path(f"results/{name}.png").is_file()
    assert evaluate("report", "a", "b", output="other.md")[0] == 0
    other = Path("other.md").read_text()
    assert other.replace("(other/", "(results/").replace("other.md", "results.md") == text
    Path("b/results.json").write_text("[]")
    code, _, err = evaluate("report", "b", output="results.md")
    assert code == 2 and "damaged" in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--suites", "shrt"], ("'shrt'", "did you mean 'short'")),
        (["--suites", ","], ("--suites is empty",)),
        (["--presets", "defalt"], ("'defalt'", "did you mean 'default'")),
        (["--presets", "default+cache.windw=3"], ("cache.windw", "did you mean 'cache.window'")),
        (["--presets", "default+window"], ("'window' is not KEY=VALUE",)),
        (["--model", "sprits"], ("'sprits'", "did you mean 'sprites'")),
        (["--prompts", "0"], ("--prompts", "at least 1")),
        (["--split", "train"], ("--split", "'train'")),
        (["--switch-mode", "hold"], ("--switch-mode", "'hold'")),
        (["rport", "x"], ("cannot rport x", "eval report")),
        (["report", "nowhere"], ("unknown kind",)),
    ],
)
def test_bad_input_is_one_line(evaluate, pipes, argv, words):
    code, out, err = evaluate(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert all(word in err for word in words), err
    assert not Path("out").exists() and not pipes


def test_an_output_that_cannot_be_written_is_refused(evaluate, pipes):
    Path("file").write_text("")
    for output, words in (("file", "it is a file"), ("no/where", "no"), (None, "--output is missing")):
        code, _, err = evaluate("--prompts", 1, output=output)
        assert code == 2 and words in err and err.count("\n") == 1
    code, _, err = evaluate("report", "nowhere", output="results.md")
    assert code == 2 and "cannot read nowhere/results.json" in err


# ------------------------------------------------------------------------------------------- plots
def test_ticks_are_round_and_within():
    assert charts.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert [f"{value:g}" for value in charts.ticks(-0.41, 0.11)] == ["-0.4", "-0.3", "-0.2", "-0.1", "0", "0.1"]
    for low, high in ((-0.02, 1.02), (3.1, 57), (-4e-3, 2e-3), (0, 600)):
        found = charts.ticks(low, high)
        assert 4 <= len(found) <= 9 and low - 1e-9 <= min(found) and max(found) <= high * (1 + 1e-6)


def test_a_curve_is_where_its_values_are():
    point = lambda x, value: charts.Point(x, value, value, value)
    high = charts.lines("t", "x", "y", {"a": [point(0, 1.0), point(5, 1.0)]}, (0, 1))
    low = charts.lines("t", "x", "y", {"a": [point(0, 0.0), point(5, 0.0)]}, (0, 1))
    ink = np.array([int(charts.INKS[0][i : i + 2], 16) for i in (1, 3, 5)])
    legend = (charts.MARGIN + charts.LEFT + charts.WIDE + 8) * charts.SCALE
    rows = [np.flatnonzero((picture[:, :legend] == ink).all(-1).any(1)).mean() for picture in (high, low)]
    assert rows[1] - rows[0] == pytest.approx(charts.HIGH * charts.SCALE, abs=4)


def test_many_curves_have_an_area_each():
    point = lambda x, value: charts.Point(x, value, value, value)
    ink = np.array([int(charts.INKS[0][i : i + 2], 16) for i in (1, 3, 5)])
    flat = lambda k, n: [point(0, k / n), point(5, k / n)]
    shown = lambda n: charts.lines("t", "x", "y", {str(k): flat(k, n) for k in range(n)}, (0, 1))
    rows = lambda n: np.flatnonzero((shown(n) == ink).all(-1).sum(1) > 100)
    assert len(rows(charts.FEW)) <= 2 * charts.SCALE + 1  # one curve has this ink, in one place
    assert shown(charts.FEW + 1).shape[0] < shown(charts.FEW + 9).shape[0]
    assert np.ptp(rows(charts.FEW + 1)) > charts.PANEL[1] * charts.SCALE  # every curve has it, in an area of its own


def test_long_curves_are_thinned():
    points = [charts.Point(5 * i, i % 2, 0, 1) for i in range(7)]
    assert charts.means(points, 1) == points
    thin = charts.means(points, 4)
    assert [(p.x, p.value, p.low, p.high) for p in thin] == [(0, 0.5, 0, 1), (20, pytest.approx(1 / 3), 0, 1)]


def test_a_single_preset_is_told_by_parts(evaluate, pipes):
    assert evaluate("--suites", "identity-10", "--prompts", 3)[0] == 0
    text = Path("out/results.md").read_text()
    assert "| default [leaving], n=" in text and "| default [open], n=" in text


# ------------------------------------------------------------------------------------------- a real model
@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    """A pipeline folder with random weights."""
    from streamgen.models.text import TextEncoder, build_tokenizer
    from streamgen.models.transformer import CausalWanTransformer3DModel
    from streamgen.models.vae import StreamingVAE
    from streamgen.pipelines import StreamingVideoPipeline

    torch.manual_seed(0)
    tokenizer = build_tokenizer(["a", "red", "circle", "bouncing"], 8)
    text = TextEncoder(len(tokenizer), dim=16, num_layers=1, num_heads=2, max_length=8)
    size = dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=1)
    transformer = CausalWanTransformer3DModel(in_channels=4, out_channels=4, text_dim=16, text_len=8, **size)
    vae = StreamingVAE(latent_channels=4, widths=(8, 8, 8))
    folder = tmp_path_factory.mktemp("tiny")
    StreamingVideoPipeline(tokenizer, text.eval(), transformer.eval(), vae.eval()).save_pretrained(folder)
    return str(folder)


ONE_STEP = "default+ladder.timesteps=[1000]"


def test_a_model_runs_through(evaluate, tiny_model):
    code, _, err = evaluate("--model", tiny_model, "--presets", ONE_STEP, "--suites", "short", "--prompts", 1)
    assert code == 0, err
    found = {(preset, metric): record for (preset, _, metric), record in records().items()}
    assert found[ONE_STEP, "all_right"]["n"] == 1 and 0 <= found[ONE_STEP, "present"]["value"] <= 1


@pytest.mark.slow
def test_processes_find_what_one_finds(evaluate, tiny_model):
    presets = f"{ONE_STEP},{ONE_STEP}+cache.window=6"
    argv = ("--model", tiny_model, "--presets", presets, "--suites", "short", "--prompts", 1, "--threads", 1)
    for jobs, output in ((1, "one"), (2, "two")):
        assert evaluate(*argv, "--jobs", jobs, output=output)[0] == 0
    assert Path("one/results.json").read_bytes() == Path("two/results.json").read_bytes()
