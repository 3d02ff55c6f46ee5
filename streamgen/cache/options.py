"""What a window is configured by, and what cannot be combined with it."""

from __future__ import annotations

from dataclasses import dataclass

from streamgen.cache.positions import OWN_NUMBERS, position_rule
from streamgen.cache.rebuild import MASKS
from streamgen.config import StreamConfig, check_choice
from streamgen.errors import InputError


@dataclass(frozen=True)
class WindowOptions:
    """Sizes in latent frames; `window` = sink + recent + flight, -1 = everything (finite streams only).

    Args:
        capacity: frames kept, if more than a step reads (a drain and `commit_reads` "tail" read further back).
        commit_reads: what a separate commit sees: "same" as a step of its chunk, or "tail" = the last `window` frames
            in a row, the sink among them only while it still is (Rolling Forcing's release).
        ema_decay: frames that leave are folded into the sink with this decay (Reward Forcing, arXiv:2512.04678).
        ema_precision: "fp32" keeps the fold's sums apart, "cache" in the cache's dtype as released.
        span: temporal positions the model was trained on.
        switch_sink: at a switch "keep" the sink, "refresh" it: encode it again with the window, or "replace" it by the
            first frames that are re-encoded.
        lead: frames that the position rule "ahead" puts the sink ahead of the call.
        restart: the number that the position rule "restart" counts up to.
        mask: re-encoded frames see each other ("bidirectional") or, chunk by chunk, what comes before ("block-causal").
        attention_bias: weight of recent keys in the steps' attention, beside 1 for the sink and the chunk itself.
    """

    window: int = 21
    sink: int = 0
    positions: str = "absolute"
    capacity: int | None = None
    commit_reads: str = "same"
    ema_decay: float | None = None
    ema_precision: str = "fp32"
    switch_sink: str = "keep"
    span: int = 21
    lead: int = 0
    restart: int = 0
    mask: str = "bidirectional"
    attention_bias: float = 1.0

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise InputError(f"cache.sink cannot be negative, got {self.sink}")
        if self.window != -1 and self.window < 1:
            raise InputError(f"cache.window is a number of latent frames, or -1 for all of them, got {self.window}")
        if self.capacity is not None and self.capacity < self.window:
            raise InputError(f"cache.capacity={self.capacity} is below cache.window={self.window}: keep what is read")
        if self.commit_reads not in ("same", "tail"):
            raise InputError(f"cache.commit_reads {self.commit_reads!r} is unknown: use same or tail")
        if self.commit_reads == "tail" and not 0 < self.window <= (self.capacity or 0) - self.sink:
            raise InputError(
                f"cache.commit_reads=tail reads the last cache.window={self.window} frames in a row, beside a sink of "
                f"{self.sink}, and cache.capacity is {self.capacity}: give a window, and a capacity of both together"
            )
        check_choice("switch.sink", self.switch_sink, ("keep", "refresh", "replace"))
        check_choice("switch.mask", self.mask, MASKS)
        if not 0 < self.attention_bias <= 1:
            raise InputError(
                f"cache.attention_bias={self.attention_bias} is what a recent key counts: above 0, at most 1 (off)"
            )
        if self.ema_decay is not None:
            self._check_ema()
        position_rule(self.positions)
        if (self.positions == "ahead") != (self.lead > 0):
            raise InputError(
                f"positions.lead={self.lead} and positions.rule={self.positions} do not go together: rule ahead needs "
                "a lead of 1 or more, the others have none"
            )
        if (self.positions == "restart") != (self.restart > 0):
            raise InputError(
                f"positions.restart={self.restart} and positions.rule={self.positions} do not go together: rule "
                "restart needs a number to count up to, the others have none"
            )
        if self.positions == "restart" and not 0 < self.window < self.restart:
            raise InputError(
                f"positions.restart={self.restart} must be above cache.window={self.window}, the number it goes back to"
            )
        if self.positions == "tri-region" and not 0 < self.window <= self.span:
            raise InputError(
                f"positions.rule=tri-region holds a window within positions.span={self.span}, and cache.window is "
                f"{self.window}: give a window that fits, or another rule"
            )

    def _check_ema(self) -> None:
        if not 0 < self.ema_decay < 1:
            raise InputError(f"cache.ema_decay={self.ema_decay} must lie between 0 and 1, both excluded")
        if not self.sink:
            raise InputError(f"cache.ema_decay={self.ema_decay} needs a sink to fold into, and cache.sink is 0")
        if self.window == -1:
            raise InputError(
                f"cache.ema_decay={self.ema_decay} folds what leaves the window, and with cache.window=-1 nothing does"
            )
        if self.ema_precision not in ("fp32", "cache"):
            raise InputError(f"cache.ema_precision {self.ema_precision!r} is unknown: use fp32 or cache")
        if self.switch_sink == "refresh":
            raise InputError(
                f"switch.sink=refresh encodes the first frames again, and cache.ema_decay={self.ema_decay} has folded "
                "later ones into them: use keep"
            )

    @classmethod
    def from_config(cls, config: StreamConfig) -> WindowOptions:
        cache, commit = config.cache, config.schedule.commit
        if cache.commit_reads == "tail" and commit != "separate":
            raise InputError(
                f"cache.commit_reads=tail is what commits of their own see, and schedule.commit={commit} has none: "
                "use separate"
            )
        if cache.attention_bias != 1 and commit == "fused":
            raise InputError(
                f"cache.attention_bias={cache.attention_bias} weighs what steps read and commits do not, and "
                "schedule.commit=fused makes both in one call: use separate"
            )
        if commit == "fused" and cache.window != -1:
            rule_for_parts(config, "schedule.commit=fused")
        return cls(
            cache.window, cache.sink, config.positions.rule, cache.capacity, cache.commit_reads, cache.ema_decay,
            cache.ema_precision, config.switch.sink, config.positions.span, config.positions.lead,
            config.positions.restart, config.switch.mask, cache.attention_bias,
        )  # fmt: skip


def rule_for_parts(config: StreamConfig, cause: str) -> None:
    """Raises InputError where parts of one call that see more or less of a sliding window cannot agree on positions.

    A page has one position in a call; ranks, and places before what is visible, differ from part to part.
    """
    if config.positions.rule != "absolute":
        raise InputError(
            f"{cause} lets parts of one call see different frames of a sliding window, which "
            f"positions.rule={config.positions.rule} would place differently: use positions.rule=absolute, or another "
            f"{cause.split('=')[0]}"
        )


def needs_own_commits(config: StreamConfig) -> None:
    """Raises InputError for policies that keep what separate commits publish."""
    if config.schedule.commit != "separate":
        raise InputError(
            f"cache.policy={config.cache.policy} keeps what commits of their own publish, and "
            f"schedule.commit={config.schedule.commit} has none: use separate"
        )


def keeps_numbers(options: WindowOptions, cause: str) -> None:
    """Raises InputError for memories by content where frames do not leave a window, or lose their numbers there."""
    if options.window == -1:
        raise InputError(f"{cause} remembers what a window forgets: cache.window=-1 forgets nothing")
    if options.positions not in OWN_NUMBERS:
        raise InputError(
            f"{cause} keeps tokens at the numbers of their frames, which positions.rule={options.positions} takes from "
            f"those beside them: use positions.rule={' or '.join(OWN_NUMBERS)}"
        )
    if options.ema_decay is not None:
        raise InputError(f"{cause} takes up what cache.ema_decay={options.ema_decay:g} would fold: use one of them")
