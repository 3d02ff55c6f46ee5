"""Configuration: dataclasses, filled from YAML and dotlist by OmegaConf, wrong keys and types refused in one line.

Order: defaults < preset < the model's overrides < dotlist. YAML is read here, where a program starts, and nowhere below.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from streamgen.errors import InputError

T = TypeVar("T")


@cache
def config_root() -> Path:
    """The folder of the shipped YAML files."""
    return Path(str(resources.files("streamgen.configs")))


def available(kind: str) -> list[str]:
    """Names of the shipped files of a kind: presets, models, distill (as TARGET/RECIPE)."""
    root = config_root() / kind
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def suggest(word: str, choices: Sequence[str]) -> str:
    """" (did you mean …?)", or nothing."""
    close = difflib.get_close_matches(word, list(choices), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _keys(schema: type, prefix: str = "") -> list[str]:
    names = []
    for item in fields(schema):
        default = item.default_factory() if callable(item.default_factory) else item.default
        names.append(prefix + item.name)
        if is_dataclass(default):
            names += _keys(type(default), f"{prefix}{item.name}.")
    return names


def _refusal(error: OmegaConfBaseException, schema: type, source: str) -> InputError:
    key = getattr(error, "full_key", None) or ""
    reason = str(error).split("\n")[0]
    if "not in" in reason or "Key" in type(error).__name__:
        reason = f"unknown key {key!r}{suggest(key, _keys(schema))}"
    else:
        reason = f"{key}: {reason}"
    return InputError(f"{source}: {reason}")


def merge(schema: type[T], *layers: object, source: str = "configuration") -> T:
    """A `schema` object from layers (dataclass, dict, dotlist, path to YAML), later ones win.

    Raises: InputError naming the layer, the key and, for a typo, the nearest key.
    """
    config = OmegaConf.structured(schema)
    for layer in layers:
        name = source
        try:
            if isinstance(layer, Path):
                name, part = str(layer.name), OmegaConf.load(layer)
            elif isinstance(layer, (list, tuple)):
                name = "override"
                for item in layer:
                    if "=" not in item:
                        raise InputError(f"override {item!r} is not KEY=VALUE: e.g. cache.window=9")
                part = OmegaConf.from_dotlist(list(layer))
            else:
                part = OmegaConf.create(layer) if not is_dataclass(layer) else OmegaConf.structured(layer)
            config = OmegaConf.merge(config, part)
            # a value is checked against its field's type only when the object is made
            OmegaConf.to_object(config)
        except OmegaConfBaseException as error:
            raise _refusal(error, schema, name) from None
    return OmegaConf.to_object(config)


def read_config(schema: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """One YAML file and a dotlist over the defaults of `schema`."""
    return merge(schema, path, list(overrides))
