"""Stream video out of causal diffusion transformers: one engine, many presets.

    pipe = streamgen.load("sprites")
    with pipe.stream("a red circle bouncing on a navy background", seed=0) as stream:
        for chunk in stream: ...

Names are imported when first used, so that `import streamgen` costs no more than its own files.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# In a checkout pipelines/, kernels/, … sit beside this folder; in a wheel, inside it.
_here = Path(__file__).resolve().parent
if not (_here / "pipelines").is_dir():
    __path__.append(str(_here.parent))

_EXPORTS = {
    "CausalWanTransformer3DModel": "streamgen.models.transformer",
    "Engine": "streamgen.engine",
    "InputError": "streamgen.errors",
    "SeededNoise": "streamgen.noise",
    "StreamConfig": "streamgen.config",
    "StreamSession": "streamgen.session",
    "StreamingVideoPipeline": "streamgen.pipelines.streaming",
    "TensorNoise": "streamgen.noise",
    "attach_lora": "streamgen.models.lora",
    "load": "streamgen.hub",
    "load_preset": "streamgen.config",
    "load_transformer": "streamgen.models.loading",
    "merge_lora": "streamgen.models.lora",
    "read_lora": "streamgen.models.lora",
    "register_policy": "streamgen.cache.policies",
    "register_schedule": "streamgen.schedules",
    "save_transformer": "streamgen.models.loading",
    "set_lora_scale": "streamgen.models.lora",
}


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'streamgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
