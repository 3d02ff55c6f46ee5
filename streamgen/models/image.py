"""A picture as image-to-video models read it: CLIP tokens, once, and channels beside the latents, as long as it runs.

    conditioner = ImageConditioner.from_pretrained(folder)
    conditions = {
        "image_embeds": conditioner.clip_embeds(picture),  # only models with an image branch (Wan2.1)
        "channels": conditioner.condition_chunks(picture, codec, 480, 832, latent_frames=3),
    }
    engine.run(prompt_embeds, noise, conditions=conditions)

The channels are those of `diffusers.WanImageToVideoPipeline`: a mask that marks the first frame, and the latents of a
clip that shows the picture and then gray without end. There the clip is encoded as a whole; here the codec goes through
it chunk by chunk, and stops once its state no longer changes: from then on every chunk is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from streamgen.errors import InputError

logger = logging.getLogger(__name__)

__all__ = ["ConditionStream", "ImageConditioner", "fit_picture"]

KEPT_CHUNKS = 16  # of a codec that never settles; whoever asks for an older one waits for it to be encoded again
ROUNDING = 1e-3  # beyond [0, 1] is forgiven


class ImageConditioner:
    """Turns pictures into what an image-to-video transformer reads.

    A picture is a PIL image, uint8 [H, W, 3], or floats in [0, 1] as pipelines return them, [H, W, 3] or [3, H, W];
    numpy or torch. Wherever one is taken, a list of them or a fourth, leading axis is a batch.

    Args:
        image_encoder: transformers' CLIPVisionModel, or None for models that have no image branch.
        image_processor: its preprocessor, given with it.
    """

    def __init__(self, image_encoder=None, image_processor=None) -> None:
        if (image_encoder is None) != (image_processor is None):
            raise InputError("image_encoder and image_processor belong together: give both or neither")
        self.image_encoder, self.image_processor = image_encoder, image_processor

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype: torch.dtype = torch.float32) -> ImageConditioner:
        """From a diffusers folder; one without `image_encoder/` gives a conditioner without CLIP.

        Float32 unless told otherwise: the encoder runs once per picture, and what it says stays for the whole stream.
        """
        folder = Path(folder)
        if not (folder / "image_encoder").is_dir():
            return cls()
        from transformers import AutoImageProcessor, CLIPVisionModel

        try:
            processor = AutoImageProcessor.from_pretrained(folder / "image_processor")
            encoder = CLIPVisionModel.from_pretrained(folder / "image_encoder")
        except (OSError, ValueError, ImportError) as failure:
            reason = str(failure).strip().partition("\n")[0][:200]
            raise InputError(f"{folder}: image_encoder and image_processor cannot be loaded ({reason})") from failure
        return cls(encoder.to(device, dtype).eval(), processor)

    @torch.no_grad()
    def clip_embeds(self, image) -> Tensor:
        """What the transformer takes as `encoder_hidden_states_image`: [B, 257, 1280] from Wan2.1's CLIP.

        The whole picture, not the crop that `condition_chunks` shows. Models of a first and a last picture read
        `clip_embeds([first, last])`.
        """
        if self.image_encoder is None:
            raise InputError("this model's folder has no image_encoder: load one that has, or give image_embeds")
        pictures = [_to_pil(_pixels(picture)) for picture in _listed(image)]
        pixels = self.image_processor(images=pictures, return_tensors="pt").pixel_values
        parameter = next(self.image_encoder.parameters())
        out = self.image_encoder(pixels.to(parameter.device, parameter.dtype), output_hidden_states=True)
        return out.hidden_states[-2]  # the last layer was trained to summarise, the one before still describes

    def condition_chunks(self, image, codec, height: int, width: int, latent_frames: int) -> ConditionStream:
        """The channels beside the latents: [B, ratio + C, latent_frames, h, w] per chunk, endless.

        Args:
            image: a picture; cropped to the middle and resized to `height` x `width` pixels.
            codec: with `encode(frames, state) -> latents, state` (see `StreamingVAE`): 1 + 4k frames first, then 4k.
            latent_frames: per chunk.
        """
        if not hasattr(codec, "encode"):
            raise InputError(f"{type(codec).__name__} cannot encode: image-to-video needs the model's own VAE")
        ratio = codec.spatial_ratio
        if height < 1 or width < 1 or height % ratio or width % ratio:
            raise InputError(f"{height}x{width} pixels are not positive multiples of {ratio}, the codec's patch")
        return ConditionStream(codec, fit_picture(image, height, width), latent_frames)


class ConditionStream:
    """Mask and condition latents of a picture followed by gray; iterate it, or ask for any frames.

    What it gives depends on the picture and the codec alone, so that any frames may be asked for in any order; going
    back costs nothing once the codec has settled. Its tensors are shared between calls: read them only. Not for
    several threads at once.

    Args:
        codec: as in `ImageConditioner.condition_chunks`.
        picture: [B, 3, H, W] in [-1, 1], see `fit_picture`.
        latent_frames: how many to encode at once.
    """

    def __init__(self, codec, picture: Tensor, latent_frames: int) -> None:
        if latent_frames < 1:
            raise InputError(f"latent_frames must be positive, got {latent_frames}")
        self.codec, self.latent_frames = codec, latent_frames
        self._begin(picture)

    def _begin(self, picture: Tensor) -> None:
        """Before the first chunk."""
        self.picture = picture.to(getattr(self.codec, "device", picture.device))
        self._next, self._state = 0, None  # the chunk to encode next, and the codec's state before it
        self._settled: int | None = None  # this chunk and all after it are equal
        self._chunks: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[Tensor]:
        """Chunk after chunk, without end: [B, ratio + C, latent_frames, h, w]."""
        size = self.latent_frames
        return (self.frames(range(index * size, (index + 1) * size)) for index in count())

    def frames(self, frames: range) -> Tensor:
        """The channels of these latent frames, [B, ratio + C, len(frames), h, w], float32; 0 is the picture's."""
        size = self.latent_frames
        first, last = frames.start // size, (frames.stop - 1) // size
        chunks = [self._chunk(index) for index in range(first, last + 1)]
        together = chunks[0] if len(chunks) == 1 else torch.cat(chunks, 2)
        return together[:, :, frames.start - first * size :][:, :, : len(frames)]

    def _chunk(self, index: int) -> Tensor:
        if index < self._next and self._stored(index) not in self._chunks:
            self._begin(self.picture)
        while self._stored(index) >= self._next:
            self._encode()
        return self._chunks[self._stored(index)]

    def _stored(self, index: int) -> int:
        """The chunk that stands for this one."""
        return index if self._settled is None else min(index, self._settled)

    @torch.no_grad()
    def _encode(self) -> None:
        """One more chunk: the picture and gray, or gray alone."""
        ratio, index = self.codec.temporal_ratio, self._next
        batch, _, height, width = self.picture.shape
        gray = self.latent_frames * ratio if index else (self.latent_frames - 1) * ratio
        video = self.picture.new_zeros(batch, 3, gray, height, width)
        if index == 0:
            video = torch.cat([self.picture.unsqueeze(2), video], 2)
        latents, state = self.codec.encode(video, self._state)
        mask = latents.new_zeros(batch, ratio, *latents.shape[2:])
        if index == 0:
            mask[:, :, 0] = 1  # the first frame is given: as many ones as the latent frame has room for pixel frames
        self._chunks[index] = torch.cat([mask, latents], 1).float()
        if index and _same_state(state, self._state):
            self._settled, state = index, None
        self._next, self._state = index + 1, state
        self._chunks.pop(index - KEPT_CHUNKS, None)

    def fork(self) -> ConditionStream:
        """One that goes on by itself; what is encoded already is shared."""
        other = copy(self)
        other._chunks = dict(self._chunks)
        return other

    def state_dict(self) -> dict[str, Any]:
        """All that the channels follow from; a codec's state may be many times as large and is computed anew."""
        return {"picture": self.picture, "latent_frames": self.latent_frames}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the stream that `state` was taken of, for the same codec."""
        self.latent_frames = state["latent_frames"]
        self._begin(state["picture"])


def _same_state(new: Any, old: Any) -> bool:
    """Whether two codec states hold the same bits; False for one that was written in place, which cannot be told."""
    if isinstance(new, Tensor):
        if not isinstance(old, Tensor) or new.data_ptr() == old.data_ptr():
            return False
        same = (new.dtype, new.shape) == (old.dtype, old.shape)
        return same and torch.equal(_bytes(new), _bytes(old))
    if type(new) is not type(old):
        return False
    if isinstance(new, Mapping):
        return new is not old and new.keys() == old.keys() and all(_same_state(new[key], old[key]) for key in new)
    if isinstance(new, (list, tuple)):
        return new is not old and len(new) == len(old) and all(map(_same_state, new, old))
    return isinstance(new, (int, float, str, type(None))) and new == old


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


# --- pictures


def fit_picture(image, height: int, width: int) -> Tensor:
    """Pictures, as `ImageConditioner` takes them, in the middle crop of the target's shape: [B, 3, H, W] in [-1, 1]."""
    return torch.cat([_fit(_pixels(picture), height, width) for picture in _listed(image)]) * 2 - 1


