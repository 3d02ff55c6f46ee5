"""What the terminal sees: plain one-line logs on stderr, and libraries that keep quiet while they load."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

log = logging.getLogger(__name__)


class _Line(logging.Formatter):
    """A message as one line; warnings say that they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = " ".join(record.getMessage().split())
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


@contextmanager
def talking(quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """The package's log on stderr while a command runs; everything is as before afterwards."""
    logger, handler = logging.getLogger("streamgen"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def hush_libraries(verbose: bool) -> None:
    """No progress bars of the libraries' own while weights are loaded; warnings with --verbose only."""
    for library in ("diffusers", "transformers"):
        settings = import_module(f"{library}.utils.logging")
        settings.disable_progress_bar()
        if not verbose:
            settings.set_verbosity_error()


@contextmanager
def announced(what: str, after: float = 2.0) -> Iterator[None]:
    """Say what takes so long, if it does."""
    timer = threading.Timer(after, log.info, [f"{what} …"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def table(header: Sequence[str], rows: Iterable[Sequence[object]], width: int | None = None) -> str:
    """Aligned columns; the last one is cut where `width` ends."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    sizes = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in cells]
    if width:
        lines = [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
    return "\n".join(lines)
