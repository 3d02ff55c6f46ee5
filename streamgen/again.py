"""What a roll-out needs to run finished frames once more: their latents, and the pictures they were shown as."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from streamgen.cache.rebuild import Rebuild
from streamgen.errors import InputError
from streamgen.flight import Flight, Text


class Pictures:
    """A stream decoded beside its session, for policies that make latents anew from pixels.

    Of every latent frame that is kept the last picture it stands for, [B, 3, 1, H, W]. Chunks come in order.
    """

    def __init__(self, codec) -> None:
        if codec is None:
            raise InputError(
                "cache.context.pixels=true makes latents anew from pictures, for which the engine needs a codec: use "
                "Engine(transformer, config, codec), or cache.context.pixels=false"
            )
        self.codec = codec
        self.state, self.frames = None, {}
        self.next = 0  # the frame to come

    @torch.no_grad()
    def look(self, flight: Flight) -> None:
        """Decode a finished chunk that has not been seen yet; an exception leaves everything as it was."""
        if flight.frames.start < self.next:
            return
        pixels, state = self.codec.decode(flight.x, self.state)
        last = range(pixels.shape[2] - 1, -1, -self.codec.temporal_ratio)
        seen = {frame: pixels[:, :, i : i + 1].clone() for frame, i in zip(reversed(flight.frames), last, strict=False)}
        self.state, self.frames, self.next = state, {**self.frames, **seen}, flight.frames.stop

    def keep(self, frames: Container[int]) -> None:
        """Forget all but these."""
        self.frames = {frame: picture for frame, picture in self.frames.items() if frame in frames}

    @torch.no_grad()
    def latent(self, frame: int) -> Tensor:
        """[B, C, 1, h, w]: the picture of one frame alone, as the first of a clip."""
        return self.codec.encode(self.frames[frame])[0]

    def fork(self) -> Pictures:
        other = Pictures(self.codec)
        other.state, other.frames, other.next = self.state, dict(self.frames), self.next
        return other

    def state_dict(self) -> dict:
        return {"state": self.state, "frames": dict(self.frames), "next": self.next}

    def load_state_dict(self, state: dict) -> None:
        self.state, self.frames, self.next = state["state"], dict(state["frames"]), state["next"]


def kept(past: list[Flight], window: int, lasting: Container[int]) -> list[Flight]:
    """Of finished chunks those that a later call may ask for: the last `window` frames, and those with lasting ones."""
    oldest = past[-1].frames.stop - window
    return [f for f in past if f.frames.stop > oldest or any(frame in lasting for frame in f.frames)]


def latents_of(
    wanted: Rebuild, past: list[Flight], pictures: Pictures | None, blank: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """The frames' latents [B, C, f, h, w], and what the model reads beside them; `blank`: both of a blank frame."""
    found, x, channels = by_frame(past), [], []
    for frame in wanted.frames:
        part, beside = blank if frame < 0 else _frame(found[frame], frame)
        x.append(pictures.latent(frame).to(part) if frame in wanted.pixels else part)
        channels.append(beside)
    return torch.cat(x, 2), None if channels[0] is None else torch.cat(channels, 2)


def _frame(flight: Flight, frame: int) -> tuple[Tensor, Tensor | None]:
    at = frame - flight.frames.start
    channels = flight.channels
    return flight.x[:, :, at : at + 1], None if channels is None else channels[:, :, at : at + 1]


def texts_of(wanted: Rebuild, past: list[Flight], present: Text) -> list[Text]:
    """The prompt of every frame; blank ones are told the present one."""
    found = by_frame(past)
    return [found[frame].text if frame in found else present for frame in wanted.frames]


def by_frame(past: list[Flight]) -> dict[int, Flight]:
    """The chunk each frame lies in."""
    return {frame: flight for flight in past for frame in flight.frames}
