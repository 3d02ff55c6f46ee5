"""`streamgen presets`: what it says of a preset is what the engine does with it."""

import re
import shlex
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from streamgen.cache.policies import POLICIES
from streamgen.cli import main
from streamgen.cli.plots import COLOURS, picture, reads_of, schedule_of
from streamgen.cli.presets import regions, tick_table
from streamgen.config import available, load_preset
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.noise import SeededNoise
from streamgen.schedules import SCHEDULES
from streamgen.walk import cost, walk

DOCS = Path(__file__).parents[2] / "docs"
NAMES = available("presets")
ADDED = ("causal-forcing", "motionstream", "streamdit")
ABSOLUTE = "positions.rule=absolute"
COUPLED = {  # what no preset uses yet
    "fused": ["schedule.coupling=joint-causal", "schedule.stagger=1", "schedule.commit=fused", ABSOLUTE],
    "fused-apart": ["schedule.coupling=joint", "schedule.stagger=2", "schedule.commit=fused", ABSOLUTE],
    "fused-solo": ["schedule.commit=fused", ABSOLUTE],
    "inplace-joint": ["schedule.coupling=joint-causal", "schedule.stagger=3", "schedule.commit=inplace", ABSOLUTE],
    "stagger-list": ["schedule.coupling=joint", "schedule.stagger=[4,2,1]"],
    "sink-alone": ["cache.window=6"],
    "cut": ["switch.mode=cut"],
    "keep": ["switch.mode=keep"],
}


def engine_of(name: str, *overrides: str, model=None) -> Engine:
    return Engine(model, load_preset(name, overrides))


def ran(engine: Engine, chunks: int, switches: list[int]) -> list[tuple]:
    """What the engine traced, with weights."""
    engine.tracing = True
    text, frames = torch.ones(1, 2, 4), engine.config.chunk.frames(chunks - 1).stop
    told = {frame: text + i + 1 for i, frame in enumerate(switches)}
    with torch.no_grad():
        for _ in engine.run(text, SeededNoise(0), frames, (2, 2), told, negative_prompt_embeds=text):
            pass
    return [
        (c.tick, c.kind, c.source, c.chunks, c.frames, c.key_frames, c.key_positions, c.query_positions, c.writes)
        for c in engine.trace()
    ]


def walked(engine: Engine, chunks: int, switches: list[int]) -> list[tuple]:
    """The same of a walk."""
    return [
        (
            c.tick if c.call.source == "flight" else -1,
            c.call.kind.value,
            c.call.source,
            tuple(slot.chunk for slot in c.row.slots),
            tuple(frame for part in c.frames for frame in part),
            tuple(g.key_frames for g in c.plan.groups),
            tuple(g.key_positions for g in c.plan.groups),
            tuple(g.query_positions for g in c.plan.groups),
            tuple(w.frame for w in c.plan.writes),
        )
        for c in walk(engine, chunks, switches)
    ]


# --- the walk


@pytest.mark.parametrize("switches", [[], [7, 8, 22]], ids=["one-prompt", "switched"])
@pytest.mark.parametrize("name", NAMES)
def test_the_walk_of_a_preset_is_what_the_engine_runs(stub, name, switches):
    engine = engine_of(name, model=stub)
    calls = walked(engine_of(name), 12, switches)
    assert calls == ran(engine, 12, switches)
    assert {chunk for call in calls for chunk in call[3]} == set(range(12))


@pytest.mark.parametrize("switches", [[], [7, 8, 22]], ids=["one-prompt", "switched"])
@pytest.mark.parametrize("overrides", COUPLED.values(), ids=COUPLED)
def test_the_walk_of_any_coupling_is_what_the_engine_runs(stub, overrides, switches):
    engine = engine_of("default", *overrides, model=stub)
    assert walked(engine_of("default", *overrides), 9, switches) == ran(engine, 9, switches)


@pytest.mark.parametrize("name", [name for name in NAMES if load_preset(name).cache.window != -1])
def test_an_endless_walk_begins_like_a_finite_one(name):
    endless = list(islice(walk(engine_of(name)), 40))
    assert endless == list(islice(walk(engine_of(name), 60), 40))


