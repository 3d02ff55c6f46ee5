"""A clock for showing frames."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pacer:
    """When frames are due on screen, however unevenly they were produced.

    Due times are counted from the start, never from one another, so they do not drift. A late frame does not move the
    ones after it: the caller hears how late it is, and may skip frames, or start again with `reset`.
    >>> pacer = Pacer(fps=16)
    >>> for chunk in stream:                        # doctest: +SKIP
    ...     late = pacer.wait(len(chunk.frames))    # returns when the first of these frames is due
    ...     show(chunk.frames)
    """

    def __init__(
        self,
        fps: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        max_late: float | None = None,
    ) -> None:
        """
        Args:
            fps: frames per second.
            clock, sleep: seconds now, and waiting; `sleep` may return early (an event's `wait`): that ends it.
            max_late: from this many seconds on the clock starts again, so that a stall is not followed by a rush.
        """
        if not fps > 0:
            raise ValueError(f"fps must be positive, not {fps}")
        self.fps, self.max_late = fps, max_late
        self._clock, self._sleep = clock, sleep
        self.reset()

    def reset(self) -> None:
        """Forget the past: the next `wait` starts the clock, as after a pause."""
        self.frames = 0  # handed out since the start
        self.lateness = 0.0  # seconds, of the last `wait`
        self.worst = 0.0
        self._start: float | None = None

    def wait(self, frames: int) -> float:
        """Wait until the next `frames` frames are due, and count them.

        Returns: seconds by which they are late, else 0.
        """
        now = self._clock()
        if self._start is None:
            self._start = now
        due = self._start + self.frames / self.fps
        self.lateness = max(0.0, now - due)
        self.worst = max(self.worst, self.lateness)
        if due > now:
            self._sleep(due - now)
        elif self.max_late is not None and self.lateness > self.max_late:
            self._start, self.frames = now, 0
        self.frames += frames
        return self.lateness
