"""A cache policy and a schedule from outside the package: by decorator, and as entry points of a distribution."""

import importlib
import sys

import pytest
import torch

from streamgen.cache.policies import POLICIES
from streamgen.config import load_preset
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.noise import SeededNoise
from streamgen.schedules import SCHEDULES
from streamgen.walk import walk

FP32 = dict(atol=5e-5, rtol=1e-4)
STEPS = "ladder.timesteps=[1000,700,400]"

SHORT = '''
import streamgen
from streamgen.cache.options import WindowOptions
from streamgen.cache.policies import WindowPolicy
from streamgen.schedules import JointSchedule, ScheduleOptions


@streamgen.register_policy("last-frame", WindowOptions)
class LastFrame(WindowPolicy):
    """Of what the window shows, the sink and the very last frame are read."""

    def visible(self, end, room):
        sink, recent = super().visible(end, room)
        return sink, recent[-1:]


@streamgen.register_schedule("pairs", ScheduleOptions)
class Pairs(JointSchedule):
    """Two chunks enter at once, the next two when they are finished."""

    def gap(self, chunk, steps):
        return steps(chunk) if chunk % 2 else 0
'''

WHOLE = '''
from dataclasses import dataclass

import streamgen
from streamgen.cache import CachePolicy, Group, Plan, Segment, Write
from streamgen.schedules import Call, CallKind, Op, OpKind, Row, Slot, SlotOp, Tick


@dataclass(frozen=True)
class LastOptions:
    count: int = 1

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count={self.count}")


@streamgen.register_policy("last-frames", LastOptions)
class LastFrames(CachePolicy):
    """The last `count` finished frames, counted from the oldest that is seen; the protocol's defaults, nothing else."""

    def __init__(self, options, sizes):
        self.pages, self.frames = options.count, 0

    def plan(self, call, row, frames):
        own = [frame for part in frames for frame in part]
        seen = list(range(max(0, self.frames - self.pages), self.frames))
        at = list(range(len(seen) + len(own)))
        cached = Segment("last", tuple(f % self.pages for f in seen), tuple(seen), tuple(at[: len(seen)]))
        flight = Segment("flight", tuple(range(len(own))), tuple(own), tuple(at[len(seen) :]))
        segments = tuple(segment for segment in (cached, flight) if segment.pages)
        group = Group(tuple(range(len(own))), tuple(at[len(seen) :]), segments)
        writes = {f % self.pages: Write(own.index(f), f, f % self.pages) for f in row.published(frames)}
        return Plan((group,), tuple(writes.values()))

    def commit(self, frames):
        self.frames = frames[-1] + 1

    def state_dict(self):
        return {"frames": self.frames}

    def load_state_dict(self, state):
        self.frames = state["frames"]


@dataclass(frozen=True)
class GroupOptions:
    stagger: object = "solo"
    commit: str = "inplace"
    size: int = 1


@streamgen.register_schedule("groups", GroupOptions)
class Groups:
    """So many chunks at a time, denoised together, published by their last step; nothing inherited."""

    def __init__(self, options):
        self.options = options

    def ticks(self, steps, chunks, first_tick=0):
        index, size = 0, self.options.size
        for first in range(0, chunks, size):
            together = range(first, min(chunks, first + size))
            for p in range(steps(first)):
                last = p + 1 == steps(first)
                row = Row(tuple(Slot(k, SlotOp.STEP, p, p + 1, publish=last) for k in together))
                ops = tuple(Op(OpKind.BEGIN, k) for k in together) if p == 0 else ()
                if index >= first_tick:
                    yield Tick(index, ops, (Call(CallKind.DENOISE, (row,)),), tuple(together) if last else ())
                index += 1

    def in_flight(self, steps, chunks=None):
        return self.options.size
'''

