"""Collects the packages, so that no nested one is forgotten; everything else is in pyproject.toml.

A folder below one of the roots that has Python in it is a package.
"""
from pathlib import Path

from setuptools import setup

ROOTS = ("streamgen", "pipelines", "distill", "kernels", "demos", "configs")

here = Path(__file__).resolve().parent
names = {"streamgen", *(f"streamgen.{root}" for root in ROOTS[1:])}
for root in ROOTS:
    for file in (here / root).rglob("*.py"):
        parts = file.parent.relative_to(here).parts
        if all(part.isidentifier() for part in parts):
            names.add(".".join(parts if root == "streamgen" else ("streamgen", *parts)))
setup(packages=sorted(names))
