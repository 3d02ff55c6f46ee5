"""Collects the packages; everything else is in pyproject.toml. A folder with Python in it, below one of the roots, is a package."""
from pathlib import Path

from setuptools import setup

ROOTS = ("streamgen", "pipelines", "distill", "kernels", "demos", "configs")

here = Path(__file__).parent
packages = ["streamgen", *(f"streamgen.{root}" for root in ROOTS[1:])]
for root in ROOTS:
    folders = {file.parent.relative_to(here).parts for file in (here / root).rglob("*.py")} - {(root,)}
    names = (".".join(parts if root == "streamgen" else ("streamgen", *parts)) for parts in folders if all(map(str.isidentifier, parts)))
    packages += sorted(names)
setup(packages=packages)