def test_a_walk_does_not_reset():
    with pytest.raises(InputError, match="switch.mode=reset"):
        list(walk(engine_of("default", "switch.mode=reset"), 4, [3]))


@pytest.mark.parametrize(
    "name, first, calls, frames, kept",
    [
        ("self-forcing", 4, 5, 15, None),
        ("rolling-forcing", 5, 2, 18, 21),  # one call of five chunks, one commit
        ("diagonal", 4, 2, 6, 9),  # two steps, the second one commits
        ("memflow", 4, 5, 15, 13),  # sink 3, bank 3 and the newest record, recent 6
        ("motionstream", 4, 5, 15, 6),
    ],
)
def test_cost_of_a_further_chunk(name, first, calls, frames, kept):
    spent = cost(engine_of(name))
    assert (spent.first, spent.calls, spent.frames, spent.kept) == (first, calls, frames, kept)


def test_a_fused_commit_saves_a_call_and_no_frames():
    joint = ("schedule.coupling=joint", "schedule.stagger=1", ABSOLUTE)
    apart, fused = (cost(engine_of("default", *joint, f"schedule.commit={how}")) for how in ("separate", "fused"))
    assert (apart.calls, fused.calls) == (2, 1) and apart.frames == fused.frames == 15


# --- presets that are here without a golden file


@pytest.mark.parametrize("name", ADDED)
def test_an_added_preset_streams_what_it_says(stub, name):
    engine = engine_of(name, model=stub)
    size = engine.config.chunk.latent_frames
    chunks = list(engine.run(torch.ones(1, 2, 4), SeededNoise(0), 6 * size, (2, 2)))
    assert [chunk.latents.shape for chunk in chunks] == 6 * [(1, 4, size, 2, 2)]
    assert all(chunk.latents.isfinite().all() for chunk in chunks)
    assert engine.config.parity == "schedule"  # nothing was compared with


def test_causal_forcing_computes_what_self_forcing_does():
    assert {**vars(load_preset("causal-forcing")), "parity": ""} == {**vars(load_preset("self-forcing")), "parity": ""}


def test_causal_forcing_in_two_steps_begins_with_four():
    steps = "ladder.timesteps=[[1000,750,500,250],[1000,500]]"
    engine = engine_of("causal-forcing", "chunk.latent_frames=1", steps)
    assert [engine.steps(chunk) for chunk in range(3)] == [4, 2, 2]
    assert engine.ladder_of(5).timesteps == pytest.approx([1000, 5000 / 6])


def test_motionstream_reads_a_chunk_of_sink_and_one_of_window_at_nine_positions():
    call = next(call for call in walk(engine_of("motionstream"), 18) if call.frames[0].start == 51)
    (group,) = call.plan.groups
    assert group.key_frames == (0, 1, 2, 48, 49, 50, 51, 52, 53)
    assert group.key_positions == tuple(range(9)) and group.query_positions == (6, 7, 8)


def test_streamdit_is_a_moving_buffer_that_caches_nothing():
    calls = [call for call in walk(engine_of("streamdit"), 20) if call.tick == 11]
    (call,) = calls
    assert [(slot.chunk, slot.p_in) for slot in call.row.slots] == [(4 + i, 7 - i) for i in range(8)]
    (group,) = call.plan.groups
    assert group.key_frames == tuple(range(8, 24)) and group.key_positions == tuple(range(16))
    assert call.emits == (4,) and not call.plan.writes


# --- the table


