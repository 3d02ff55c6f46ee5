"""What was named against what was read, word by word: where a model is held back, and by what it confuses.

    pairs(reading, scene)           # {"colour": [["red", "orange"]], "shape": [["circle", "circle"]], …}
    count([{"colour": [["red", "orange"]]}])                # {"colour": {"red": {"orange": 1}}}
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations

from streamgen.worlds.sprites.language import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene
from streamgen.worlds.sprites.oracle import PRESENT, ActorReading, Reading

WORDS = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS, "background": tuple(BACKGROUNDS)}
NONE = "none"  # nothing could be said, or nothing was there

Pairs = dict[str, list[list[str]]]  # attribute -> [named, read] for every actor it is named of
Confusions = dict[str, dict[str, dict[str, int]]]  # attribute -> named -> read -> how often


def pairs(reading: Reading, scene: Scene) -> Pairs:
    """Two actors are taken the way round that agrees most, as in the oracle's score; more than were named are not."""
    best: Pairs = {}
    for order in permutations(range(max(len(scene.actors), len(reading.actors)))):
        now = {part: _of_actors(reading, scene, order, part) for part in ("colour", "shape", "motion")}
        if not best or _agreeing(now) > _agreeing(best):
            best = now
    best["background"] = [] if scene.background is None else [[scene.background, reading.background or NONE]]
    return {part: found for part, found in best.items() if found}


def _of_actors(reading: Reading, scene: Scene, order: tuple[int, ...], part: str) -> list[list[str]]:
    read = [getattr(reading.actors[i], part) or NONE if i < len(reading.actors) else NONE for i in order]
    named = [getattr(actor, part) for actor in scene.actors]
    return [[word, found] for word, found in zip(named, read) if word is not None]


def _agreeing(found: Pairs) -> int:
    return sum(named == read for rows in found.values() for named, read in rows)


def count(clips: Iterable[Pairs]) -> Confusions:
    """Over clips; words in the order of the world's tables."""
    found: Confusions = {}
    for part, rows in ((part, rows) for clip in clips for part, rows in clip.items()):
        for named, read in rows:
            line = found.setdefault(part, {}).setdefault(named, {})
            line[read] = line.get(read, 0) + 1
    return {
        part: {named: _sorted(found[part][named], part) for named in words if named in found[part]}
        for part, words in WORDS.items()
        if part in found
    }


def _sorted(line: dict[str, int], part: str) -> dict[str, int]:
    return {word: line[word] for word in (*WORDS[part], NONE) if word in line}


def said(reading: Reading) -> str:
    """A reading in words; `?` for what could not be told."""
    actors = " and ".join(map(_actor, reading.actors)) or "nothing"
    faults = ["not whole"] if reading.actors and not reading.whole else []
    faults += [f"present {reading.present:.0%}"] if reading.present < PRESENT else []
    faults += [f"{reading.identity_changes} identity changes"] if reading.identity_changes else []
    return f"{actors} on {reading.background or '?'}" + (f" ({', '.join(faults)})" if faults else "")


def _actor(actor: ActorReading) -> str:
    return " ".join(word or "?" for word in (actor.colour, actor.shape, actor.motion))
