"""Devices are chosen at run time, here alone; importing the package touches none."""

from __future__ import annotations

import torch

from streamgen.errors import InputError, UnavailableError


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """"auto" = cuda > mps > cpu. Raises UnavailableError for a device that is not there, InputError for no device."""
    if isinstance(name, torch.device):
        return name
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name!r} is none that streams run on: use auto, cpu, cuda, cuda:N or mps")
    missing = {
        "cuda": not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count(),
        "mps": not torch.backends.mps.is_available(),
    }.get(device.type, False)
    if missing:
        raise UnavailableError(f"device {name!r} is not available here: use auto or cpu (`streamgen doctor` lists)")
    return device


def resolve_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """"bf16", "fp16", "fp32" or torch's own names; None stays None."""
    if name is None or isinstance(name, torch.dtype):
        return name
    names = {
        "bf16": torch.bfloat16,
        "bfloat16": torch.bfloat16,
        "fp16": torch.float16,
        "float16": torch.float16,
        "fp32": torch.float32,
        "float32": torch.float32,
    }
    if name not in names:
        raise InputError(f"unknown dtype {name!r}: use bf16, fp16 or fp32")
    return names[name]


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its matrix products are fast (accelerators, CPUs with AMX or AVX512-BF16), else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # not in every torch
    fast = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if fast else torch.float32
