"""Codecs: what turns latents into pixels and back, chunk by chunk, with the state of a stream outside the network.

    codec = codec_for(AutoencoderKLWan.from_pretrained(...))   # or TinyCodec.from_file("taew2_1.pth")
    pixels, state = codec.decode(latents)                      # the first chunk of a stream
    pixels, state = codec.decode(more_latents, state)
"""

from __future__ import annotations

from diffusers import AutoencoderKLWan

from streamgen.errors import InputError
from streamgen.models.codecs.base import Codec
from streamgen.models.codecs.tiled import TiledCodec
from streamgen.models.codecs.tiny import TinyCodec
from streamgen.models.codecs.wan import WanCodec

__all__ = ["Codec", "TiledCodec", "TinyCodec", "WanCodec", "codec_for"]


def codec_for(vae) -> Codec:
    """The codec of a pipeline's `vae`: a codec as it is, diffusers' `AutoencoderKLWan` in a `WanCodec`.

    Raises: InputError for anything else.
    """
    if isinstance(vae, AutoencoderKLWan):
        return WanCodec(vae)
    if isinstance(vae, Codec):
        return vae
    raise InputError(
        f"{type(vae).__name__} does not stream: give a StreamingVAE, an AutoencoderKLWan or a codec of "
        "streamgen.models.codecs as the vae"
    )
