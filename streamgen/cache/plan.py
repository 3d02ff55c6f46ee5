"""What one call reads and writes, as host integers: computed once per chunk and kind of call, shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass

FLIGHT = "flight"  # the pseudo-region of a call's own frames


@dataclass(frozen=True, slots=True)
class Segment:
    """Keys that a group reads together.

    Args:
        region: where they lie; "flight" = frames of this very call.
        pages: pages of the cache, or for "flight" indices into the call's frames.
        frames: the stream frame each page holds (for traces and tests).
        positions: temporal position of each at reading.
        phase: radians added to their temporal angles.
        fixed: keys were rotated when they were kept; `positions` are what is known of that.
        counted: every token has a time of its own and a number of keys it stands for; the store knows both.
        log_bias: added to their attention logits (ln n for a key that stands for n).
    """

    region: str
    pages: tuple[int, ...]
    frames: tuple[int, ...]
    positions: tuple[float, ...]
    phase: float = 0.0
    log_bias: float = 0.0
    fixed: bool = False
    counted: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """Of the pages of these regions every head reads the `count` that suit the queries best; the choice is content."""

    regions: tuple[str, ...]
    count: int


@dataclass(frozen=True, slots=True)
class Group:
    """Queries that see the same keys: indices into the call's frames, their positions, and what they read.

    `query_phases`: radians added to the temporal angles of each, () = none.
    """

    query_frames: tuple[int, ...]
    query_positions: tuple[float, ...]
    segments: tuple[Segment, ...]
    route: Route | None = None
    query_phases: tuple[float, ...] = ()

    @property
    def key_frames(self) -> tuple[int, ...]:
        """Stream frames read, in reading order."""
        return tuple(frame for segment in self.segments for frame in segment.frames)

    @property
    def key_positions(self) -> tuple[float, ...]:
        return tuple(position for segment in self.segments for position in segment.positions)


@dataclass(frozen=True, slots=True)
class Write:
    """Publish the keys and values of the call's frame `index`, stream frame `frame`, in `page`."""

    index: int
    frame: int
    page: int


@dataclass(frozen=True, slots=True)
class Fold:
    """Blend one page into another before anything is written: target <- decay·target + (1 - decay)·source.

    `precision`: "fp32" keeps the target's sum in float32 beside its page, "cache" rounds it every time.
    """

    source: int
    target: int
    decay: float
    precision: str = "fp32"


@dataclass(frozen=True, slots=True)
class Record:
    """Keep the call's frame `index` in `page`, its keys rotated to `position` for good, or raw (None)."""

    index: int
    page: int
    position: float | None


@dataclass(frozen=True, slots=True)
class Merge:
    """Bring the page `source` among the pages of a bank: at `place`, or, None, behind the best of those there.

    Best = whose keys agree with the prompt's keys, in each layer on its own; the rest keep the order of their scores.
    """

    pages: tuple[int, ...]
    source: int
    place: int | None


@dataclass(frozen=True, slots=True)
class Choose:
    """Keep in the pages `target` those tokens of `segments` that recent queries ask for most, rotated as they are read.

    Each layer and sample for itself, in the call and before it reads them: score = sum of its queries, and of those
    that commits remembered, times the key over all heads. A token that was kept `limit` times is not kept again.
    """

    segments: tuple[Segment, ...]
    target: tuple[int, ...]
    limit: int


@dataclass(frozen=True, slots=True)
class Absorb:
    """Before anything is written, merge the tokens of frames that leave into `pages`, place by place of the picture.

    A token joins the entry there whose raw key is most like its own (mean cosine of the heads) if that is `threshold`
    or more and the entry stands for fewer than `most`: newest key and time, mean value, one more to its number.
    Otherwise it becomes an entry, where the worth n·exp(-age / half_life) of what was there is least.

    `held`: pages in use before, all others are empty. Ages and half-life in latent frames.
    """

    sources: tuple[int, ...]
    times: tuple[float, ...]
    pages: tuple[int, ...]
    held: int
    threshold: float
    most: int
    half_life: float


@dataclass(frozen=True, slots=True)
class Renew:
    """Before anything is written, let the pages `sources`, in turn, take the place of the one among `pages` they are
    least like, where they are less like it than `threshold`: mean cosine of the pages' mean raw keys and mean values,
    each layer and sample for itself."""

    sources: tuple[int, ...]
    pages: tuple[int, ...]
    threshold: float


@dataclass(frozen=True, slots=True)
class Plan:
    """All groups of a row, and what becomes visible to others when the call is committed: folds, writes, record, merge.

    `stages`: written as soon as the call is through, read by later calls of the same chunk alone.
    `remember`: (index in the call, place) of frames whose queries, summed, are kept for choices to come.
    """

    groups: tuple[Group, ...]
    writes: tuple[Write, ...] = ()
    folds: tuple[Fold, ...] = ()
    stages: tuple[Write, ...] = ()
    record: Record | None = None
    merge: Merge | None = None
    choose: Choose | None = None
    absorb: Absorb | None = None
    remember: tuple[tuple[int, int], ...] = ()
    renew: Renew | None = None

    @property
    def by_content(self) -> bool:
        """Whether what is kept depends on keys and queries."""
        return bool(self.record or self.merge or self.choose or self.absorb or self.remember or self.renew)

    @property
    def publishes(self) -> bool:
        """Whether a commit by this plan leaves anything behind."""
        return bool(self.writes or self.record or self.merge)

    def signature(self) -> tuple:
        """Shapes alone: two plans with one signature can share a captured graph."""
        groups = tuple(
            (len(g.query_frames), tuple((s.region, len(s.pages), s.counted or bool(s.log_bias)) for s in g.segments))
            for g in self.groups
        )
        chosen_from = sum(len(s.pages) for s in self.choose.segments) if self.choose else 0
        absorbed = (len(self.absorb.sources), self.absorb.held) if self.absorb else (0, 0)
        return groups, len(self.writes), chosen_from, absorbed, len(self.renew.sources) if self.renew else 0
