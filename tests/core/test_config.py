"""Configuration: order of layers, and one-line refusals that say what was meant."""

import re

import pytest

from streamgen.config import (
    ChunkConfig,
    StreamConfig,
    available,
    check_switch,
    config_root,
    load_preset,
    merge,
    read_config,
)
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.hub import model_config, stream_config


@pytest.mark.parametrize("name", available("presets"))
def test_every_shipped_preset_loads_and_names_its_paper(name):
    config = load_preset(name)
    assert config.parity in ("golden", "weights", "schedule")
    first = (config_root() / "presets" / f"{name}.yaml").read_text().splitlines()[0]
    assert re.match(r"# .+(arXiv:\d{4}\.\d{4,5}|github\.com/\S+)", first), first  # the paper, or its code


@pytest.mark.parametrize("name", available("models"))
def test_every_shipped_model_fits_every_preset(name):
    settings = model_config(name)
    for preset in available("presets"):
        assert isinstance(stream_config(preset, settings), StreamConfig)
    assert settings.preset in available("presets")


def test_layers_win_in_order_defaults_preset_model_dotlist():
    default, preset = StreamConfig(), load_preset("self-forcing")
    assert (default.cache.window, preset.cache.window) == (21, -1)
    model = {"cache": {"window": 12, "sink": 3}, "positions": {"rule": "packed"}}
    config = load_preset("self-forcing", ["cache.window=9"], model)
    assert (config.cache.window, config.cache.sink, config.positions.rule) == (9, 3, "packed")
    assert config.ladder == preset.ladder and config.guidance == default.guidance
    assert load_preset("self-forcing", ["cache.window=9", "cache.window=15"]).cache.window == 15
    assert load_preset("self-forcing").cache.window == -1  # nothing leaked


def test_a_list_replaces_a_list():
    assert load_preset("self-forcing", ["ladder.timesteps=[1000,500]"]).ladder.timesteps == [1000, 500]


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["cache.windwo=9"], ["override", "unknown key", "cache.windwo", "did you mean 'cache.window'"]),
        (["cahce.window=9"], ["unknown key", "cahce", "did you mean 'cache'"]),
        (["cache.window=wide"], ["override", "cache.window", "wide"]),
        (["cache.window=9.5"], ["cache.window", "9.5"]),
        (["ladder.warp=maybe"], ["ladder.warp", "maybe"]),
        (["ladder.timesteps=[a,b]"], ["ladder.timesteps", "a"]),
        (["cache.window"], ["override", "'cache.window'", "KEY=VALUE"]),
        (["switch.mode=recahce"], ["switch.mode", "did you mean 'recache'", "keep, recache, reset, cut"]),
        (["guidance.commit_branch=both"], ["own, positive"]),
        (["chunk.latent_frames=0"], ["chunk.latent_frames", "at least 1"]),
        (["schedule.commit_level=1000"], ["commit_level", "0-1000"]),
        (["cache.window=["], ["override", "not YAML"]),
        (["cache.options=[1]"], ["override", "keys and values"]),
    ],
)
def test_bad_overrides_are_refused_in_one_line(overrides, words):
    with pytest.raises(InputError) as caught:
        load_preset("self-forcing", overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, words", [("self-forceing", "did you mean 'self-forcing'"), ("../models/sprites", "unknown")]
)
def test_unknown_presets_are_refused_with_the_choices(name, words):
    with pytest.raises(InputError, match="choose one of .*self-forcing") as caught:
        load_preset(name)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "preset, override, words",
    [
        ("deep-forcing", "switch.mask=block-causal", "chunk by chunk"),
        ("anchor-forcing", "cache={anchors: 2, anchor_every: 2}", "cache.anchors is 2"),
        ("memflow", "positions={rule: trail}", "those in a bank lose"),
    ],
)
def test_what_would_break_in_the_middle_of_a_stream_is_refused_before_it(preset, override, words):
    config = load_preset(preset, [override])
    with pytest.raises(InputError, match=words) as caught:
        Engine(None, config)
    assert "\n" not in str(caught.value)


def test_a_cut_is_refused_where_nothing_is_cached():
    check_switch("cut", load_preset("default"))
    with pytest.raises(InputError, match="schedule.commit=none"):
        check_switch("cut", load_preset("ar-diffusion"))
    with pytest.raises(InputError, match="leave blend out"):
        check_switch("reset", load_preset("default"), blend=2)


def test_a_file_is_named_in_its_refusal(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("latent_frame: 4\n")
    with pytest.raises(InputError, match="mine.yaml: unknown key 'latent_frame'.*'latent_frames'"):
        read_config(ChunkConfig, path)
    path.write_text("latent_frames: 4\n")
    assert read_config(ChunkConfig, path, ["latent_frames=5"]) == ChunkConfig(5)


def test_merge_takes_dataclasses_dicts_and_dotlists():
    assert merge(ChunkConfig, ChunkConfig(2), {"latent_frames": 4}, ["latent_frames=5"]).latent_frames == 5
