"""The command line: `streamgen COMMAND …`, also `python -m streamgen`.

Commands import what they need when they run, so that help and refusals come at once.
Exit codes: 0; 1 writing or computing failed on the way; 2 bad input; 3 unavailable device or back-end; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from streamgen import __version__
from streamgen.config import suggest
from streamgen.errors import BrokenStreamError, InputError, UnavailableError

__all__ = ["main"]

COMMANDS = {
    "render": "a prompt, or a timeline of prompts, into a video file",
    "demo": "a page in the browser: watch a stream, and change its prompt while it plays",
    "train": "run or resume a training recipe",
    "eval": "models and presets judged by the world's oracle: records, a table, plots, contact sheets",
    "convert": "a transformer's weights in the layout that another program reads, LoRAs merged",
    "presets": "the published systems that ship as presets, and what each does tick by tick",
    "doctor": "what is installed, which devices and back-ends work here",
}

EXAMPLE = 'streamgen render --prompt "a red circle bouncing on a navy background" --seconds 5 -o clip.mp4'


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse's --help
        return stop.code if isinstance(stop.code, int) else 0
    except InputError as error:
        return _refuse(error, 3 if isinstance(error, UnavailableError) else 2)
    except KeyboardInterrupt:
        return _refuse("interrupted; nothing was written", 130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = _known_failure(error)
        if line is None or "-v" in argv or "--verbose" in argv:
            raise
        return _refuse(line, 1)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(f"streamgen {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        what = "option" if name.startswith("-") else "command"
        raise InputError(f"unknown {what} {name!r}{suggest(name, list(COMMANDS))}: use {', '.join(COMMANDS)}")
    command = import_module(f"streamgen.cli.{name}")
    return command.run(command.parser(f"streamgen {name}", COMMANDS[name]).read(rest))


def _help() -> str:
    commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return (
        "usage: streamgen COMMAND [options]   (--version; COMMAND --help for its options)\n\n"
        "Endless, steerable, real-time video from causal diffusion transformers.\n\n"
        f"{commands}\n\nexample: {EXAMPLE}"
    )


def _refuse(what: object, code: int) -> int:
    print("streamgen: error:", " ".join(str(what).split()), file=sys.stderr)
    return code


def _known_failure(error: Exception) -> str | None:
    """One line for what goes wrong without being a bug; None = a bug, which keeps its traceback."""
    kind = type(error).__name__
    if kind == "MediaError":
        return str(error)
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        return f"{reason}: lower --height and --width or cache.window, or use --dtype bf16"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    if isinstance(error, (FloatingPointError, BrokenStreamError)):
        return str(error)
    return None
