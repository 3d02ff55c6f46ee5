"""Models from the Hub: the cache before the network, sizes before a download, one line for what goes wrong."""

import doctest
import errno
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from streamgen import download, hub
from streamgen.download import hub_name, licence_of, resolve_checkpoint, snapshot
from streamgen.errors import InputError

COMMIT = "a" * 40
INDEX = json.dumps({"_class_name": "P", "vae": ["diffusers", "V"], "safety": [None, None]})
FILES = {"model_index.json": INDEX, "vae/config.json": "{}", "vae/w.safetensors": "weights", "README.md": "hello"}
SIZES = dict(zip(FILES, (100, 100, 2_000_000_000, 1_000_000_000)))
REAL = SimpleNamespace(
    model_info=huggingface_hub.HfApi.model_info,
    snapshot_download=huggingface_hub.snapshot_download,
    hf_hub_download=huggingface_hub.hf_hub_download,
)


class FakeHub:
    """One repository, `owner/name`, over the real local cache; whatever needs the network is recorded."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.files, self.sizes = cache, dict(FILES), dict(SIZES)
        self.asked: list[str | None] = []
        self.fetched: list[dict] = []
        self.failure: Exception | None = None  # of the listing
        self.stop: Exception | None = None  # of the download

    def model_info(self, repo_id, revision=None, files_metadata=False):
        self.asked.append(revision)
        if self.failure:
            raise self.failure
        assert files_metadata  # sizes are not sent without it
        files = [SimpleNamespace(rfilename=file, size=self.sizes.get(file)) for file in self.files]
        return SimpleNamespace(sha=COMMIT, siblings=files)

    def place(self, *files: str, revision: str = "main") -> Path:
        """Files into the cache, in huggingface_hub's own layout."""
        repo = self.cache / "models--owner--name"
        for file in files:
            path = repo / "snapshots" / COMMIT / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.files[file])
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(COMMIT)
        return repo / "snapshots" / COMMIT

    def snapshot_download(self, repo_id, local_files_only=False, **arguments):
        if local_files_only:
            return REAL.snapshot_download(repo_id, local_files_only=True, **arguments)
        return str(self._download(self.files, arguments))

    def hf_hub_download(self, repo_id, filename, local_files_only=False, **arguments):
        if local_files_only:
            return REAL.hf_hub_download(repo_id, filename, local_files_only=True, **arguments)
        return str(self._download([filename], arguments) / filename)

    def _download(self, files, arguments) -> Path:
        self.fetched.append(arguments)
        if self.stop:
            raise self.stop
        return self.place(*files, revision=arguments["revision"] or "main")


@pytest.fixture(autouse=True)
def fake(tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(fake.cache))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, *a, **k: fake.model_info(*a, **k))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    return fake


