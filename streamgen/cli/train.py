"""`streamgen train TARGET/RECIPE`: run a recipe, or go on where its checkpoint stands.

    streamgen train sprites/vae train.steps=100 --output runs --minutes 30
"""

from __future__ import annotations

import argparse
import json
import logging
import pickle

from streamgen.cli.console import announced, hush_libraries, table, talking
from streamgen.cli.parsing import Parser, check_overrides, positive
from streamgen.config import available, config_root, suggest
from streamgen.errors import InputError

log = logging.getLogger(__name__)


def parser(prog: str, description: str) -> Parser:
    out = Parser(prog, description, usage=f"{prog} TARGET/RECIPE [KEY=VALUE ...] [options]")
    out.add_argument("recipe", nargs="?", metavar="TARGET/RECIPE", help="a file of configs/distill; --list shows them")
    out.add_argument("--list", action="store_true", help="the recipes")
    out.add_argument("--device", help="auto (cuda > mps > cpu), cpu, cuda, cuda:N, mps")
    out.add_argument("--output", metavar="FOLDER", help="all that is written goes to FOLDER/TARGET/RECIPE")
    out.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from a checkpoint if there is one"
    )
    out.add_argument("--minutes", type=positive, help="stop after this long; the same command then goes on")
    out.add_talk()
    out.add_overrides()
    return out


def run(args: argparse.Namespace) -> int:
    names = available("distill")
    if args.list:
        print(table(("RECIPE", "WHAT"), [(name, _what(name)) for name in names]))
        return 0
    if args.recipe is None:
        raise InputError(f"which recipe? choose one of {', '.join(names)}")
    if args.recipe not in names:
        near = suggest(args.recipe, names)
        raise InputError(f"unknown recipe {args.recipe!r}{near}: choose one of {', '.join(names)}")
    overrides = check_overrides(args.overrides, "settings are KEY=VALUE, e.g. train.steps=100")
    for key, value in (("device", args.device), ("output", args.output), ("max_minutes", args.minutes)):
        if value is not None:
            overrides.append(f"train.{key}={json.dumps(value)}")
    with talking(args.quiet, args.verbose):
        return _train(args, overrides)


def _what(name: str) -> str:
    """The first comment line of a recipe."""
    with open(config_root() / "distill" / f"{name}.yaml", encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
    with announced(f"preparing {args.recipe}"):
        hush_libraries(args.verbose)
        trainer = _build(args.recipe, overrides)
    if args.resume:
        try:
            trainer.resume()
        except InputError:
            raise
        except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            log.debug("the checkpoint was refused", exc_info=True)
            raise InputError(
                f"{trainer.checkpoint} does not fit this recipe: --no-resume starts over, --output elsewhere keeps it"
            ) from error
    complete = trainer.run(args.quiet)
    if not complete:
        log.info("stopped at step %d of %d; the same command goes on", trainer.step, trainer.config.steps)
    print(trainer.folder / "export")
    return 130 if trainer.stopping else 0


def _build(recipe: str, overrides: list[str]):
    from streamgen.distill.recipes import build

    try:
        return build(recipe, overrides)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}; choose another --output") from None
