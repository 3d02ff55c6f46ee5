"""What VBench reads and writes, from its documented layout; VBench itself is not needed."""

from __future__ import annotations

import json

import pytest

from streamgen.errors import InputError
from streamgen.evaluation.vbench import (
    CUSTOM_DIMENSIONS,
    DIMENSIONS,
    Entry,
    entries,
    read_full_info,
    read_results,
    write_layout,
)

CAT = "A cat, in the rain"


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def results(tmp_path, data) -> str:
    path = tmp_path / "x_eval_results.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return str(path)


def test_videos_are_named_by_prompt_and_index(tmp_path):
    layout = write_layout(tmp_path / "vb", entries([CAT, "a façade"], ["motion_smoothness"]), samples=2)
    names = [f"{CAT}-0.mp4", f"{CAT}-1.mp4", "a façade-0.mp4", "a façade-1.mp4"]
    assert [path.name for _, _, path in layout.videos()] == names
    assert [(prompt, sample) for prompt, sample, _ in layout.videos()][1:3] == [(CAT, 1), ("a façade", 0)]
    assert load(tmp_path / "vb" / "full_info.json") == [
        {"prompt_en": CAT, "dimension": ["motion_smoothness"]},
        {"prompt_en": "a façade", "dimension": ["motion_smoothness"]},
    ]
    assert load(tmp_path / "vb" / "prompts.json") == dict(zip(names, [CAT, CAT, "a façade", "a façade"]))
    assert layout.mode == "vbench_standard" and list(layout.videos_path.iterdir()) == []
    layout.video(1, 0).write_bytes(b"")
    assert [path.name for path in layout.missing()] == [*names[:2], names[3]]
    for wrong in ((2, 0), (0, 2), (-1, 0)):
        with pytest.raises(IndexError):
            layout.video(*wrong)


def test_prompts_that_are_no_file_names_are_numbered(tmp_path):
    prompts = ["1/2 of a cat", "cat " * 80, "a cat\nand a dog"]
    for prompt, message in zip(prompts, ("file name", "326 bytes, above 255", "file name")):
        with pytest.raises(InputError, match=message) as caught:
            write_layout(tmp_path / "vb", entries([CAT, prompt]))
        assert "\n" not in str(caught.value) and not (tmp_path / "vb").exists()
    layout = write_layout(tmp_path / "vb", entries(prompts), samples=1, numbered=True)
    assert layout.mode == "custom_input"
    assert load(tmp_path / "vb" / "prompts.json") == {f"0000{i}-0.mp4": prompt for i, prompt in enumerate(prompts)}


def test_long_videos(tmp_path):
    assert write_layout(tmp_path / "vb", entries([CAT]), long=True).mode == "long_vbench_standard"
    with pytest.raises(InputError, match="`_`"):
        write_layout(tmp_path / "vb", entries(["a snake_case cat"]), long=True)
    assert write_layout(tmp_path / "vb", entries(["a_b"]), long=True, numbered=True).mode == "long_custom_input"


def test_impossible_layouts_are_refused(tmp_path):
    with pytest.raises(InputError, match="twice"):
        write_layout(tmp_path / "vb", entries([CAT, "a dog", CAT]))
    for prompts, samples in (([], 5), ([CAT], 0)):
        with pytest.raises(InputError, match="make no video"):
            write_layout(tmp_path / "vb", entries(prompts), samples)
    with pytest.raises(InputError, match="unknown VBench dimension 'beauty'"):
        entries([CAT], ["beauty"])
    with pytest.raises(InputError, match="no dimension"):
        entries([CAT], [])
    with pytest.raises(InputError, match="labels"):
        entries([CAT], ["color"])
    with pytest.raises(InputError, match="do not number names"):
        write_layout(tmp_path / "vb", [Entry("a red car", ("color",), {"color": {"color": "red"}})], numbered=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="it is a file"):
        write_layout(tmp_path / "file", entries([CAT]))


def test_vbenchs_own_prompts_keep_their_labels(tmp_path):
    labels = {"color": {"color": "red"}}
    path = tmp_path / "VBench_full_info.json"
    info = [
        {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": labels},
        {"prompt_en": CAT, "dimension": ["subject_consistency", "temporal_flickering"]},
    ]
    path.write_text(json.dumps(info))
    found = read_full_info(path)
    assert found == [Entry("a red car", ("color",), labels), Entry(CAT, tuple(info[1]["dimension"]))]
    assert read_full_info(path, CUSTOM_DIMENSIONS) == [Entry(CAT, ("subject_consistency",))]
    write_layout(tmp_path / "vb", found)
    assert load(tmp_path / "vb" / "full_info.json") == info
    for wrong in ('{"a": 1}', '[{"prompt_en": "x"}]', '[{"dimension": ["color"]}]', "[3]", "{"):
        path.write_text(wrong)
        with pytest.raises(InputError, match="VBench_full_info"):
            read_full_info(path)
    assert len(DIMENSIONS) == len(set(DIMENSIONS)) == 16


def row(name: str, value) -> dict:
    return {"video_path": f"/data/vb/videos/{name}", "video_results": value}


def test_results_become_records(tmp_path):
    path = results(tmp_path, {
        "dynamic_degree": [0.5, [row("a-0.mp4", True), row("b-0.mp4", False)]],
        "imaging_quality": [0.6, [row("a-0.mp4", 55.0), row("b-0.mp4", 65.0)]],
        "motion_smoothness": [0.9, [row("a-0_000.mp4", 0.8), row("a-0_001.mp4", 1.0)], [row("a-0.mp4", 0.9)]],
    })  # fmt: skip
    dynamic, imaging, smooth = read_results(path)
    assert (dynamic.dimension, dynamic.value, dynamic.videos) == ("dynamic_degree", 0.5, {"a-0.mp4": 1, "b-0.mp4": 0})
    assert imaging.value == 0.6 and imaging.videos == {"a-0.mp4": 0.55, "b-0.mp4": 0.65}
    assert smooth.videos == {"a-0.mp4": 0.9}  # of VBench-Long, videos and not their clips
    record = imaging.record("sprites", "longlive")
    assert list(record) == ["model", "preset", "suite", "metric", "value", "low", "high", "n"]
    assert record["metric"] == "imaging_quality" and record["n"] == 2
    assert 0.55 <= record["low"] < 0.6 < record["high"] <= 0.65
    old = read_results(results(tmp_path, {"imaging_quality": [60.0, [row("a-0.mp4", 60.0)]]}))  # a mean in percent
    assert old[0].value == 0.6 and old[0].record("m", "p")["low"] is None


@pytest.mark.parametrize(
    "data",
    [
        "", "{", "[]", "{}", '{"color": 0.5}', '{"color": [0.5]}', '{"color": ["high", []]}', '{"color": [NaN, []]}',
        '{"color": [0.5, 3]}', '{"color": [0.5, [3]]}', '{"color": [0.5, [{"video_path": "a.mp4"}]]}',
        '{"color": [0.5, [{"video_results": 1}]]}', '{"color": [0.5, [{"video_path": "a", "video_results": "x"}]]}',
    ],
)  # fmt: skip
def test_malformed_results_are_refused_in_one_line(tmp_path, data):
    with pytest.raises(InputError, match="x_eval_results.json") as caught:
        read_results(results(tmp_path, data))
    assert "\n" not in str(caught.value)


def test_absent_results_are_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_results(tmp_path / "none.json")
