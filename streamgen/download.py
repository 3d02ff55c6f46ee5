"""Models and checkpoints from the Hugging Face Hub: the local cache first, sizes before a download.

    folder = snapshot("owner/name", revision="main")
    file = resolve_checkpoint("owner/name/self_forcing_dmd.safetensors")  # or hf://owner/name@revision/path

huggingface_hub does the work, so HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT mean what they always
do. What is in the cache is used as it is: `hf download`, or naming the revision, brings a newer commit of a branch.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from streamgen.config import suggest
from streamgen.errors import InputError

log = logging.getLogger(__name__)

__all__ = ["HubName", "hub_name", "licence_of", "resolve_checkpoint", "snapshot"]

# Weights as safetensors only, and no .py: nothing that a download could run.
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.md", "*LICENSE*")
CHECKPOINTS = (".safetensors", ".pt", ".pth", ".gguf")
CARDS = ("README.md", "MODEL_CARD.md")
_SCHEME = "hf://"
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>refs/pr/\d+|[^/@]+))?(?:/(?P<path>[^/].*))?",
    re.ASCII,
)


@dataclass(frozen=True)
class HubName:
    """`owner/name[@revision][/path]`; `path` is "" for a whole repository."""

    repo_id: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo_id}{revision}" + (f"/{self.path}" if self.path else "")


def hub_name(text: str) -> HubName | None:
    """Read a Hub name; None for what is rather a local path.

    Without `hf://` in front, a path whose first folder exists here is local: a misspelt one should not be looked up
    on the Internet.
    >>> hub_name("owner/name@v1.0")
    HubName(repo_id='owner/name', revision='v1.0', path='')
    >>> hub_name("hf://owner/name/a/b.pt").path
    'a/b.pt'
    >>> hub_name("../name") is hub_name("name") is None
    True
    """
    explicit = text.startswith(_SCHEME)
    found = _NAME.fullmatch(text.removeprefix(_SCHEME).rstrip("/"))
    if found is None or (not explicit and Path(found["repo"].partition("/")[0]).exists()):
        return None
    revision = unquote(found["revision"]) if found["revision"] else None  # a branch named a/b is written a%2Fb
    return HubName(found["repo"], revision, found["path"] or "")


def snapshot(
    repo_id: str,
    revision: str | None = None,
    patterns: Sequence[str] = PATTERNS,
    needs: Collection[str] = (),
) -> Path:
    """The folder of a Hub repository, from the local cache if it is whole there, else downloaded.

    Args:
        revision: a branch, tag or commit; None = main.
        patterns: which files, as in `snapshot_download(allow_patterns=)`.
        needs: files without which the repository is of no use, checked before anything is downloaded.
    Raises: InputError, one line.
    """
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    name = HubName(repo_id, revision)
    arguments: dict[str, Any] = dict(revision=revision, allow_patterns=list(patterns))
    look = lambda local: huggingface_hub.snapshot_download(repo_id, local_files_only=local, **arguments)
    cached, whole = _cached(name, lambda: look(True))
    lacking = _lacking(cached, needs) if cached else []
    if cached and whole and not lacking:
        return cached
    try:
        commit, sizes = _listing(name)
    except InputError as failure:
        if cached is None or lacking:
            raise
        log.warning("%s: the cached copy has all it names and is used, but could not be completed (%s)", name, failure)
        return cached
    wanted = list(filter_repo_objects(sizes, allow_patterns=arguments["allow_patterns"]))
    absent = [file for file in needs if file not in wanted]
    if absent or not wanted:
        raise InputError(
            f"{name} on the Hub has no {', '.join(absent) or 'file that is needed'}: it is not in diffusers' layout; "
            f"one file of it can be given as the checkpoint: {_SCHEME}{name}/FILE"
        )
    _announce(name, commit, {file: sizes[file] for file in wanted})
    return Path(_fetch(name, lambda: look(False)))


def resolve_checkpoint(text: str) -> Path:
    """A local path as it is; `owner/name[@revision]/path/to/file`, with or without `hf://`, as a file of the cache.

    Without `hf://` the file's name must end as one of `CHECKPOINTS`.
    Raises: InputError, one line, if the Hub has no such file. A local path that is missing is the loader's to report.
    """
    if Path(text).exists():
        return Path(text)
    name = hub_name(text)
    if text.startswith(_SCHEME):
        if name is None or not name.path:
            raise InputError(f"{text!r} does not name a file on the Hub: write {_SCHEME}owner/name/path/to/file")
    elif name is None or not name.path.endswith(CHECKPOINTS):
        return Path(text)
    return _file(name)


def licence_of(folder: str | Path) -> str | None:
    """The licence a model's card states in its front matter; None without a card or a licence in it."""
    import yaml

    for file in (Path(folder) / card for card in CARDS):
        if not file.is_file():
            continue
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        try:
            data = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError:
            continue
        stated = data.get("license") if isinstance(data, dict) else None
        if stated == "other":  # the card then says which in a key of its own
            stated = data.get("license_name") or stated
        if stated:
            return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)
    return None


# --- steps