def _fit(pixels: Tensor, height: int, width: int) -> Tensor:
    """[3, h, w] -> [1, 3, height, width]; a picture of that size stays as it is, bit for bit."""
    have = tuple(pixels.shape[1:])
    scale = min(have[0] / height, have[1] / width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    if (rows, columns) != have:
        logger.info("the picture, %dx%d (height x width), is cut to its middle %dx%d for %dx%d pixels",
                    *have, rows, columns, height, width)  # fmt: skip
    top, left = (have[0] - rows) // 2, (have[1] - columns) // 2
    crop = pixels[None, :, top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return crop
    return F.interpolate(crop, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def _listed(image) -> list:
    """A batch as a list of pictures."""
    if isinstance(image, (Tensor, np.ndarray)) and image.ndim == 4:
        image = list(image)
    pictures = list(image) if isinstance(image, Sequence) and not isinstance(image, str) else [image]
    if not pictures:
        raise InputError("no picture is given: the list is empty")
    return pictures


def _pixels(image) -> Tensor:
    """One picture as [3, H, W] float32 in [0, 1]."""
    if isinstance(image, Image.Image):
        image = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    elif isinstance(image, (str, Path)):
        raise InputError(f"a picture is expected, got the path {str(image)!r}: open it first, with PIL.Image.open")
    if not isinstance(image, (Tensor, np.ndarray)):
        raise InputError(f"a picture is a PIL image, an array or a tensor, got {type(image).__name__}")
    pixels = torch.from_numpy(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image.detach()
    if pixels.ndim != 3 or 0 in pixels.shape or 3 not in (pixels.shape[0], pixels.shape[-1]):
        raise InputError(f"a picture of shape {tuple(pixels.shape)} should be [H, W, 3], or [3, H, W] if it is floats")
    if pixels.shape[-1] == 3:
        pixels = pixels.movedim(-1, 0)
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise InputError(f"a picture of {pixels.dtype} is not understood: use uint8, or floats in [0, 1]")
    low, high = (end.item() for end in pixels.aminmax())
    if not (-ROUNDING <= low and high <= 1 + ROUNDING):  # also what is not a number
        raise InputError(f"a picture of floats lies in [0, 1], got {low:.3g} to {high:.3g}; from [-1, 1]: (x + 1) / 2")
    return pixels.float().clamp(0, 1)


def _to_pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels * 255).round().byte().movedim(0, -1).contiguous().cpu().numpy())
