"""argparse, with one-line refusals, and the KEY=VALUE tail that lays values over the configuration."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from streamgen.config import suggest
from streamgen.errors import InputError


class Parser(argparse.ArgumentParser):
    """Options and KEY=VALUE in any order; errors are InputError."""

    def __init__(self, prog: str, description: str, **options) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str):
        raise InputError(f"{message.removeprefix('argument ')} (see `{self.prog} --help`)")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse. Raises InputError for what is unknown, with the nearest option."""
        args, rest = self.parse_known_intermixed_args(list(argv))
        for word in rest:
            name = word.partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown option {name!r}{suggest(name, known)}")
        return args

    def add_overrides(self) -> None:
        """The tail `cache.window=9 ladder.shift=3`."""
        self.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="laid over the configuration, e.g. cache.window=9"
        )

    def add_talk(self) -> None:
        """How much is said on stderr."""
        talk = self.add_mutually_exclusive_group()
        talk.add_argument("-q", "--quiet", action="store_true", help="warnings and errors alone, no progress bar")
        talk.add_argument("-v", "--verbose", action="store_true", help="details, library warnings, tracebacks")


def check_overrides(words: Sequence[str], hint: str) -> list[str]:
    """The tail, every word KEY=VALUE. Raises InputError that quotes the stray words; `hint` says what was forgotten."""
    stray = [word for word in words if "=" not in word]
    if stray:
        raise InputError(f"{' '.join(stray)!r} is neither an option nor KEY=VALUE: {hint}")
    return list(words)


def whole(low: int | None = None) -> Callable[[str], int]:
    """An integer option, not below `low`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least {low}")
        return value

    return read


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def read_text(path: str) -> str:
    """A text file, or stdin for "-". Raises InputError."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"cannot read {path}: it is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a text file, or - for stdin") from None
