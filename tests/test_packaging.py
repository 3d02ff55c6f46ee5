"""What a wheel holds, and what importing from it touches. No network: the build uses the tools already installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tokenize
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("streamgen", "pipelines", "distill", "kernels", "demos", "configs")

if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("not a checkout", allow_module_level=True)


def run(*command: str, cwd: Path, **env: str) -> str:
    """Standard output of a command whose failure shows all it printed."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    clean |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **env}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def wanted(source: Path) -> set[str]:
    """Names in site-packages of all that a checkout's package folders hold; only notes for readers may stay behind."""
    names = set()
    for folder in FOLDERS:
        for path in (source / folder).rglob("*"):
            if path.is_file() and path.suffix != ".md":
                inside = path.relative_to(source if folder == "streamgen" else source / folder)
                names.add((inside if folder == "streamgen" else Path("streamgen") / folder / inside).as_posix())
    return names


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the checkout, so that no build folder appears in it, and with no old one to copy from."""
    work = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
    for folder in FOLDERS:
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, work / "source" / folder, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, work / "source")
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(work), str(work / "source"), cwd=work)
    (built,) = work.glob("streamgen-*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands for site-packages, with the wheel in it."""
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip")
    run(*pip, "install", "-q", "--no-deps", "--no-compile", "--target", str(target), str(wheel), cwd=target)
    return target


def test_wheel_holds_every_package_and_data_file(wheel: Path):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("streamgen/")}
    expected = wanted(wheel.parent / "source")
    hint = "data belongs to streamgen/assets or configs/**.yaml, or needs a line under package-data in pyproject.toml"
    assert not expected - held, f"missing from the wheel: {sorted(expected - held)}; {hint}"
    assert not {name for name in held - expected if not name.endswith(".md")}
    assert "streamgen/py.typed" in held


def test_wheel_puts_nothing_else_into_site_packages(installed: Path):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} - {"bin", "Scripts"}
    assert names == {"streamgen"}
    (info,) = installed.glob("streamgen-*.dist-info")
    assert "streamgen = streamgen.cli:main" in (info / "entry_points.txt").read_text()
    assert "License-Expression: Apache-2.0" in (info / "METADATA").read_text()
    assert (info / "licenses" / "LICENSE").is_file()


def test_installed_package_imports_outside_the_checkout(installed: Path, tmp_path: Path):
    """The mapping puts pipelines/ and kernels/ where `streamgen.pipelines` and `streamgen.kernels` look for them."""
    modules = ["streamgen", "streamgen.media"]
    modules += ["streamgen.pipelines"] if (ROOT / "pipelines/__init__.py").is_file() else []
    modules += ["streamgen.kernels.attention"] if [*(ROOT / "kernels").glob("attention*")] else []
    code = f"""
import importlib, sys
sys.path.insert(0, {str(installed)!r})
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
from importlib.resources import files
for name in {modules!r}:
    module = importlib.import_module(name)
    places = [module.__file__] if module.__file__ else list(module.__path__)
    assert all(p.startswith({str(installed)!r}) for p in places), (name, places)
assert (files("streamgen") / "py.typed").is_file()
for folder in {sorted(p.name for p in (ROOT / "configs").iterdir() if [*p.rglob("*.yaml")])!r}:
    assert (files("streamgen.configs") / folder).is_dir(), folder
"""
    run(sys.executable, "-c", code, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")


def test_folders_of_the_checkout_shadow_nobody():
    """With the root on sys.path, as for `python -m`, Hugging Face's `kernels`, a regular package, has to win."""
    code = """
import importlib.machinery, sys
spec = importlib.machinery.PathFinder.find_spec("kernels", [sys.argv[1]])
assert spec is None or spec.origin is None, spec      # a namespace: any regular package of that name comes first
"""
    run(sys.executable, "-c", code, str(ROOT), cwd=ROOT)
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [name for name in FOLDERS[1:] if (ROOT / f"streamgen/{name}.py").exists()]
    assert not (ROOT / "tests" / "__init__.py").exists() and not (ROOT / "conftest.py").exists()


def test_import_is_light():
    code = "import sys, streamgen; print(*sys.modules)"
    loaded = run(sys.executable, "-c", code, cwd=ROOT).split()
    assert "streamgen" in loaded and "diffusers" not in loaded and "transformers" not in loaded


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path):
    source = wheel.parent / "source"
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "-o", str(tmp_path), str(source), cwd=tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sdist), cwd=tmp_path)
    (again,) = tmp_path.glob("*.whl")
    names = [{n for n in zipfile.ZipFile(w).namelist() if n.startswith("streamgen/")} for w in (wheel, again)]
    assert names[0] == names[1]


def test_no_size_of_a_model_is_typed_in_the_code():
    """Tokens per frame, cache length and picture sizes follow from configurations and inputs (peers type them in)."""
    sizes = {"1560", "32760", "4680", "480", "832", "720"}
    for folder in ("streamgen", "pipelines", "kernels", "distill", "demos"):
        for path in (ROOT / folder).rglob("*.py"):
            with tokenize.open(path) as file:
                tokens = list(tokenize.generate_tokens(file.readline))
            typed = [(t.string, t.start[0]) for t in tokens if t.type == tokenize.NUMBER and t.string in sizes]
            assert not typed, f"{path}: {typed}"