def test_the_table_has_every_preset_with_its_numbers(capsys):
    assert main(["presets"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    rows = {line.split()[0]: re.split(r"\s{2,}", line) for line in lines}
    assert {len(row) for row in rows.values()} == {len(re.split(r"\s{2,}", header))} == {12}
    assert rows["rolling-forcing"][1:11] == [
        "joint +1", "sink 3, recent 3, flight 15", "before", "5", "21", "2", "18", "5", "separate", "golden",
    ]  # fmt: skip
    assert rows["reward-forcing"][2] == "EMA sink 3, recent 3, flight 3"
    assert rows["anchor-forcing"][2] == "sink 3, anchors 3, recent 6, flight 3"
    assert rows["memflow"][2] == "sink 3, bank 3, recent 6, flight 3"
    assert rows["self-forcing"][2:6] == ["recent all, flight 3", "absolute", "4", "all"]
    assert rows["diagonal"][8:10] == ["4/3/2", "inplace"]
    assert rows["streamdiffusion-v2"][2] == "sink 3, recent 2, flight 1"  # its first chunk of two apart


# --- ticks as text


def ticks(name: str, last: int, *overrides: str, switches=()) -> list[str]:
    """Rows of the tick table, one space between cells."""
    engine = engine_of(name, *overrides)
    calls = [call for call in walk(engine, 20, switches) if call.tick < last]
    return [" ".join(line.split()) for line in tick_table(calls).splitlines()]


@pytest.mark.parametrize(
    "name, said",
    [
        ("default", ["denoise: 3 frames reading sink 3, recent 15, flight 3",
                     "clean: 3 frames reading sink 3, recent 15, flight 3"]),
        ("magi", ["denoise: 24 frames in 4 groups, the last reading recent 6, flight 24",
                  "denoise: 30 frames in 5 groups, the last reading flight 30"]),
        ("self-forcing", ["it keeps every frame, so no two calls are alike"]),
    ],
)  # fmt: skip
def test_the_calls_that_a_stream_repeats_are_listed(name, said, capsys):
    assert main(["presets", "show", name, "--ticks", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.strip() for line in lines[lines.index("in steady state:") + 1 :]) == sorted(said)


def test_ticks_of_chunks_in_flight_together():
    assert ticks("rolling-forcing", 7)[1:] == [
        "0 0 . . . . . .", "1 1 0 . . . . .", "2 2 1 0 . . . .", "3 3 2 1 0 . . .", "4 4*c 3 2 1 0 . .",
        "5 . 4*c 3 2 1 0 .", "6 . . 4*c 3 2 1 0",
    ]  # fmt: skip


def test_a_fused_commit_stands_in_the_next_tick():
    shown = ticks("default", 6, *COUPLED["fused"])
    assert shown[4:] == ["3 3* 2 1 0 . .", "4 c 3* 2 1 0 .", "5 . c 3* 2 1 0"]


def test_an_inplace_commit_stands_at_the_last_step():
    assert ticks("diagonal", 9)[4:] == ["3 3*c . .", "4 . 0 .", "5 . 1 .", "6 . 2*c .", "7 . . 0", "8 . . 1*c"]


def test_what_nobody_reads_is_not_committed():
    shown = ticks("default", 8, "cache.window=6")  # room for the sink alone
    assert [row.split()[2] for row in shown[7:]] == ["2", "3*"] and "3*c" in shown[4]
    assert not any("c" in row for row in ticks("streamdit", 12))


def test_a_switch_stands_where_it_takes_effect():
    shown = ticks("longlive", 9, switches=[4])
    assert shown[-2:] == ["switch r r .", "8 . . 0"]


# --- pictures


@pytest.mark.parametrize("name", ["memflow", "streamdit"])
def test_a_picture_is_written(name, tmp_path, capsys):
    path = tmp_path / "out.png"
    assert main(["presets", "show", name, "--plot", str(path), "cache.ema_decay=null"]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    with Image.open(path) as image:
        width, height = image.size
        assert 1300 < width < 2400 and 700 < height < 2400 and image.format == "PNG"
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert path.stat().st_size < 60_000


def regions_in(array: np.ndarray) -> set[str]:
    colour = lambda code: np.frombuffer(bytes.fromhex(code[1:]), np.uint8)
    return {name for name, code in COLOURS.items() if (array == colour(code)).all(-1).any()}


@pytest.mark.parametrize(
    "name, switches, shown",
    [
        ("causal-forcing", [], {"recent", "own"}),
        ("longlive", [], {"sink", "recent", "own"}),
        ("memflow", [], {"sink", "bank", "recent", "own"}),
        ("rolling-forcing", [], {"sink", "recent", "own", "others"}),
        ("anchor-forcing", [9], {"sink", "anchor", "recent", "own"}),
        ("deep-forcing", [], {"sink", "chosen", "recent", "own"}),
        ("tempcache", [], {"sink", "merged", "recent", "own"}),
        ("shotstream", [12], {"context", "recent", "own"}),
        ("timestep-pipeline", [], {"sink", "recent", "own"}),
    ],
)
def test_a_picture_shows_the_regions_that_are_read(name, switches, shown):
    engine = engine_of(name)
    assert regions_in(picture(engine, walk(engine, 10, switches), name)) == shown


def test_bad_requests_are_refused(tmp_path, capsys):
    for argv, word in (
        (["show", "default", "--plot", str(tmp_path / "out.gif")], ".png"),
        (["show", "default", "--plot", str(tmp_path / "no" / "out.png")], "does not exist"),
        (["--plot", "out.png"], "presets show NAME"),
        (["show", "default", "--plot", str(tmp_path / "out.png"), "--ticks", "9999"], "200 or fewer"),
        (["show", "default", "cache.window=3"], "below its floor"),
    ):
        assert main(["presets", *argv]) == 2
        assert word in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- the document


def commands() -> list[list[str]]:
    """Every command of docs/mechanisms.md that draws."""
    lines = (DOCS / "mechanisms.md").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("    streamgen presets show")]


def test_before_the_first_chunk_has_left_there_is_a_schedule_alone(tmp_path):
    path = tmp_path / "out.png"
    assert main(["presets", "show", "default", "--ticks", "2", "--plot", str(path)]) == 0
    with Image.open(path) as image:
        assert image.size[1] < 500


def test_a_row_shows_the_commit_where_it_reads_otherwise():
    tails = [row.commit for row in reads_of(walk(engine_of("rolling-forcing"), 12))]
    assert not any(tails[:3])  # as long as the sink is where it was, both see the same
    assert [(key.frame, key.position) for key in tails[7]] == [(frame, frame) for frame in range(3, 24)]
    fused = engine_of("default", *COUPLED["fused"])
    assert not any(row.commit for row in reads_of(walk(fused, 12)))


def test_a_context_that_is_made_anew_has_a_row_of_its_own():
    engine = engine_of("krea")
    calls = list(walk(engine, 4))
    rows = reads_of(calls)
    assert [row.label for row in rows] == [
        "chunk 0", "context", "chunk 1", "context", "chunk 2", "context", "chunk 3",
    ]  # fmt: skip
    assert [(key.frame, key.position) for key in rows[5].keys] == [(6, 0), (7, 1), (8, 2)]
    shown = schedule_of(engine, calls)
    assert shown.contexts == {5: [0], 10: [1], 15: [2]} and not shown.switches


def test_blank_frames_have_places_and_no_numbers():
    first, then = reads_of(walk(engine_of("shotstream"), 2))[:2]
    assert (first.label, then.label) == ("context", "chunk 0")
    assert [(key.text, key.position) for key in then.keys if key.region == "context"] == [("-", i) for i in range(6)]


def test_frames_that_count_less_are_paler():
    row = reads_of(walk(engine_of("longlive", "cache.attention_bias=0.3"), 6))[5]
    weights = {key.region: key.weight for key in row.keys}
    assert weights == pytest.approx({"sink": 1, "recent": 0.3, "own": 1})
    recent = next(key.colour for key in row.keys if key.region == "recent")
    assert sum(recent) > sum(ImageColor.getrgb(COLOURS["recent"]))


def test_rows_of_one_tick_stand_in_one_line():
    assert ticks("streamdiffusion-v2", 5)[1:] == [
        "0 0c . . .", "1 1*c . . .", "2 . 0c . .", "3 . 1*c 0c .", "4 . . 1*c 0c",
    ]  # fmt: skip
    (row,) = [line for line in ticks("timestep-pipeline", 6) if line.startswith("5 ")]
    assert row == "5 . . 3*c 2c 1c 0c"
    engine = engine_of("timestep-pipeline")
    cells = schedule_of(engine, walk(engine, 6)).cells
    assert [cells[chunk, 5].mark for chunk in range(2, 6)] == ["3", "2", "1", "0"]
    assert all(cells[chunk, 5].committed for chunk in range(2, 6))
    assert [cells[chunk, 5].leaves for chunk in range(2, 6)] == [True, False, False, False]
    last = next(row for row in reads_of(walk(engine, 8)) if row.label == "chunk 6")
    assert [(key.frame, key.position) for key in last.keys[:3]] == [(0, 35), (1, 36), (2, 37)]  # ahead of 18


def test_a_row_counts_what_was_folded_into_the_sink():
    rows = reads_of(walk(engine_of("reward-forcing"), 6))
    assert [row.keys[0].text for row in rows] == ["0", "0", "0", "0+1", "0+2", "0+3"]
    assert [(key.frame, key.position) for key in rows[5].keys] == list(zip([0, 1, 2, *range(12, 18)], range(9)))


@pytest.mark.parametrize("argv", commands(), ids=lambda argv: Path(argv[argv.index("--plot") + 1]).stem)
def test_the_pictures_of_the_document_are_what_their_commands_draw(argv, tmp_path):
    shown = DOCS.parent / argv[argv.index("--plot") + 1]
    assert shown.stat().st_size < 60_000
    fresh = tmp_path / shown.name
    assert main([str(fresh) if word.endswith(".png") else word for word in argv]) == 0
    with Image.open(shown) as old, Image.open(fresh) as new:
        assert old.size == pytest.approx(new.size, rel=0.03)  # another typeface may come with another Pillow


def test_the_document_names_what_exists():
    text = (DOCS / "mechanisms.md").read_text(encoding="utf-8")
    drawn = {Path(argv[argv.index("--plot") + 1]).name for argv in commands()}
    assert set(re.findall(r"\]\(mechanisms/([\w-]+\.png)\)", text)) == drawn
    assert {path.name for path in (DOCS / "mechanisms").iterdir()} == drawn
    knobs = re.findall(r"^Knobs: (.+?)\.$", text, re.MULTILINE | re.DOTALL)
    assert len(knobs) == len(drawn)
    for key in {key for line in knobs for key in re.findall(r"`([a-z_]+\.[a-z_.]+)`", line)}:
        node = load_preset("default")
        for part in key.split("."):
            node = getattr(node, part)


def test_the_readme_names_every_preset_and_what_it_was_compared_with():
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (`.+?`) \| .+ \| (.+?) \|$", text.split("## Presets")[1].split("\n## ")[0], re.MULTILINE)
    said = {name: said for names, said in lines for name in re.findall(r"`([\w-]+)`", names)}
    assert set(said) == set(NAMES)
    golden = {name for name, words in said.items() if re.search(r"its public code, \d\.\de-6", words)}
    assert golden - {"longlive-infinite"} == {name for name in NAMES if load_preset(name).parity == "golden"}


def test_the_extension_of_the_readme_works_and_can_be_drawn(monkeypatch, tmp_path, capsys):
    for registry in (POLICIES, SCHEDULES):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.+?)```", text, re.DOTALL) if "register_policy" in code]
    exec(block, {"__name__": "mine"})
    (command,) = re.findall(r"`streamgen (presets show default .+?)`", text)
    assert main([*command.split(), "--plot", str(tmp_path / "out.png")]) == 0
    assert main([*command.split(), "--ticks", "5"]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    at = shown.index("TICK 0 1 2 3")
    assert shown[at : at + 6] == ["TICK 0 1 2 3", "0 0 0 . .", "1 1 1 . .", "2 2 2 . .", "3 3*c 3*c . .", "4 . . 0 0"]


def test_the_policy_of_the_document_works_and_can_be_drawn(monkeypatch, stub):
    monkeypatch.setattr(POLICIES, "_items", dict(POLICIES._items))
    text = (DOCS / "mechanisms.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    exec(block, {"__name__": "mine"})
    overrides = ("cache.policy=every-other", "cache.window=12", "positions.rule=packed")
    calls = walked(engine_of("default", *overrides), 8, [])
    assert calls == ran(engine_of("default", *overrides, model=stub), 8, [])
    assert calls[-1][5] == ((0, 1, 2, 15, 17, 19, 21, 22, 23),)
    engine = engine_of("default", *overrides)
    assert regions_in(picture(engine, walk(engine, 8), "mine")) == {"sink", "recent", "own"}
    assert regions(engine) == "every-other, flight 3"
