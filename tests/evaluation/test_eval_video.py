"""Any video through `streamgen eval`, VBench's folder, and what `short` and `long` show beside their values."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from streamgen.cli import eval_vbench, main
from streamgen.errors import InputError
from streamgen.evaluation.confusions import count, pairs, said
from streamgen.evaluation.suites.base import Case
from streamgen.evaluation.suites.short import LongJudge
from streamgen.evaluation.video import file_metrics
from streamgen.media import open_sink, read_video
from streamgen.worlds.sprites import Change, Timeline, parse, read, render

ROOT = Path(__file__).resolve().parents[2]
RED = "a red circle bouncing on a navy background"


def noise(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8).repeat(2, 1).repeat(2, 2)


def write(path: str, frames: np.ndarray, fps: float = 16) -> Path:
    Path(path).parent.mkdir(exist_ok=True)
    with open_sink(path, fps) as sink:
        sink.write(frames)
    return Path(path)


@pytest.fixture
def evaluate(tmp_path, capsys, monkeypatch):
    """Run `eval` in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> tuple[int, str, str]:
        code = main(["eval", *map(str, argv)])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def clips(evaluate) -> None:
    """A folder with a frozen clip and a noisy one."""
    write("clips/frozen.mp4", np.full((24, 32, 32, 3), 90, np.uint8))
    write("clips/noisy.mp4", noise(24))
    Path("clips/notes.txt").write_text("no video")


MEAN = "def mean():\n    return lambda frames: frames.mean((0, 2, 3, 4))[None].repeat(2, 1) + frames.std()\n"


# ------------------------------------------------------------------------------------------- any video
def test_every_video_of_a_folder_is_measured(evaluate, clips):
    code, out, err = evaluate("video", "clips", "clips/noisy.mp4", "--chunk-frames", "9,12", "--output", "found")
    assert code == 0 and "written: found/metrics.json" in err
    assert "| metric | frozen.mp4 | noisy.mp4 | mean of 2 |" in out and "| stagnation | 1.00 | 0.00 |" in out
    assert "| drift_luminance_change | - | - | - |" in out  # too short for two bins
    assert out in Path("found/metrics.md").read_text()
    found = json.loads(Path("found/metrics.json").read_text())
    assert [item["file"] for item in found["videos"]] == ["clips/frozen.mp4", "clips/noisy.mp4"]
    measured, known = found["videos"][1]["metrics"], file_metrics("clips/noisy.mp4", [9, 12])
    for name, value in known.items():
        assert measured[name] == (None if value is None else pytest.approx(value, rel=1e-5)), name
    assert found["videos"][1]["metrics"]["seam"] == pytest.approx(1, abs=0.1) and found["distances"] is None
    assert found["means"]["stagnation"]["value"] == 0.5 and found["means"]["stagnation"]["n"] == 2


