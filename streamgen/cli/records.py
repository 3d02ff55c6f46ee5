"""What lies beside a clip: a JSON record that reproduces it and marks it as finished, and the state that continues it.

    clip.mp4  clip.json  clip.state.pt          frames/frame_000000.png …  frames/clip.json  frames/clip.state.pt
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from streamgen.cli.timeline import Entry
from streamgen.config import StreamConfig, merge
from streamgen.errors import InputError, UnavailableError

log = logging.getLogger(__name__)

VERSION = 1
SETTINGS: dict[str, type | tuple[type, ...]] = {
    "prompts": list, "negative_prompt": str, "seed": int, "num_frames": int, "height": (int, type(None)),
    "width": (int, type(None)), "fps": (int, float), "model": str, "checkpoint": (str, type(None)), "weights": str,
    "preset": (str, type(None)), "overrides": list, "config": dict, "device": str, "dtype": str,
    "threads": (int, type(None)), "endless": bool, "extend": (str, type(None)), "lora": list, "lora_2": list,
    "codec": (str, type(None)), "tile": (int, type(None)), "image": (str, type(None)),
}  # fmt: skip
# say nothing about frames: what they name is in `weights`
NAMES = ("model", "checkpoint", "codec", "image", "preset", "overrides", "device", "threads", "endless")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".json")


@dataclass(frozen=True)
class Source:
    """An earlier clip a command starts from: its settings; its record; the state of its stream if that goes on."""

    path: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] | None = None
    state: dict[str, Any] | None = None

    @property
    def surplus(self):
        """Frames [f, H, W, 3] that were computed and not shown yet, or None."""
        return (self.state or {}).get("render", {}).get("surplus")


# ------------------------------------------------------------------------------------------- places
def record_path(target: str) -> Path:
    return _beside(target, ".json")


def state_path(target: str) -> Path:
    return _beside(target, ".state.pt")


def _beside(target: str, suffix: str) -> Path:
    from streamgen.media.paths import is_folder

    path = Path(target)
    return path / f"clip{suffix}" if is_folder(target) else path.with_suffix(suffix)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write` under another name first, so that a file is complete or absent. Raises MediaError."""
    from streamgen.media import MediaError

    partial = path.with_name(f".{path.name}.part")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError for a full disk
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise MediaError(f"{path} could not be written: {reason}; the clip is complete") from None
    finally:
        partial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------- records
def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A record that `render` wrote. Raises InputError for anything else."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give the .json that lies beside a clip") from None
    except ValueError:
        raise InputError(f"cannot read {path}: it is not JSON; give the .json that lies beside a clip") from None
    version = record.get("streamgen_clip") if isinstance(record, dict) else None
    if version is None:
        raise InputError(f"{path} is no record of a clip: give the .json that `streamgen render` wrote beside one")
    if version != VERSION:
        raise InputError(f"{path} is a record of version {version}: this streamgen reads {VERSION}; use its release")
    settings, result = record.get("settings"), record.get("result")
    for key, kind in SETTINGS.items():
        if not isinstance(settings, dict) or not isinstance(settings.get(key, ...), kind):
            raise InputError(f"{path} is damaged: settings.{key} is missing or of another kind; render the clip again")
    if not isinstance(result, dict):
        raise InputError(f"{path} is damaged: it has no result; render the clip again")
    if not settings["prompts"] and not settings["extend"]:
        raise InputError(f"{path} is damaged: settings.prompts is empty; render the clip again")
    return record


def _record_of(clip: str) -> dict[str, Any]:
    """The record beside a clip. Raises InputError also where it is that of another one: clip.mp4's beside clip.webm."""
    path = record_path(clip)
    record = read_record(path)
    name = record["result"].get("clip")
    if name != Path(clip).name and isinstance(name, str) and (path.parent / name).exists():
        raise InputError(f"{path} is the record of {path.parent / name}, and {clip} has none: give that one")
    return record


def old_record(target: str) -> dict[str, Any] | None:
    """The record that a clip's own would replace. Raises InputError if the file is anything else."""
    path = record_path(target)
    if not os.path.lexists(path):
        return None
    try:
        return read_record(path)
    except InputError:
        raise InputError(f"cannot write {path}: a file that is no record of a clip has that name; rename one") from None


def write_record(target: str, settings: dict[str, Any], result: dict[str, Any]) -> None:
    """The record beside a finished clip."""
    record = {"streamgen_clip": VERSION, "settings": settings, "result": result, "made_with": made_with()}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_whole(record_path(target), lambda path: path.write_text(text, encoding="utf-8"))