def _file(name: HubName) -> Path:
    import huggingface_hub

    arguments: dict[str, Any] = dict(repo_id=name.repo_id, filename=name.path, revision=name.revision)
    look = lambda local: huggingface_hub.hf_hub_download(local_files_only=local, **arguments)
    cached, _ = _cached(name, lambda: look(True))
    if cached is not None:
        return cached
    commit, sizes = _listing(name)
    if name.path not in sizes:
        hint = suggest(name.path, [file for file in sizes if file.endswith(CHECKPOINTS)])
        raise InputError(f"{name.repo_id} on the Hub has no file {name.path!r}{hint}: see {_page(name)}/tree/main")
    _announce(name, commit, {name.path: sizes[name.path]})
    return Path(_fetch(name, lambda: look(False)))


def _cached(name: HubName, look: Callable[[], str]) -> tuple[Path | None, bool]:
    """What the cache has, and whether that is known to be less than was asked for."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(look()), True
    except LocalEntryNotFoundError as failure:
        part = getattr(failure, "snapshot_path", None)  # new releases know, e.g., that diffusers left the card out
        return (Path(part) if part else None), False
    except Exception as failure:
        raise _explained(failure, name) from failure


def _lacking(folder: Path, needs: Collection[str]) -> list[str]:
    """What a cached folder itself says should be there: an interrupted download leaves a part, without a mark."""
    names = list(needs)
    try:
        if (folder / "model_index.json").is_file():
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            parts = [part for part, of in index.items() if isinstance(of, list) and len(of) == 2 and all(of)]
            names += [f"{part}/*" for part in parts]
            names += [f"{part}/*.safetensors" for part in parts if (folder / part / "config.json").exists()]
        for shards in sorted(folder.glob("**/*.safetensors.index.json")):
            files = sorted(set(json.loads(shards.read_text(encoding="utf-8"))["weight_map"].values()))
            names += [f"{shards.parent.relative_to(folder).as_posix()}/{file}" for file in files]
    except (OSError, ValueError, KeyError, AttributeError):
        return ["readable index files"]
    return [name for name in names if not any(path.exists() for path in folder.glob(name))]


def _listing(name: HubName) -> tuple[str | None, dict[str, int]]:
    """The commit, and its files with their sizes."""
    import huggingface_hub

    ask = lambda: huggingface_hub.HfApi().model_info(name.repo_id, revision=name.revision, files_metadata=True)
    info = _fetch(name, ask)
    return info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _announce(name: HubName, commit: str | None, sizes: dict[str, int]) -> None:
    """Say what a download will bring, less what is here already; refuse what the disk cannot hold."""
    from huggingface_hub import try_to_load_from_cache

    missing = {
        file: size
        for file, size in sizes.items()
        if not isinstance(try_to_load_from_cache(name.repo_id, file, revision=commit), str)
    }
    size, target = sum(missing.values()), _cache_folder()
    free = shutil.disk_usage(next(folder for folder in (target, *target.parents) if folder.exists())).free
    if size > free:
        raise InputError(_full(f"{name} is {_amount(size)}, {target} has {_amount(free)} free"))
    if missing:
        log.info("downloading %d file%s, %s to %s", len(missing), "s"[: len(missing) > 1], _amount(size), target)


def _fetch(name: HubName, request: Callable[[], Any]) -> Any:
    try:
        return request()
    except Exception as failure:
        raise _explained(failure, name) from failure


def _explained(failure: Exception, name: HubName) -> InputError:
    """One line that says what to do. The order matters: huggingface_hub's classes derive from each other."""
    from huggingface_hub import errors

    code = failure.errno if isinstance(failure, OSError) else None
    causes = (failure, failure.__cause__, failure.__context__)  # a failed download wraps what stopped it
    if isinstance(failure, errors.GatedRepoError):
        return InputError(
            f"{name} is gated: accept its terms at {_page(name)}, then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(failure, errors.RepositoryNotFoundError):
        return InputError(
            f"no model {name.repo_id!r}, neither a folder here nor on the Hub: check the name; "
            "if it is private, log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(failure, errors.RevisionNotFoundError):
        return InputError(f"{name.repo_id} has no revision {name.revision!r}: see {_page(name)}/tree/main")
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return InputError(
            f"{name} is not, or not wholly, in the cache {_cache_folder()} and HF_HUB_OFFLINE forbids the network: "
            "unset it, or set HF_HUB_CACHE to where the model is"
        )
    reason = f"{type(failure).__name__}: {failure}".strip().partition("\n")[0][:200]
    if isinstance(failure, errors.HfHubHTTPError):
        return InputError(f"the Hub refused {name} ({reason}): try again later, or check HF_TOKEN")
    if code == errno.ENOSPC:
        return InputError(_full(f"the disk of {_cache_folder()} is full"))
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"cannot write to the cache {_cache_folder()}: set HF_HOME to a folder that can be written")
    return InputError(
        f"{name} is not, or not wholly, in the cache and cannot be fetched from the Hub ({reason}): "
        "check the network and run again, what has arrived is kept; or give a local path"
    )


# --- small things


def _cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().absolute()


def _page(name: HubName) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name.repo_id}"


def _full(what: str) -> str:
    return f"no space: {what}; free some, or set HF_HOME to a larger disk"


def _amount(size: int) -> str:
    """
    >>> _amount(28_940_000_000), _amount(13_400_000)
    ('28.9 GB', '13.4 MB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
