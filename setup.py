"""Collects the packages, so that no nested one is forgotten; everything else is in pyproject.toml.

A root that holds any file is a package, and so is each folder below it that holds Python.
"""

from pathlib import Path

from setuptools import setup

here = Path(__file__).resolve().parent
names = set()
for root in ("streamgen", "pipelines", "distill", "kernels", "demos", "configs"):
    prefix = () if root == "streamgen" else ("streamgen",)
    for file in (here / root).rglob("*.*"):
        parts = file.parent.relative_to(here).parts
        if file.suffix == ".py" and all(map(str.isidentifier, parts)):
            names.add(".".join((*prefix, *parts)))
        names.add(".".join((*prefix, root)))
setup(packages=sorted(names))
