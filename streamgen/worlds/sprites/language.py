"""The words of the sprites world: its table, its scenes, and the grammar between prompts and scenes.

A prompt names what it likes; what it leaves out (`None` in a `Scene`) is chosen by the renderer, or by a model,
and must then be kept. `split` says which prompts may be trained on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from streamgen.errors import InputError

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (225, 40, 45),
    "orange": (245, 140, 25),
    "yellow": (245, 215, 40),
    "green": (50, 185, 70),
    "cyan": (45, 205, 215),
    "blue": (50, 90, 230),
    "purple": (150, 60, 200),
    "pink": (245, 130, 185),
    "white": (245, 245, 245),
}
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "black": (8, 8, 10),
    "gray": (115, 115, 118),
    "navy": (15, 20, 80),
    "maroon": (90, 15, 25),
    "forest": (20, 75, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "bouncing",
    "circling",
    "pulsing",
    "spinning",
)
UNTURNABLE = ("circle", "ring")  # a turn of these cannot be seen, so they never spin

# Each attribute's other names; the canonical word stands in the tables above.
PARAPHRASES: Mapping[str, tuple[str, ...]] = {
    "red": ("scarlet",),
    "orange": ("amber",),
    "yellow": ("golden",),
    "green": ("emerald",),
    "cyan": ("turquoise",),
    "blue": ("cobalt",),
    "purple": ("violet",),
    "pink": ("rose",),
    "white": ("snowy",),
    "gray": ("grey",),
    "black": ("jet black",),
    "navy": ("dark blue",),
    "maroon": ("dark red",),
    "forest": ("dark green",),
    "circle": ("disc",),
    "square": ("box",),
    "triangle": ("wedge",),
    "star": ("five-pointed star",),
    "cross": ("plus sign",),
    "ring": ("hoop",),
    "moving left": ("drifting left", "sliding to the left"),
    "moving right": ("drifting right", "sliding to the right"),
    "moving up": ("drifting up", "rising"),
    "moving down": ("drifting down", "falling"),
    "bouncing": ("bouncing around", "ricocheting"),
    "circling": ("orbiting", "going around in circles"),
    "pulsing": ("throbbing", "growing and shrinking"),
    "spinning": ("rotating", "turning in place"),
}
ANY_SHAPE = "thing"  # the word for a shape that is left open
MAX_ACTORS = 2


@dataclass(frozen=True, slots=True)
class Actor:
    """One thing in a scene, in words of the tables; None = left open."""

    colour: str | None = None
    shape: str | None = None
    motion: str | None = None

    def __post_init__(self) -> None:
        for name, value, table in (
            ("colour", self.colour, COLOURS),
            ("shape", self.shape, SHAPES),
            ("motion", self.motion, MOTIONS),
        ):
            if value is not None and value not in table:
                raise InputError(f"unknown {name} {value!r}: choose one of {', '.join(table)}")
        if self.motion == "spinning" and self.shape in UNTURNABLE:
            raise InputError(f"a spinning {self.shape} cannot be seen to spin: choose another shape or motion")


@dataclass(frozen=True, slots=True)
class Scene:
    """What one prompt says: one or two actors on a background (None = left open)."""

    actors: tuple[Actor, ...]
    background: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.actors) <= MAX_ACTORS:
            raise InputError(f"a scene has one or two actors, got {len(self.actors)}")
        if self.background is not None and self.background not in BACKGROUNDS:
            raise InputError(f"unknown background {self.background!r}: choose one of {', '.join(BACKGROUNDS)}")

    @property
    def complete(self) -> bool:
        """Whether nothing is left open."""
        named = [value for actor in self.actors for value in (actor.colour, actor.shape, actor.motion)]
        return None not in (*named, self.background)


@dataclass(frozen=True, slots=True)
class Change:
    """From pixel frame `frame` on, `scene` holds; `cut` starts new bodies, otherwise everything unnamed goes on."""

    frame: int
    scene: Scene
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Timeline:
    """A scene in time: changes in ascending frame order, the first at frame 0."""

    changes: tuple[Change, ...]

    def __post_init__(self) -> None:
        frames = [change.frame for change in self.changes]
        if not frames or frames[0] != 0 or sorted(set(frames)) != frames:
            raise InputError(f"a timeline starts at frame 0 and runs forwards, got frames {frames}")


# ---------------------------------------------------------------------------------------------- prompt -> scene
def _phrases(canonical: tuple[str, ...] | Mapping) -> dict[str, str]:
    """Every accepted phrase of a table -> its canonical word, longest first, so that 'dark blue' beats 'blue'."""
    pairs = [(phrase, word) for word in canonical for phrase in (word, *PARAPHRASES.get(word, ()))]
    return dict(sorted(pairs, key=lambda pair: -len(pair[0])))


_COLOUR, _SHAPE, _MOTION, _BACK = map(_phrases, (COLOURS, SHAPES, MOTIONS, BACKGROUNDS))
_SHAPE[ANY_SHAPE] = ""


def _any(table: Mapping[str, str]) -> str:
    return "|".join(map(re.escape, table))


_ACTOR = re.compile(
    rf"(?:an?\s+)?(?:(?P<colour>{_any(_COLOUR)})\s+)?(?P<shape>{_any(_SHAPE)})(?:\s+(?P<motion>{_any(_MOTION)}))?"
)
_BACKGROUND = re.compile(
    rf"\s+(?:on|against|over)\s+(?:an?\s+)?(?P<background>{_any(_BACK)})(?:\s+(?:background|backdrop))?$"
)


def _parse_actor(text: str, prompt: str) -> Actor:
    match = _ACTOR.fullmatch(text.strip())
    if not match:
        raise InputError(
            f"the sprites world does not understand {text.strip()!r} in {prompt!r}: say it like "
            "'a red circle bouncing on a navy background' (`streamgen.worlds.sprites` lists the words)"
        )
    shape = _SHAPE[match["shape"]] or None
    return Actor(
        colour=_COLOUR.get(match["colour"] or ""), shape=shape, motion=_MOTION.get(match["motion"] or "")
    )


def parse(prompt: str) -> Scene:
    """Read a prompt of the sprites language.

    Raises: InputError outside the language; the message quotes the part that was not understood.
    >>> parse("an amber disc orbiting").actors[0]
    Actor(colour='orange', shape='circle', motion='circling')
    """
    text = re.sub(r"\s+", " ", prompt.strip().lower().rstrip(".!"))
    if not text:
        raise InputError("the prompt is empty: say what to show, e.g. 'a red circle bouncing on a navy background'")
    match = _BACKGROUND.search(text)
    background = _BACK[match["background"]] if match else None
    body = text[: match.start()] if match else text
    # "growing and shrinking" holds an "and" of its own
    parts = re.split(r"\s+and\s+(?!shrinking)", body)
    return Scene(tuple(_parse_actor(part, prompt) for part in parts), background)


# ---------------------------------------------------------------------------------------------- scene -> prompt
def _say(word: str, rng: np.random.Generator | None, paraphrase: float) -> str:
    others = PARAPHRASES.get(word, ())
    if rng is None or not others or rng.random() >= paraphrase:
        return word
    return others[rng.integers(len(others))]


def describe(scene: Scene, rng: np.random.Generator | None = None, paraphrase: float = 0.3) -> str:
    """A prompt for `scene`: canonical without `rng`, else each attribute is paraphrased with that probability.

    >>> describe(Scene((Actor("red", "circle", "bouncing"),), "navy"))
    'a red circle bouncing on a navy background'
    """

    def actor(it: Actor) -> str:
        words = [_say(w, rng, paraphrase) for w in (it.colour, it.shape or ANY_SHAPE, it.motion) if w]
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"

    text = " and ".join(map(actor, scene.actors))
    if scene.background is None:
        return text
    word = _say(scene.background, rng, paraphrase)
    article = "an" if word[0] in "aeiou" else "a"
    forms = [f"on {article} {word} background", f"against {article} {word} backdrop", f"over {word}"]
    other = rng is not None and rng.random() < paraphrase
    return f"{text} {forms[1 + rng.integers(2)] if other else forms[0]}"


def split(item: str | Scene | Timeline) -> str:
    """"train", "val" or "test" (80/10/10): a stable hash of what the prompt names, whatever the words for it.

    Paraphrases of one combination share its side, so a held-out prompt is never trained on in other words; a
    timeline is held out with any of its scenes. Never train on "val" or "test".
    """
    if isinstance(item, Timeline):
        sides = {split(change.scene) for change in item.changes}
        return next(side for side in ("test", "val", "train") if side in sides)
    scene = parse(item) if isinstance(item, str) else item
    actors = sorted(f"{a.colour}/{a.shape}/{a.motion}" for a in scene.actors)
    digest = hashlib.sha256("|".join([*actors, str(scene.background)]).encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") / 2**32
    return "train" if bucket < 0.8 else "val" if bucket < 0.9 else "test"


# ---------------------------------------------------------------------------------------------- drawing scenes
def complete(scene: Scene, rng: np.random.Generator) -> Scene:
    """Fill what `scene` leaves open; two actors differ in colour."""
    actors: list[Actor] = []
    for actor in scene.actors:
        taken = {a.colour for a in (*actors, *scene.actors) if a.colour}
        colour = actor.colour or _choice(rng, [c for c in COLOURS if c not in taken])
        shapes = [s for s in SHAPES if actor.motion != "spinning" or s not in UNTURNABLE]
        shape = actor.shape or _choice(rng, shapes)
        motions = [m for m in MOTIONS if m != "spinning" or shape not in UNTURNABLE]
        actors.append(Actor(colour, shape, actor.motion or _choice(rng, motions)))
    return Scene(tuple(actors), scene.background or _choice(rng, list(BACKGROUNDS)))


def _choice(rng: np.random.Generator, items: list):
    return items[rng.integers(len(items))]


def omit(scene: Scene, rng: np.random.Generator) -> Scene:
    """Leave one or two attributes of a scene open, as about 30 % of prompts do."""
    for _ in range(rng.integers(1, 3)):
        index = int(rng.integers(len(scene.actors)))
        part = _choice(rng, ["colour", "shape", "motion", "background"])
        if part == "background":
            scene = replace(scene, background=None)
        else:
            actors = list(scene.actors)
            actors[index] = replace(actors[index], **{part: None})
            scene = replace(scene, actors=tuple(actors))
    return scene


def sample_scene(rng: np.random.Generator, side: str = "train", two_actors: float = 0.3) -> Scene:
    """A fully specified scene of one side of `split`."""
    while True:
        actors = (Actor(),) * (2 if rng.random() < two_actors else 1)
        scene = complete(Scene(actors), rng)
        if split(scene) == side:
            return scene


def change_scene(scene: Scene, rng: np.random.Generator) -> tuple[Scene, bool]:
    """One change of a complete scene: an attribute, a new actor, or a cut. Returns (scene, cut)."""
    kind = _choice(rng, ["colour", "colour", "shape", "motion", "background", "actor", "cut"])
    if kind == "cut":
        return complete(Scene((Actor(),) * len(scene.actors)), rng), True
    if kind == "actor" and len(scene.actors) < MAX_ACTORS:
        return complete(replace(scene, actors=(*scene.actors, Actor())), rng), False
    if kind == "background":
        others = [b for b in BACKGROUNDS if b != scene.background]
        return replace(scene, background=_choice(rng, others)), False
    index = int(rng.integers(len(scene.actors)))
    actor = scene.actors[index]
    part = kind if kind in ("shape", "motion") else "colour"
    taken = {a.colour for a in scene.actors} | {actor.shape, actor.motion}
    options = {
        "colour": list(COLOURS),
        "shape": [s for s in SHAPES if actor.motion != "spinning" or s not in UNTURNABLE],
        "motion": [m for m in MOTIONS if m != "spinning" or actor.shape not in UNTURNABLE],
    }[part]
    new = replace(actor, **{part: _choice(rng, [o for o in options if o not in taken])})
    return replace(scene, actors=tuple(new if i == index else a for i, a in enumerate(scene.actors))), False
