"""A cache that is made anew before every chunk: the latest frames run once more, clean (Krea Realtime)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamgen.cache.options import WindowOptions
from streamgen.cache.plan import Write
from streamgen.cache.policies import Sizes, WindowPolicy, needs_solo, register_policy
from streamgen.cache.rebuild import Rebuild
from streamgen.config import StreamConfig
from streamgen.errors import InputError


def check_packed(config: StreamConfig) -> None:
    """Raises InputError where a policy that makes its context anew would be placed by frame numbers, or has no end."""
    policy, rule, window = config.cache.policy, config.positions.rule, config.cache.window
    if rule != "packed":
        raise InputError(
            f"cache.policy={policy} places its frames by what is there, and positions.rule is {rule}: use packed"
        )
    if window == -1:
        raise InputError(f"cache.policy={policy} makes a bounded context anew, and cache.window is -1: give a window")
    if config.cache.ema_decay is not None:
        raise InputError(f"cache.policy={policy} has no sink that frames fold into: use cache.ema_decay=null")


@dataclass(frozen=True)
class RebuildOptions(WindowOptions):
    """`window` = context + chunk; `sink` frames of the context are the stream's first, the others its latest.

    Args:
        lag: at a new prompt the context is made under the old one, and under the new one from the next chunk on.
        pixels: without a sink, make the latent of the first context frame anew, from the picture it was shown as: the
            codec's first latent stands for one frame, and the model was trained to begin with such a one.
    """

    lag: bool = False
    pixels: bool = False

    @classmethod
    def from_config(cls, config: StreamConfig) -> RebuildOptions:
        check_packed(config)
        commit, context = config.schedule.commit, config.cache.context
        if commit != "none":
            raise InputError(
                "cache.policy=rebuild runs finished frames again before each chunk, and "
                f"schedule.commit={commit} would publish them twice: use none"
            )
        return cls(**vars(WindowOptions.from_config(config)), lag=context.lag, pixels=context.pixels)


@register_policy("rebuild", RebuildOptions)
class RebuildPolicy(WindowPolicy):
    """The first context frame, the latest ones, the chunk; nothing of what slid out of the window is left in the keys.

    Pages hold the context in reading order.
    """

    def __init__(self, options: RebuildOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        needs_solo(sizes, "cache.policy=rebuild makes its context anew between chunks")
        if self.rebuilt < 1:
            raise InputError(
                f"cache.window={options.window} leaves a chunk of {sizes.chunk} frames no context: raise cache.window"
            )
        self.pictures = options.pixels and not options.sink
        self.held: tuple[int, ...] = ()  # frames by page
        self.next = 0  # frame that the chunk to come begins at

    @property
    def rebuilt(self) -> int:
        """Frames of a context."""
        return self.options.window - self.sizes.chunk

    @property
    def pages(self) -> int:
        return self.rebuilt

    def page(self, frame: int) -> int:
        return self.held.index(frame)

    # ------------------------------------------------------------------------------------------- what is made anew
    def rebuild(self, first: int, changing: bool) -> Rebuild | None:
        self.next = first
        if changing and not self.options.lag or first == self.frames:
            return None
        frames = self._context(first)
        anew = self.pictures and frames and first - self.sizes.chunk >= self.rebuilt
        return Rebuild(frames, pixels=frames[:1] if anew else ()) if frames else None

    def _context(self, first: int) -> tuple[int, ...]:
        """The frames before frame `first`, in order. The stream's first frame leads until the window has moved on."""
        count, sink = self.rebuilt, self.options.sink
        if sink:
            lead = list(range(min(sink, first)))
        else:
            lead = [0 if first - self.sizes.chunk < count else first - count]
            lead = [frame for frame in lead if frame >= self.oldest]
        start = max(self.oldest, first - (count - len(lead)), lead[-1] + 1 if lead else 0)
        return (*lead, *range(start, first))

    # ------------------------------------------------------------------------------------------- reads and writes
    def visible(self, end: int, room: int) -> tuple[Sequence[int], Sequence[int]]:
        lead = max(1, self.options.sink)
        return self.held[:lead], self.held[lead:]

    def _recache_group(self, own: list[int]):
        return self._read((), (), own, (0, len(own), len(own)))

    def _blocks(self, own: list[int]) -> list[int]:
        return list(range(0, len(own), self.sizes.chunk))  # by place in the context: frames may lie anywhere

    def _writes(self, own: list[int], published: list[int]) -> tuple[Write, ...]:
        return tuple(Write(i, frame, i) for i, frame in enumerate(published))

    def commit(self, frames: Sequence[int]) -> None:
        super().commit(frames)
        self.held = tuple(frames)

    def keeps(self) -> Sequence[int]:
        return range(self.options.sink)

    def switch(self, mode: str, requested: int) -> None:
        """Whatever the mode, the context is made anew for the next chunk; cut leaves its sink alone."""
        if mode == "cut":
            self.oldest, self.held = self.next, self.held[: self.options.sink]

    def state_dict(self) -> dict:
        return {**super().state_dict(), "held": self.held}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.held = tuple(state["held"])