def made_with() -> dict[str, Any]:
    """Versions and threads: what else last bits may depend on."""
    import torch

    from streamgen import __version__

    libraries = {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "numpy")}
    return {
        "streamgen": __version__, **libraries, "python": platform.python_version(), "system": platform.platform(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def entries_of(settings: dict[str, Any], source: str) -> tuple[Entry, ...]:
    """The prompts of a record; see `Setup.settings`. Raises InputError."""
    kinds = {"frame": int, "prompt": str, "mode": (str, type(None)), "blend": int}
    for item in settings["prompts"]:
        if not isinstance(item, dict) or not all(isinstance(item.get(key, ...), kind) for key, kind in kinds.items()):
            raise InputError(f"{source} is damaged: settings.prompts holds {item!r}; render the clip again")
    return tuple(
        Entry(item["frame"], item["prompt"], item["mode"], item["blend"], f"frame {item['frame']}")
        for item in settings["prompts"]
    )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that tell two clips apart; where they were made and what their files were called does not."""
    out = [key for key in SETTINGS if key not in (*NAMES, "config") and old[key] != new[key]]
    try:  # a release that knows more settings reads an older record with their defaults
        same = merge(StreamConfig, old["config"]) == merge(StreamConfig, new["config"])
    except InputError:
        same = False
    return out if same else [*out, "config"]


def finished(target: str, settings: dict[str, Any], with_state: bool) -> list[str] | None:
    """Whether a clip is there as `settings` say: [] = yes, None = not or not all of it, else what is different."""
    record = old_record(target)
    if record is None or not os.path.exists(target) or record["result"].get("clip") != Path(target).name:
        return None
    state = record["result"].get("state")  # one that is there without being named is of an earlier clip
    lacking = with_state and not (state and (record_path(target).parent / state).is_file())
    return differences(record["settings"], settings) or (None if lacking else [])


def stamp(model: str, parts: Sequence[str | None] = ()) -> str:
    """Tells weights apart without reading all of them: names, sizes and 16 blocks of every file of a model.

    `parts`: further files that shape the result (a checkpoint, LoRAs, a codec, a picture); None = not there.
    """
    from streamgen.download import resolve_checkpoint
    from streamgen.hub import model_folder

    roots = [model_folder(model), *(resolve_checkpoint(part) for part in parts if part)]
    digest = hashlib.sha256()
    for root in roots:
        files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.suffix in WEIGHTS)
        for file in files:
            if file.name == "manifest.json" or not file.is_file():  # how it was trained changes no frame
                continue
            size = file.stat().st_size
            digest.update(f"{file.relative_to(root)} {size}\n".encode())
            with open(file, "rb") as data:
                for i in range(16):
                    data.seek(max(0, size - 4096) * i // 15)
                    digest.update(data.read(4096))
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------- states
def write_state(path: Path, state: dict[str, Any]) -> None:
    """A stream's `state_dict`, for `pipe.resume(torch.load(path, weights_only=True))` and --extend."""
    import torch

    write_whole(path, lambda partial: torch.save(state, partial))


def read_state(path: Path, device: str) -> dict[str, Any]:
    """A stream's state. Raises InputError for what is none; nothing in the file is run."""
    import pickle

    import torch

    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; give a state file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError):
        raise InputError(f"{path} is no state of a stream: give what --save-state wrote") from None
    if not isinstance(state, dict) or not {"version", "config", "spec", "rollout", "prompt"} <= state.keys():
        raise InputError(f"{path} is no state of a stream: give what --save-state wrote")
    if not isinstance(state["prompt"], str):
        raise InputError(f"{path} holds a batch of streams: extend it with pipe.resume in Python")
    return state


def find_state(path: str, device: str) -> tuple[Path, dict[str, Any]]:
    """The state that continues `path`: a state file, or a clip with one beside it."""
    if Path(path).suffix.lower() in (".pt", ".pth"):
        return Path(path), read_state(Path(path), device)
    if not os.path.exists(path):
        raise InputError(f"cannot extend {path}: there is no such file; give a clip or its .state.pt")
    record = _record_of(path) if record_path(path).is_file() else None
    named = record["result"].get("state") if record else None
    file = record_path(path).parent / named if named else state_path(path)
    if not file.is_file():
        again = f"streamgen render --from {record_path(path)} --save-state -o again.mp4" if record else "--save-state"
        raise InputError(
            f"cannot extend {path}: pixels alone cannot be continued yet, it takes the state of the stream, and there "
            f"is no {file}; render the clip with its state ({again}) and extend that"
        )
    state = read_state(file, device)
    if record is None or state.get("render", {}).get("sha256") != record["result"].get("sha256"):
        raise InputError(f"{file} belongs to another render of {path}: to continue from it all the same, name it")
    return file, state


def pick_device(asked: str | None, recorded: str | None) -> str:
    """The device asked for, else the one a record names if it is here, else the best. Raises InputError."""
    from streamgen.device import resolve_device

    if asked is None and recorded is not None:
        try:
            return str(resolve_device(recorded))
        except UnavailableError:
            log.warning("the clip was made on %s, which is not here: last bits may differ", recorded)
    return str(resolve_device(asked or "auto"))


def source_of(from_path: str | None, extend: str | None, device: str | None) -> Source:
    """What --from or --extend name; nothing if neither is given. `device`: as asked for."""
    if extend is not None:
        file, state = find_state(extend, pick_device(device, None))
        settings = state.get("render", {}).get("settings", {})
        settings = {key: value for key, value in settings.items() if key not in ("prompts", "num_frames", "device")}
        return Source(extend, {**settings, "extend": str(file.resolve())}, None, state)
    if from_path is None:
        return Source()
    path = from_path if from_path.endswith(".json") else str(record_path(from_path))
    record = read_record(path) if path == from_path else _record_of(from_path)
    settings, state = record["settings"], None
    if settings["extend"]:
        state = read_state(Path(settings["extend"]), pick_device(device, settings["device"]))
    return Source(path, settings, record, state)
