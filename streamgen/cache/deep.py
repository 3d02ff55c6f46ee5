"""A deep sink, and tokens chosen from what would leave the window (Deep Forcing, arXiv:2512.05081)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamgen.cache.options import WindowOptions, keeps_numbers, needs_own_commits
from streamgen.cache.plan import Choose, Plan, Segment
from streamgen.cache.policies import Pages, Sizes, WindowPolicy, register_policy
from streamgen.config import StreamConfig
from streamgen.errors import InputError
from streamgen.schedules import Call, CallKind, Row


@dataclass(frozen=True)
class DeepOptions(WindowOptions):
    """A window that is compressed to sink + kept + recent frames whenever a chunk no longer fits it.

    Args:
        kept: frames' worth of tokens chosen from what lies between sink and recent frames; 0 = nothing is chosen, the
            oldest frames leave.
        recent: latest frames that stay whole, the chunk's own among them; their queries choose.
        reuse: how often a token may be chosen.
    """

    kept: int = 2
    recent: int = 4
    reuse: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept < 0:
            raise InputError(f"cache.deep.kept cannot be negative, got {self.kept}")
        if not self.kept:
            return
        if self.reuse < 1:
            raise InputError(f"cache.deep.reuse must be at least 1, got {self.reuse}; cache.deep.kept=0 chooses none")
        keeps_numbers(self, f"cache.deep.kept={self.kept}")
        if self.mask != "bidirectional":
            raise InputError(
                f"cache.deep.kept={self.kept} chooses by all queries of a call, which switch.mask={self.mask} asks "
                "chunk by chunk: use switch.mask=bidirectional"
            )
        budget = self.sink + self.kept + self.recent
        if self.window < budget:
            raise InputError(
                f"cache.window={self.window} is compressed to {budget} = cache.sink {self.sink} + cache.deep.kept "
                f"{self.kept} + cache.deep.recent {self.recent}: raise cache.window, or set cache.deep.kept=0"
            )

    @classmethod
    def from_config(cls, config: StreamConfig) -> DeepOptions:
        deep = config.cache.deep
        if deep.kept:
            needs_own_commits(config)
            if config.experts.boundary is not None:
                raise InputError(
                    f"cache.deep.kept={deep.kept} chooses in a chunk's first call, which only one of the experts of "
                    f"experts.boundary={config.experts.boundary:g} makes: use cache.deep.kept=0"
                )
        return cls(**vars(WindowOptions.from_config(config)), kept=deep.kept, recent=deep.recent, reuse=deep.reuse)


@register_policy("deep", DeepOptions)
class DeepPolicy(WindowPolicy):
    """Sink, chosen tokens, recent frames. Pages: [sink | chosen | chosen by the chunk in flight | ring].

    The chunk that no longer fits chooses in its first call, from frames and from what was chosen before, and reads its
    choice from then on; its commit makes it everybody's, and only then may frames that were not chosen be overwritten.
    Both sets of pages take turns. Chosen keys stay rotated to the numbers of their frames.
    """

    extra_region, extra_fixed = "chosen", True

    def __init__(self, options: DeepOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        if options.kept:
            if options.recent < sizes.chunk:
                raise InputError(
                    f"cache.deep.recent={options.recent} frames stay whole, and a chunk has {sizes.chunk}: give "
                    f"{sizes.chunk} or more"
                )
            if sizes.flight > sizes.chunk:
                raise InputError(
                    f"cache.deep.kept={options.kept} lets a chunk choose for itself, for which it must be alone in "
                    f"flight, and {sizes.flight // sizes.chunk} are: use schedule.coupling=solo or cache.deep.kept=0"
                )
            self.ring = max(self.ring, options.window - self.sink)  # what is chosen from is kept until then
            self.aside = {"uses": None, "queries": options.recent - sizes.chunk}
        self.choices = 0  # made so far: the newest lies in set (choices - 1) % 2
        self.held = False  # whether there is one to be read

    @property
    def reserved(self) -> int:
        return 2 * self.options.kept

    def _set(self, choices: int) -> tuple[int, ...]:
        """Pages of the choice that is made after so many."""
        first = self.sink + choices % 2 * self.options.kept
        return tuple(range(first, first + self.options.kept))

    def _chooses(self, first: int) -> bool:
        """Whether the chunk that begins at this frame no longer fits."""
        if not self.options.kept:
            return False
        between = self.options.kept * self.held + first - max(self.base + self.sink, self.oldest)
        return self.sink + between + self.sizes.chunk > self.options.window

    # ------------------------------------------------------------------------------------------- reads
    def visible(self, end: int, room: int) -> tuple[range, range]:
        return super().visible(end, self.options.recent - self.sizes.chunk if self._chooses(end) else room)

    def _extra(self, first: int, *seen: Sequence[int]) -> Pages:
        """The chosen tokens' pages; -1, for content knows their frames."""
        chooses = self._chooses(first)
        if not (chooses or self.held):
            return ()
        return [(-1, page) for page in self._set(self.choices if chooses else self.choices - 1)]

    def variant(self, row: Row) -> object:
        early = row.slots[0].p_in == 0 and self._chooses(row.slots[0].chunk * self.sizes.chunk)
        return super().variant(row), early

    def plan(self, call: Call, row: Row, frames: Sequence[range]) -> Plan:
        plan, own = super().plan(call, row, frames), [frame for part in frames for frame in part]
        if not self.options.kept:
            return plan
        if call.kind is CallKind.CLEAN:
            places = self.options.recent - self.sizes.chunk
            latest = list(enumerate(own))[max(0, len(own) - places) :]
            return replace(plan, remember=tuple((index, frame % places) for index, frame in latest))
        if row.slots[0].p_in or not self._chooses(own[0]):
            return plan
        return replace(plan, choose=Choose(self._candidates(own[-1] + 1), self._set(self.choices), self.options.reuse))

    def _candidates(self, end: int) -> tuple[Segment, ...]:
        """What was chosen last, and the frames that are no longer recent when frame `end` is the next."""
        known = range(max(self.base + self.sink, self.oldest), end - self.options.recent)
        frames = Segment("recent", tuple(self.page(f) for f in known), tuple(known), tuple(known))
        pages, none = self._set(self.choices - 1), (-1,) * self.options.kept
        return (Segment(self.extra_region, pages, none, none, fixed=True), frames) if self.held else (frames,)

    # ------------------------------------------------------------------------------------------- state
    def commit(self, frames: Sequence[int]) -> None:
        if frames[-1] >= self.frames and self._chooses(frames[0]):  # not a re-encoding
            self.oldest, self.choices, self.held = frames[-1] + 1 - self.options.recent, self.choices + 1, True
        super().commit(frames)

    def switch(self, mode: str, requested: int) -> range | None:
        if mode == "cut":
            self.held = False
        return super().switch(mode, requested)

    def reach(self) -> int | None:
        """A chosen token stays where it was until it has been chosen too often."""
        options, chunk = self.options, self.sizes.chunk
        if not options.kept or (options.positions == "absolute" and options.sink):
            return super().reach()
        between = ((options.window - options.sink - options.kept - options.recent) // chunk + 1) * chunk
        longest = max(options.window + chunk, options.window - options.sink + options.reuse * between)
        return min(longest, self.sizes.total or longest)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "choices": self.choices, "held": self.held}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.choices, self.held = state["choices"], state["held"]
