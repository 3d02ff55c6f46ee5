"""Weights stored in 8 bits or fewer, back to numbers a layer can multiply with: fp8, with scales or plain, and GGUF.

fp8: `X.weight` in float8 beside `X.scale_weight` (or `X.weight_scale`), one number or one per row, means their
product. Scales of the activations and markers are for kernels that multiply in fp8; nothing here needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamgen.errors import InputError, UnavailableError

__all__ = ["Packed", "dequantise", "is_quantised", "read_gguf"]

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".scale_weight", ".weight_scale")
UNREAD = (".scale_input", ".input_scale", ".comfy_quant")
MARKER = "scaled_fp8"


@dataclass(frozen=True)
class Packed:
    """One tensor of a GGUF file as it lies there."""

    blocks: Tensor  # [n, bytes of a block]
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]

    def unpack(self) -> Tensor:
        """float32."""
        from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, dequantize_functions

        values = dequantize_functions[self.kind](self.blocks, *GGML_QUANT_SIZES[self.kind], torch.float32)
        return values.reshape(self.shape)


def is_quantised(state: Mapping[str, Tensor | Packed]) -> bool:
    """Whether any of these cannot be computed with as it is."""
    return any(isinstance(tensor, Packed) or tensor.dtype in FP8 for tensor in state.values())


def dequantise(state: dict[str, Tensor | Packed], dtype: torch.dtype, source: str) -> dict[str, Tensor]:
    """Quantised tensors in `dtype`, the others as they are; `state` is emptied on the way, to hold nothing twice.

    Raises: InputError for integers (a scheme that is not known here) and for scales that do not fit.
    """
    scales: dict[str, Tensor] = {}
    if any(not isinstance(tensor, Packed) and tensor.dtype in FP8 for tensor in state.values()):
        scales = _take_scales(state)
    result: dict[str, Tensor] = {}
    for name in list(state):
        tensor = state.pop(name)
        if isinstance(tensor, Packed):
            tensor = tensor.unpack().to(dtype)
        elif name in scales:
            tensor = (tensor.float() * _rows(scales[name], tensor, name, source)).to(dtype)
        elif tensor.dtype in FP8:
            tensor = tensor.to(dtype)
        elif not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{source} stores {name} as {kind}; of quantised weights only fp8 and GGUF can be read")
        result[name] = tensor
    return result


def _take_scales(state: dict[str, Any]) -> dict[str, Tensor]:
    """Remove what stands beside fp8 weights; returns the scale of each weight by its name."""
    scales: dict[str, Tensor] = {}
    for name in list(state):
        stem, dot, leaf = name.rpartition(".")
        if name.endswith(UNREAD) or leaf == MARKER:
            del state[name]
        elif name.endswith(SCALES) and f"{stem}.weight" in state:
            scales[f"{stem}.weight"] = state.pop(name)
    return scales


def _rows(scale: Tensor, weight: Tensor, name: str, source: str) -> Tensor:
    """[] or [out, 1, …]: what broadcasts over the rows of `weight`."""
    if scale.numel() == 1:
        return scale.float().reshape(())
    if scale.numel() != len(weight) or scale.dim() > weight.dim():
        raise InputError(
            f"{source} scales {name} {tuple(weight.shape)} by {tuple(scale.shape)}; only one number, or one per row, "
            "can be read"
        )
    return scale.float().reshape(-1, *[1] * (weight.dim() - 1))


def read_gguf(path: Path) -> dict[str, Tensor | Packed]:
    """Tensors of a GGUF file: float16 and float32 ones as they are, quantised ones packed.

    Raises: UnavailableError without the package `gguf`; InputError for other files and for kinds diffusers cannot read.
    """
    try:
        import gguf
    except ImportError as failure:
        raise UnavailableError(f"reading {path} needs the package gguf: pip install gguf") from failure
    from diffusers.quantizers.gguf.utils import dequantize_functions

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as failure:
        raise InputError(f"{path} is truncated or not a GGUF file") from failure
    plain = (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32)
    state: dict[str, Tensor | Packed] = {}
    for tensor in reader.tensors:
        shape = _stored_shape(reader, tensor)
        data = torch.from_numpy(tensor.data.copy())
        if tensor.tensor_type in plain:
            state[tensor.name] = data.reshape(shape)
        elif tensor.tensor_type in dequantize_functions:
            block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
            state[tensor.name] = Packed(data.reshape(-1, block_bytes), tensor.tensor_type, shape)
        else:
            kinds = ", ".join(sorted(kind.name for kind in dequantize_functions))
            raise InputError(f"{path} stores {tensor.name} as {tensor.tensor_type.name}; diffusers reads {kinds}")
    return state


def _stored_shape(reader, tensor) -> tuple[int, ...]:
    """Outermost first; tensors of five dimensions may be stored with fewer, and the true ones in a field."""
    field = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
    if field is not None:
        return tuple(int(field.parts[index][0]) for index in field.data)
    return tuple(int(size) for size in reversed(tensor.shape))
