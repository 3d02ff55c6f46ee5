"""The evaluation against the world's own pictures: truth scores 1, anything else is noticed."""

from types import SimpleNamespace

import numpy as np
import pytest

from streamgen.evaluation.sprites import (
    ATTRIBUTES,
    Suite,
    colour_switches,
    generate,
    measure,
    measure_switch,
    specified,
    underspecified,
)
from streamgen.worlds.sprites import Change, Timeline, parse, render, split


class Painter:
    """A pipeline whose streams are the renderer's: 9 frames, then 12 at a time; `ignore` makes it deaf to switches."""

    def __init__(self, ignore: bool = False) -> None:
        self.ignore = ignore

    def stream(self, prompt, num_frames=None, seed=0):
        return Stream(prompt, num_frames, seed, self.ignore)


class Stream:
    def __init__(self, prompt, num_frames, seed, ignore) -> None:
        self.prompts = [prompt] if isinstance(prompt, str) else prompt
        self.changes = [[Change(0, parse(p))] for p in self.prompts]
        self.single, self.num_frames, self.seed, self.ignore = isinstance(prompt, str), num_frames, seed, ignore
        self.done = 0

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...

    def set_prompt(self, prompt: str) -> None:
        if not self.ignore:
            self.changes[0].append(Change(self.done, parse(prompt)))

    def next(self):
        count = 12 if self.done else 9
        until = self.done + count
        clips = [render(Timeline(tuple(c)), until, self.seed + i)[self.done :] for i, c in enumerate(self.changes)]
        self.done = until
        return SimpleNamespace(frames=clips[0] if self.single else np.stack(clips))

    def __iter__(self):
        while self.done < self.num_frames:
            yield self.next()


def test_suites_are_held_out_and_name_what_they_should():
    for scene in specified(20).scenes:
        assert scene.complete and split(scene) == "val"
    for scene in underspecified(20).scenes:
        assert not scene.complete and split(scene) == "val"
    before, after = colour_switches(10)
    for old, new in zip(before.scenes, after.scenes, strict=True):
        assert old.actors[0].colour != new.actors[0].colour and old.background == new.background
    assert specified(5) == specified(5) and specified(5) != specified(5, seed=2)


def test_truth_scores_one_on_every_attribute():
    suite, kept = specified(6), []
    report = measure(generate(Painter(), suite.prompts, 57, batch=4), suite, keep=kept.append)
    assert {name: report[name] for name in ATTRIBUTES} == dict.fromkeys(ATTRIBUTES, 1.0)
    assert report["identity_changes_per_minute"] == 0 and report["n"] == len(kept) == 6
    assert kept[0].shape == (57, 128, 128, 3)


def test_another_scene_scores_less():
    told = Suite("told", (parse("a red circle bouncing on a navy background"),))
    shown = [render("a red square circling on a gray background", 57)]
    report = measure(shown, told)
    assert (report["colour"], report["shape"], report["motion"], report["background"]) == (1, 0, 0, 0)
    assert report["all_right"] == 0 and report["whole"] == 1


@pytest.mark.parametrize("deaf, arrived", [(False, 1.0), (True, 0.0)])
def test_a_switch_is_seen_to_arrive_or_not(deaf, arrived):
    report = measure_switch(Painter(ignore=deaf), 3)
    assert report["arrived"] == arrived
    assert report["rest_right"] > 0.9
    if not deaf:
        assert report["delay_seconds"] == 0
