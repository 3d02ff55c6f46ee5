"""A stream as plain Python and tensors, and back; or as another one with the same past."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from streamgen.flight import Flight, LatentChunk, Text, Timings
from streamgen.ladder import Ladder
from streamgen.schedules import clean_call

if TYPE_CHECKING:
    from streamgen.engine import Engine
    from streamgen.rollout import Rollout


def save(rollout: Rollout) -> dict:
    """See `Rollout.state_dict`."""
    texts: dict[int, Text] = {id(text): text for text in _texts(rollout)}
    order, keys = list(texts), [id(text.keys) for text in texts.values()]
    told = lambda flight: {**_saved(flight), "text": order.index(id(flight.text))}
    return {
        "next_chunk": rollout.next_chunk,
        "next_entry": rollout.next_entry,
        "next_tick": rollout.next_tick,
        "caches": [cache.state_dict() for cache in rollout.caches.values()],
        "texts": [
            {
                "embeds": text.embeds, "image": text.image, "epoch": text.epoch, "scale": text.scale,
                "keys": keys.index(id(text.keys)),  # the first text that has these
            }
            for text in texts.values()
        ],
        "switches": list(rollout.switches),
        "text": order.index(id(rollout.text)),
        "flight": {chunk: told(flight) for chunk, flight in rollout.flight.items()},
        "held": {chunk: told(flight) for chunk, flight in rollout.held.items()},
        "owed": {chunk: told(flight) for chunk, flight in rollout.owed.items()},
        "past": [told(flight) if rollout.policy.own_texts else _saved(flight) for flight in rollout.past],
        "pictures": rollout.pictures.state_dict() if rollout.pictures is not None else None,
        "pending": [(tick, told(flight)) for tick, _, flight in rollout.pending],
        "ready": [asdict(chunk) for chunk in rollout.ready],
        "channels": rollout.channels.state_dict() if rollout.channels is not None else None,
    }  # fmt: skip


def restore(rollout: Rollout, state: dict) -> None:
    """See `Rollout.load_state_dict`."""
    engine = rollout.engine
    rollout.next_chunk, rollout.next_entry = state["next_chunk"], state["next_entry"]
    rollout.next_tick = state["next_tick"]
    for cache, saved in zip(rollout.caches.values(), state["caches"], strict=True):
        cache.load_state_dict(saved)
    texts: list[Text] = []
    for saved in state["texts"]:
        texts.append(_text(engine, saved, texts))
    told = lambda saved: _flight(engine, saved, texts[saved["text"]])
    rollout.switches = [(frame, embeds) for frame, embeds in state["switches"]]
    rollout.text = texts[state["text"]]
    rollout.flight = {chunk: told(saved) for chunk, saved in state["flight"].items()}
    rollout.held = {chunk: told(saved) for chunk, saved in state["held"].items()}
    rollout.owed = {chunk: told(saved) for chunk, saved in state["owed"].items()}
    rollout.past = [
        told(saved) if rollout.policy.own_texts else _flight(engine, saved, rollout.text) for saved in state["past"]
    ]
    if rollout.pictures is not None:
        rollout.pictures.load_state_dict(state["pictures"])
    rollout.ready = [LatentChunk(**saved) for saved in state["ready"]]
    rollout.pending = []
    for tick, saved in state["pending"]:
        flight = told(saved)
        chunk = engine.config.chunk.holding(flight.frames.start)
        rollout.pending.append((tick, clean_call((chunk,), engine.steps), flight))
    if rollout.channels is not None:
        rollout.channels.load_state_dict(state["channels"])


def twin(rollout: Rollout) -> Rollout:
    """See `Rollout.fork`."""
    other = copy(rollout)
    other.caches = {lane: cache.fork(rollout.new_policy()) for lane, cache in rollout.caches.items()}
    other.channels = rollout.channels.fork() if rollout.channels is not None else None
    other.pictures = rollout.pictures.fork() if rollout.pictures is not None else None
    other.flight = {chunk: replace(flight) for chunk, flight in rollout.flight.items()}
    other.held = {chunk: replace(flight) for chunk, flight in rollout.held.items()}
    other.owed, other.timings = dict(rollout.owed), Timings()
    other.pending, other.past, other.ready = list(rollout.pending), list(rollout.past), list(rollout.ready)
    return other


def _texts(rollout: Rollout) -> Iterator[Text]:
    """Every text that a later call may read."""
    yield rollout.text
    kept = (rollout.flight, rollout.held, rollout.owed)
    past = rollout.past if rollout.policy.own_texts else ()
    for flight in (*(f for chunks in kept for f in chunks.values()), *(f for _, _, f in rollout.pending), *past):
        yield flight.text


def _text(engine: Engine, saved: dict, before: list[Text]) -> Text:
    """A text of a state; `before`: those that came before it, whose keys it may share."""
    if saved["keys"] < len(before):
        return replace(before[saved["keys"]], epoch=saved["epoch"], scale=saved["scale"])
    image = None if saved["image"] is None else saved["image"].to(engine.device)
    text = engine.keyed(saved["embeds"].to(engine.device), saved["epoch"], image)
    return replace(text, scale=saved["scale"])


def _saved(flight: Flight) -> dict:
    frames = (flight.frames.start, flight.frames.stop)
    ladder = (flight.ladder.timesteps, flight.ladder.sigmas, flight.ladder.solver)
    return {"x": flight.x, "frames": frames, "channels": flight.channels, "p": flight.p, "ladder": ladder}


def _flight(engine: Engine, saved: dict, text: Text) -> Flight:
    channels = None if saved["channels"] is None else saved["channels"].to(engine.device)
    ladder = Ladder(*saved["ladder"])
    return Flight(saved["x"].to(engine.device), range(*saved["frames"]), text, ladder, saved["p"], channels)