def refusal(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def http(kind: type, text: str = "403 Client Error.\n\nmore lines") -> Exception:
    return kind(text, response=SimpleNamespace(headers={}, request=None, status_code=403))


# --- the cache


def test_a_cached_snapshot_is_used_without_network(fake, caplog):
    folder = fake.place(*FILES)
    with caplog.at_level(logging.INFO):
        assert snapshot("owner/name") == folder and hub.model_folder("owner/name") == folder
    assert not fake.asked and not fake.fetched and not caplog.records


@pytest.mark.parametrize("lost", ["model_index.json", "vae/config.json", "vae/w.safetensors"])
def test_a_part_of_a_snapshot_is_completed(fake, lost):
    present = [file for file in FILES if file != lost and not (lost == "vae/config.json" and file.startswith("vae/"))]
    folder = fake.place(*present)
    assert hub.model_folder("owner/name") == folder and (folder / lost).is_file()
    assert len(fake.asked) == len(fake.fetched) == 1


def test_lost_shards_are_noticed(fake):
    shards = {"a": "w-1.safetensors", "b": "w-2.safetensors"}
    fake.files |= {"vae/w.safetensors.index.json": json.dumps({"weight_map": shards}), **dict.fromkeys(
        (f"vae/{shard}" for shard in shards.values()), "weights")}  # fmt: skip
    fake.place(*(file for file in fake.files if file != "vae/w-2.safetensors"))
    snapshot("owner/name")
    assert len(fake.fetched) == 1
    snapshot("owner/name")
    assert len(fake.fetched) == 1


def test_offline_what_others_downloaded_is_good_enough(fake, monkeypatch, caplog):
    folder = fake.place("model_index.json", "vae/config.json", "vae/w.safetensors")  # diffusers leaves the card out

    def incomplete(*_, **__):
        raise errors.IncompleteSnapshotError("README.md is missing", str(folder))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", incomplete)
    fake.failure = errors.OfflineModeIsEnabled("offline")
    assert snapshot("owner/name") == folder and "cached copy" in caplog.text
    (folder / "vae/w.safetensors").unlink()
    assert "HF_HUB_OFFLINE" in refusal(lambda: snapshot("owner/name"))


def test_huggingface_hub_in_offline_mode_is_one_line(fake, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", REAL.model_info)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal(lambda: hub.model_folder("owner/name@v1"))
    assert "owner/name@v1" in message and "HF_HUB_OFFLINE" in message and str(fake.cache) in message
    assert "HF_HUB_OFFLINE" in refusal(lambda: resolve_checkpoint("owner/name/w.safetensors"))


# --- the download


def test_sizes_are_said_before_a_download_and_only_then(fake, caplog):
    with caplog.at_level(logging.INFO):
        folder = snapshot("owner/name")
    assert [record.getMessage() for record in caplog.records] == [f"downloading 4 files, 3.0 GB to {fake.cache}"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert snapshot("owner/name") == folder
    assert not caplog.records and len(fake.asked) == 1


def test_files_that_are_here_do_not_count(fake, caplog):
    fake.place("model_index.json", "vae/config.json", "README.md")
    with caplog.at_level(logging.INFO):
        snapshot("owner/name")
    assert any(record.getMessage().startswith("downloading 1 file, 2.0 GB to") for record in caplog.records)


def test_patterns_choose_and_code_is_never_fetched(fake, caplog):
    fake.files |= {"model.py": "", "weights.bin": "", "weights.pt": ""}
    with caplog.at_level(logging.INFO):
        snapshot("owner/name")
        assert fake.fetched[0]["allow_patterns"] == list(download.PATTERNS) and "downloading 4 files" in caplog.text
        snapshot("owner/name", revision="other", patterns=["*.md"])
    assert fake.fetched[1]["allow_patterns"] == ["*.md"] and "no file" in refusal(
        lambda: snapshot("owner/name", "third", patterns=["*.onnx"])
    )


def test_nothing_is_downloaded_that_is_no_pipeline(fake):
    del fake.files["model_index.json"]
    assert "model_index.json" in refusal(lambda: hub.model_folder("owner/name")) and not fake.fetched


def test_a_full_disk_is_noticed_before_the_download(fake, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_500_000_000))
    message = refusal(lambda: snapshot("owner/name"))
    assert "3.0 GB" in message and "2.5 GB" in message and "HF_HOME" in message and not fake.fetched


@pytest.mark.parametrize(
    "failure, words",
    [
        (http(errors.GatedRepoError), ("gated", "HF_TOKEN", "https://huggingface.co/owner/name")),
        (http(errors.RepositoryNotFoundError), ("no model 'owner/name'", "private")),
        (http(errors.RevisionNotFoundError), ("no revision 'v1'",)),
        (http(errors.HfHubHTTPError, "503 Server Error"), ("503", "try again later")),
        (errors.OfflineModeIsEnabled("offline"), ("HF_HUB_OFFLINE",)),
        (ConnectionError("refused"), ("ConnectionError: refused", "network")),
        (OSError(errno.ENOSPC, "No space left on device"), ("no space", "HF_HOME")),
        (PermissionError(errno.EACCES, "denied"), ("cannot write", "HF_HOME")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("stage", ["failure", "stop"])
def test_every_failure_is_one_line_that_says_what_to_do(fake, stage, failure, words):
    setattr(fake, stage, failure)
    for call in (lambda: snapshot("owner/name", "v1"), lambda: resolve_checkpoint("owner/name@v1/vae/w.safetensors")):
        message = refusal(call)
        assert all(word in message for word in words), message


# --- names


def test_names_are_read():
    assert doctest.testmod(download).failed == 0
    assert hub_name("o/n@refs/pr/3") == download.HubName("o/n", "refs/pr/3")
    assert hub_name("hf://o/n@a%2Fb/x/y.pt") == download.HubName("o/n", "a/b", "x/y.pt")
    assert str(hub_name("o/n@v1/x.pt")) == "o/n@v1/x.pt"
    assert not any(map(hub_name, ("sprites", "./o/n", "/o/n", "o//n", "~/n", "o/n@", "", "hf://o")))


def test_the_revision_reaches_the_hub(fake):
    hub.model_folder("owner/name@v1")
    hub.model_folder("hf://owner/name@v1")  # in the cache by now
    assert fake.asked == ["v1"] and fake.fetched[0]["revision"] == "v1"


def test_what_is_here_is_not_looked_up(fake, tmp_path):
    (tmp_path / "owner" / "mine").mkdir(parents=True)
    (tmp_path / "owner" / "mine" / "model_index.json").write_text("{}")
    assert hub.model_folder("owner/mine") == Path("owner/mine")
    assert hub.model_folder("sprites").name == "sprites"
    message = refusal(lambda: hub.model_folder("owner/name"))  # rather misspelt than on the Hub
    assert "model_index.json" in message and "hf://" in message and "sprites" in message
    assert resolve_checkpoint("owner/run/w.pt") == Path("owner/run/w.pt")
    assert not fake.asked
    hub.model_folder("hf://owner/name")
    assert fake.asked


def test_checkpoints_come_from_here_the_cache_or_the_hub(fake, tmp_path, caplog):
    (tmp_path / "w.pt").write_text("x")
    for local in (str(tmp_path / "w.pt"), "absent.pt", "runs/absent.pt", "owner/name/folder", str(tmp_path)):
        assert resolve_checkpoint(local) == Path(local)
    assert not fake.asked
    with caplog.at_level(logging.INFO):
        path = resolve_checkpoint("owner/name/vae/w.safetensors")
    assert path.read_text() == "weights" and f"downloading 1 file, 2.0 GB to {fake.cache}" in caplog.text
    assert resolve_checkpoint("hf://owner/name/vae/w.safetensors") == path and len(fake.asked) == 1
    assert "did you mean 'vae/w.safetensors'" in refusal(lambda: resolve_checkpoint("owner/name/vae/v.safetensors"))
    assert "hf://owner/name/path/to/file" in refusal(lambda: resolve_checkpoint("hf://owner/name"))


# --- licences


@pytest.mark.parametrize(
    "card, licence",
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---", "mit"),
        ("---\nlicense: other\nlicense_name: my-terms\n---\n", "my-terms"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [mit, cc-by-4.0]\n---\n", "mit, cc-by-4.0"),
        ("---\nlanguage: en\n---\nlicense: mit", None),
        ("# Model\nlicense: mit\n", None),
        ("---\nlicense: [unclosed\n---\n", None),
        ("---\njust text\n---\n", None),
    ],
)
def test_licences_are_read_from_the_front_matter(tmp_path, card, licence):
    assert licence_of(tmp_path) is None
    (tmp_path / "MODEL_CARD.md").write_bytes(card.encode())
    assert licence_of(tmp_path) == licence


def test_the_readme_comes_first(tmp_path):
    (tmp_path / "MODEL_CARD.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "README.md").write_text("# no front matter")
    assert licence_of(tmp_path) == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert licence_of(tmp_path) == "apache-2.0"


def test_loading_says_the_licence(fake, caplog):
    fake.files["README.md"] = "---\nlicense: cc-by-nc-4.0\n---\n"
    with caplog.at_level(logging.INFO), pytest.raises(InputError, match="nonsense"):
        hub.load("owner/name@v1", preset="nonsense", device="cpu")  # refused before weights are read
    assert "owner/name@v1: licence cc-by-nc-4.0" in caplog.text