ENTRY_POINTS = """
[streamgen.policies]
last-frames = made_up_streams

[streamgen.schedules]
groups = made_up_streams
"""


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """What a test registers is unknown to the next one."""
    for registry in (POLICIES, SCHEDULES):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    with torch.no_grad():
        yield


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution on the path, as pip leaves it."""
    info = tmp_path / "made_up_streams-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up-streams\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "made_up_streams.py").write_text(WHOLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("made_up_streams", None)


def stream(model, embeds, *overrides: str, frames: int = 12) -> tuple[list, Engine]:
    engine = Engine(model, load_preset("default", [STEPS, *overrides]))
    engine.tracing = True
    return list(engine.run(embeds[0], SeededNoise(0), frames, (4, 4))), engine


def video(chunks) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in chunks], 2)


def seen(engine: Engine) -> list[tuple]:
    return [(c.frames, c.key_frames, c.key_positions, c.query_positions) for c in engine.trace()]


def test_a_policy_registered_by_a_decorator_streams_what_it_says(model, embeds):
    """To read the last frame alone is a window of one frame beside the chunk; a larger one is told apart."""
    exec(SHORT, {"__name__": "mine"})
    narrow = ("cache.window=4", "cache.sink=0")
    chunks, engine = stream(model, embeds, "cache.policy=last-frame", "cache.window=9", "cache.sink=0")
    wanted, plain = stream(model, embeds, *narrow)
    assert len(chunks) == 4 and seen(engine) == seen(plain)
    torch.testing.assert_close(video(chunks), video(wanted), **FP32)
    wider, _ = stream(model, embeds, "cache.window=9", "cache.sink=0")
    assert (video(chunks) - video(wider)).abs().max() > 1e-3


def test_a_schedule_registered_by_a_decorator_streams_what_it_says(model, embeds):
    """Chunks in pairs are chunks of twice the size, one at a time."""
    exec(SHORT, {"__name__": "mine"})
    inplace = ("schedule.commit=inplace", "cache.sink=0", "cache.window=9")
    chunks, engine = stream(model, embeds, "schedule.coupling=pairs", *inplace)
    wanted, plain = stream(model, embeds, "chunk.latent_frames=6", *inplace)
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3] and len(wanted) == 2
    assert seen(engine) == seen(plain)
    torch.testing.assert_close(video(chunks), video(wanted), **FP32)


def test_both_are_found_as_entry_points_without_an_import(model, embeds, installed):
    """Written from the two protocols alone, with options of their own."""
    with pytest.raises(InputError, match="unknown schedule 'pairs'"):
        load = load_preset("default", ["schedule.coupling=pairs"])
        Engine(model, load)
    assert "made_up_streams" not in sys.modules
    chunks, engine = stream(
        model, embeds, "cache.policy=last-frames", "cache.options.count=2", "schedule.coupling=groups",
        "schedule.commit=inplace", "schedule.options.size=2",
    )  # fmt: skip
    assert "made_up_streams" in sys.modules
    wanted, plain = stream(
        model, embeds, "chunk.latent_frames=6", "cache.window=8", "cache.sink=0", "schedule.commit=inplace"
    )
    assert [chunk.latents.shape[2] for chunk in chunks] == [3, 3, 3, 3]
    assert seen(engine) == seen(plain)
    torch.testing.assert_close(video(chunks), video(wanted), **FP32)
    planned = [(sum(map(list, c.frames), []), c.plan.groups[0].key_frames) for c in walk(engine, 4)]
    assert planned == [(list(c.frames), c.key_frames[0]) for c in engine.trace()]


def test_a_stream_of_strangers_goes_on_from_its_state(model, embeds, installed):
    overrides = ["cache.policy=last-frames", "schedule.coupling=groups", "schedule.options.size=2"]
    engine = Engine(model, load_preset("default", [STEPS, "schedule.commit=inplace", *overrides]))
    begin = lambda: engine.start(embeds[0], SeededNoise(0), latent_size=(4, 4), num_latent_frames=12)
    rollout, resumed = begin(), begin()
    for _ in range(3):  # the third chunk's twin waits to be delivered
        rollout.advance()
    resumed.load_state_dict(rollout.state_dict())
    assert torch.equal(resumed.advance().latents, rollout.advance().latents) and rollout.finished


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["cache.policy=last-frames", "cache.options.cuont=2"], ["cache.options", "last-frames", "cuont"]),
        (["schedule.coupling=groups", "schedule.options.sise=2"], ["schedule.options", "groups", "sise"]),
        (["schedule.coupling=joint", "schedule.options.size=2"], ["schedule.options", "joint", "size"]),
        (["cache.policy=last-farmes"], ["unknown cache policy", "last-farmes"]),
    ],
)
def test_wrong_names_and_options_are_refused_in_one_line(installed, overrides, words):
    with pytest.raises(InputError) as caught:
        Engine(None, load_preset("default", overrides))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
