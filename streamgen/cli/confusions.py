"""What holds a model back, shown: matrices of what was named against what was read, and links to the worst clips."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from streamgen.cli.plots import FAINT, MARGIN, PAPER, Sheet, save
from streamgen.evaluation.confusions import NONE, WORDS, Confusions
from streamgen.evaluation.results import names_of, slug
from streamgen.evaluation.runner import worst_path

LEFT, CELL, ROW, HEAD, GAP, TALLY = 84, 50, 20, 40, 16, 66
LEVELS = 10  # of a cell's ink
RIGHT, WRONG = (44, 154, 95), (209, 51, 74)


def draw(confusions: Confusions, title: str) -> np.ndarray:
    """One matrix per attribute, below each other: a row per named word, a column per word read, counts of actors."""
    columns = max(len(WORDS[part]) + 1 for part in confusions)
    height = sum(HEAD + ROW * len(rows) + GAP for rows in confusions.values())
    sheet = Sheet(LEFT + CELL * columns + TALLY + 2 * MARGIN, height + 24 + 2 * MARGIN)
    sheet.text(MARGIN, MARGIN + 8, title, 14)
    y = MARGIN + 24
    for part, rows in confusions.items():
        y = _matrix(sheet, y, part, rows) + GAP
    return np.asarray(sheet.image)


def _matrix(sheet: Sheet, y: float, part: str, rows: dict[str, dict[str, int]]) -> float:
    """Returns the y it ends at."""
    words, left = (*WORDS[part], NONE), MARGIN + LEFT
    sheet.text(MARGIN, y + 12, f"{part}: named (rows) and read (columns)", 11, FAINT)
    for i, word in enumerate(words):
        sheet.centred(left + CELL * i, y + 20, CELL, 18, word.rpartition(" ")[2], FAINT, 10)
    y += HEAD
    for named, line in rows.items():
        total = sum(line.values())
        sheet.text(left - 6, y + ROW / 2, named, 10, anchor="rm")
        for i, word in enumerate(words):
            if word in line:
                x, share = left + CELL * i, line[word] / total
                sheet.box(x, y, CELL - 1, ROW - 1, _ink(share, RIGHT if word == named else WRONG))
                sheet.centred(x, y, CELL - 1, ROW - 1, str(line[word]), PAPER if share > 0.5 else "#1f2430", 10)
        right = line.get(named, 0)
        sheet.text(left + CELL * len(words) + 8, y + ROW / 2, f"{right}/{total}", 10, FAINT)
        y += ROW
    return y


def _ink(share: float, full: tuple[int, int, int]) -> tuple[int, ...]:
    part = 0.15 + 0.85 * np.ceil(share * LEVELS) / LEVELS
    return tuple(round(255 + (value - 255) * part) for value in full)


# ------------------------------------------------------------------------------------------- files, and links to them
def failings(results: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    """By suite, a line of Markdown per preset, with links into the results' own folder, where pictures are drawn."""
    lines: dict[str, list[str]] = {}
    for item in results["confusions"]:
        name = slug(item["model"], item["preset"], item["suite"])
        plot = save(folder / f"{name}--confusions.png", draw(item["attributes"], _title(results, item)))
        worst = worst_path(folder, name)
        line = _line(results, item, plot.name, f"sheets/{worst.name}" if worst.is_file() else None)
        lines.setdefault(item["suite"], []).append(line)
    return lines


def copy_failings(results: dict[str, Any], source: Path, target: Path, prefix: str) -> dict[str, list[str]]:
    """The same for a report, in a folder beside it: of each suite's first preset alone, as pictures are large."""
    lines: dict[str, list[str]] = {}
    for item in results["confusions"]:
        if item["suite"] in lines:
            continue
        name = slug(item["model"], item["preset"], item["suite"])
        plot = target / f"{prefix}{name}--confusions.png"
        save(plot, draw(item["attributes"], _title(results, item)))
        worst, copy = worst_path(source, name), None
        if worst.is_file():
            copy = f"{target.name}/{shutil.copyfile(worst, target / f'{prefix}{worst.name}').name}"
        lines[item["suite"]] = [_line(results, item, f"{target.name}/{plot.name}", copy)]
    return lines


def _title(results: dict[str, Any], item: dict[str, Any]) -> str:
    who = [(each["model"], each["preset"]) for each in results["confusions"]]
    return f"{names_of(who)[item['model'], item['preset']]}: {item['suite']}"


def _line(results: dict[str, Any], item: dict[str, Any], plot: str, worst: str | None) -> str:
    who = {key: item[key] for key in ("model", "preset", "suite")} | {"metric": "all_right"}
    perfect = any(who.items() <= record.items() and record["value"] == 1 for record in results["records"])
    sheet = f" and in [the worst clips]({worst})" if worst else "; no clip has a wrong attribute" if perfect else ""
    return f"- {_title(results, item)}: what is confused with what, [in counts]({plot}){sheet}."