def test_many_videos_are_summed_up(evaluate):
    for name in "abcde":
        write(f"many/{name}/", noise(4, ord(name)) // (2 if name == "c" else 1))  # folders of pictures
    code, out, _ = evaluate("video", "many", "--fps", 16)
    assert code == 0 and "| metric | lowest | highest | mean of 5 |" in out
    line = next(line for line in out.splitlines() if line.startswith("| frame_difference"))
    assert re.search(r"\| 0\.\d+ \(c\) \| 0\.\d+ \([abde]\) \| 0\.\d+ \[", line)


def test_a_set_is_compared_with_a_reference(evaluate, clips, tmp_path, monkeypatch):
    (tmp_path / "stub_features.py").write_text(MEAN)
    monkeypatch.syspath_prepend(tmp_path)
    write("other/a.mp4", noise(32, 1) // 4)
    value = lambda out: float(re.search(r"frechet_distance \| (\S+) \|", out)[1])
    argv = ("video", "clips", "--features", "stub_features:mean", "--reference")
    (same, out, _), (other, out_other, _) = evaluate(*argv, "clips"), evaluate(*argv, "other")
    assert same == other == 0 and value(out) < 1e-6 < 1e-3 < value(out_other)
    assert "| spectral_distance_temporal | 0.00 |" in out
    write("fast/a.mp4", noise(32, 1), fps=30)
    assert "16 and 30 frames per second" in evaluate(*argv, "fast")[2]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere.mp4"], ("nowhere.mp4", "no such file")),
        (["broken.mp4"], ("broken.mp4", "no video")),
        (["one.mp4"], ("one.mp4 holds 1 frames", "at least 2")),
        (["empty"], ("empty holds no video", ".mp4")),
        (["pictures"], ("pictures does not say", "--fps")),
        (["pictures", "--fps", "0"], ("--fps", "above 0")),
        (["clips", "--chunk-frames", "9,x"], ("--chunk-frames 9,x", "'x' is not a whole number")),
        (["clips", "--chunk-frames", "0"], ("--chunk-frames", "at least 1")),
        (["clips", "--features", "vae"], ("--features", "give --reference")),
        (["clips", "--reference", "clips", "--features", "vea"], ("'vea'", "MODULE:ATTRIBUTE")),
        (["clips", "--output", "one.mp4"], ("one.mp4", "it is a file")),
        ([], ("FILE|FOLDER", "required")),
    ],
)
def test_bad_videos_are_one_line(evaluate, clips, argv, words):
    Path("empty").mkdir()
    Path("broken.mp4").write_bytes(b"no video" * 100)
    write("one.mp4", noise(1))
    write("pictures/", noise(2))
    code, out, err = evaluate("video", *argv, "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert all(word in err for word in words), err


# ------------------------------------------------------------------------------------------- VBench
class Stub:
    """A pipeline of noise; `breaks`: the stream at which somebody interrupts."""

    settings = SimpleNamespace(fps=16)

    def __init__(self, breaks: int | None = None) -> None:
        self.asked, self.breaks = [], breaks

    def stream(self, prompt, num_frames, seed):
        self.asked.append((prompt, num_frames, seed))
        if len(self.asked) == self.breaks:
            raise KeyboardInterrupt
        return self

    def __enter__(self):
        self.left = self.asked[-1][1]
        return self

    def __exit__(self, *_) -> None: ...

    def next(self):
        count, self.left = min(5, self.left), self.left - min(5, self.left)
        return SimpleNamespace(frames=noise(count))


def prompts_file(*prompts: str) -> Path:
    path = Path("prompts.txt")
    path.write_text("\n\n".join(prompts))
    return path


def test_vbench_gets_its_videos_and_an_interruption_costs_one(evaluate, monkeypatch):
    pipes = [Stub(breaks=3), Stub(), None]
    monkeypatch.setattr(eval_vbench, "load", lambda common, model, preset: pipes[0])
    argv = ("vbench", "--prompts", prompts_file("a cat", "a dog"), "--samples", 2, "--seconds", 0.5, "--seed", 7)
    argv += ("--output", "vb", "--long")
    code, _, err = evaluate(*argv)
    assert code == 130 and "renders the rest" in err
    videos = Path("vb/videos")
    assert sorted(path.name for path in videos.iterdir()) == ["a cat-0.mp4", "a cat-1.mp4"]
    interrupted, pipes[0] = pipes[0], pipes[1]
    code, out, err = evaluate(*argv)
    assert code == 0 and "2 videos are there already" in err
    assert interrupted.asked == [("a cat", 8, 7), ("a cat", 8, 8), ("a dog", 8, 7)]
    assert pipes[0].asked == [("a dog", 8, 7), ("a dog", 8, 8)]
    assert len(list(videos.iterdir())) == 4 and len(read_video(videos / "a dog-1.mp4")) == 8
    assert not Path("vb/.partial.mp4").exists()
    assert out == f"--videos_path {videos} --full_json_dir vb/full_info.json --mode long_vbench_standard\n"
    pipes[0] = None
    assert evaluate(*argv)[0] == 0  # nothing is loaded
    for more, words in (
        (("--preset", "longlive"), "videos of other settings (preset, configuration)"),
        (("--seed", 8), "other settings (seed)"),
        (("--samples", 1), "a cat-1.mp4 is none of these videos"),
    ):
        code, out, err = evaluate(*argv, *more)
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err, err


def test_vbench_takes_rendered_clips(evaluate):
    for i in range(4):
        Path(f"{i}.mp4").write_bytes(bytes([i]))
    argv = ("vbench", "--prompts", prompts_file("a cat", "1/2 of a dog"), "--output", "vb", "--videos", ".")
    code, out, _ = evaluate(*argv, "--samples", 2, "--numbered")
    assert code == 0 and "--prompt_file vb/prompts.json --mode custom_input" in out
    assert Path("vb/videos/00001-0.mp4").read_bytes() == b"\x02"
    for more, words in (
        (("--samples", 3, "--numbered"), "holds 4 .mp4 files, and prompts x samples are 6"),
        (("--samples", 2, "--output", "other"), "cannot be a file name"),
        (("--samples", 2, "--videos", "away"), "no such folder"),
        (("--samples", 2, "--prompts", "away"), "cannot read away"),
    ):
        code, out, err = evaluate(*argv, *more)
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err, err


def test_vbench_results_are_a_table(evaluate):
    row = lambda name, value: {"video_path": name, "video_results": value}
    for name, value in (("ours", 0.5), ("theirs", 0.25)):
        videos = [row("a-0.mp4", value), row("b-0.mp4", value)]
        Path(f"{name}_eval_results.json").write_text(json.dumps({"dynamic_degree": [value, videos]}))
    argv = ("vbench-results", "ours_eval_results.json", "theirs_eval_results.json")
    code, out, _ = evaluate(*argv, "--output", "found")
    assert code == 0 and out.splitlines()[0] == "| dimension | ours | theirs |"
    assert "| dynamic_degree | 0.50 [0.50, 0.50] | 0.25 [0.25, 0.25] |" in out
    assert json.loads(Path("found/vbench.json").read_text())["records"][1]["model"] == "theirs"
    Path("bad.json").write_text("{}")
    code, out, err = evaluate("vbench-results", "bad.json")
    assert (code, out, err.count("\n")) == (2, "", 1) and "no result of VBench" in err


# ------------------------------------------------------------------------------------------- beside the values
def test_long_finds_flicker_and_the_borders_of_chunks_as_they_came():
    truth = render(RED, 160, 3)
    case = Case(Timeline((Change(0, parse(RED)),)), 160, seed=0)

    def judged(frames: np.ndarray, starts: list[int]) -> dict[str, float | None]:
        judge = LongJudge(case)
        for first, stop in zip(starts, [*starts[1:], 160]):
            judge.take(frames[first:stop])
        return judge.close()

    starts = [0, 9, 21, 33, 45, 54, 66, 80, 100, 131]  # two streams, the second begins at 45
    plain = judged(truth, starts)
    assert plain["seam"] == pytest.approx(1, abs=0.1) and plain["warping_consistency"] > 0.5
    brighter = np.searchsorted(starts, np.arange(160), "right")[:, None, None, None] * 6
    steps = judged(np.clip(truth.astype(int) + brighter, 0, 255).astype(np.uint8), starts)
    assert steps["seam"] > 2 and steps["drift_luminance_change"] > 0.05 and steps["luminance_drift"] > 0.05
    blink = truth.copy()
    blink[::2, :16] = np.clip(blink[::2, :16].astype(int) + 20, 0, 255)
    assert judged(blink, starts)["flicker"] > 10 * plain["flicker"]
    assert plain["stagnation"] == 0 and plain["dynamic_degree"] > 0.5  # the world's own, in its unit


def test_what_is_confused_is_counted_the_way_round_that_fits():
    scene = parse("a red circle bouncing and a green star pulsing on a navy background")
    shown = read(render("a green star pulsing and a blue circle bouncing on a gray background", 81, 3), actors=2)
    found = pairs(shown, scene)
    assert found["colour"] == [["red", "blue"], ["green", "green"]] and found["background"] == [["navy", "gray"]]
    assert found["shape"] == [["circle", "circle"], ["star", "star"]]
    assert count([found, found])["colour"] == {"red": {"blue": 2}, "green": {"green": 2}}
    assert "green star pulsing" in said(shown) and said(shown).endswith("on gray")
    empty = read(np.zeros((24, 128, 128, 3), np.uint8), actors=1)
    assert pairs(empty, parse(RED))["motion"] == [["bouncing", "none"]]
    assert said(empty) == "nothing on black (present 0%)"
    open_scene = parse("a thing bouncing")
    assert pairs(empty, open_scene) == {"motion": [["bouncing", "none"]]}


# ------------------------------------------------------------------------------------------- benchmarks
def benchmark(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_oracle_is_measured_on_the_truth():
    oracle = benchmark("oracle")
    found = oracle.look([0, 1, 2], 0, 81, vae=False)
    report = oracle.summary(found)
    assert report["all"]["n"] == 3 and report["all"]["all_right"] == 1 and report["failed"] == 0
    assert found == oracle.look([0, 1, 2], 0, 81, vae=False) and len({clip["prompt"] for clip in found}) == 3
    found[1]["values"] |= {"shape": 0.5, "all_right": 0.0}
    report = oracle.summary(found)
    assert report["all"]["shape"] == pytest.approx(2.5 / 3, abs=1e-4)
    assert [clip["index"] for clip in report["failures"]] == [1]


def test_every_comparison_of_the_results_fits_the_embedded_model():
    from streamgen import hub
    from streamgen.engine import Engine
    from streamgen.evaluation.runner import Preset
    from streamgen.evaluation.suites import find_suite

    settings, wrong = hub.model_settings("sprites"), []
    wanted = benchmark("results").comparisons(4, 2, 2, 1, 1)
    assert len({it.folder for it in wanted}) == len(wanted)
    for name in dict.fromkeys(preset for it in wanted for preset in it.presets):
        preset = Preset.parse(name)
        try:
            Engine(None, hub.stream_config(preset.name, settings, preset.overrides))
        except InputError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong
    for it in wanted:
        assert it.prompts >= 1 and all(find_suite(suite) for suite in it.suites)
