"""Plots of a results folder: accuracy over time, liveliness against drift, how long a new prompt takes.

Drawn like the pictures of presets, with Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from streamgen.cli.plots import FAINT, INK, LINE, MARGIN, PAPER, SCALE, Sheet, save
from streamgen.evaluation.results import contenders, names_of, number, suites_of
from streamgen.evaluation.suites.base import BIN
from streamgen.worlds.sprites.renderer import FPS

WIDE, HIGH = 560, 300  # of a plot's area
FEW, COLUMNS = 4, 3  # curves that share one area; areas side by side where there are more
MOST = 24  # points of a curve
PANEL, SPACE = (230, 110), (34, 46)  # width and height of such an area, and what is between two
GHOST = "#c9ced6"
LEFT, TOP, BELOW, LEGEND = 56, 40, 44, 240
INKS = (
    "#3566c8", "#d1334a", "#2c9a5f", "#e08a1e", "#7a4fb8", "#17a2b0", "#8a5a34", "#d05fa8", "#6b7280", "#a3a81c",
    "#1f2430", "#f28e8e",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A value and its interval, at `x`."""

    x: float
    value: float
    low: float
    high: float


@dataclass
class Axes:
    """An area of a sheet with a scale."""

    sheet: Sheet
    x: tuple[float, float]
    y: tuple[float, float]
    corner: tuple[float, float] = (LEFT, TOP)
    size: tuple[float, float] = (WIDE, HIGH)

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.corner[0] + across * self.size[0], self.corner[1] + (1 - up) * self.size[1]

    def line(self, a: tuple[float, float], b: tuple[float, float], fill: str, thick: float = 1) -> None:
        ends = [SCALE * v for point in (a, b) for v in self.place(*point)]
        self.sheet.draw.line(ends, fill=fill, width=round(thick * SCALE))

    def dot(self, x: float, y: float, fill: str, outline: str = PAPER) -> None:
        self.sheet.dot(*self.place(x, y), 3.5, fill, outline)

    def curve(self, points: Sequence[Point], ink: str, thick: float = 2) -> None:
        for a, b in pairwise(points):
            self.line((a.x, a.value), (b.x, b.value), ink, thick)

    def scales(self, numbers: tuple[bool, bool] = (True, True)) -> None:
        """Lines at round values, with numbers below and on the left, and the two axes."""
        for value in ticks(*self.y):
            self.line((self.x[0], value), (self.x[1], value), LINE)
            if numbers[1]:
                self.sheet.text(self.corner[0] - 6, self.place(0, value)[1], f"{value:.6g}", 10, FAINT, "rm")
        for value in ticks(*self.x):
            self.line((value, self.y[0]), (value, self.y[1]), LINE)
            if numbers[0]:
                across, below = self.place(value, self.y[0])
                self.sheet.text(across, below + 14, f"{value:.6g}", 10, FAINT, "mm")
        self.line((self.x[0], self.y[0]), (self.x[1], self.y[0]), FAINT)
        self.line((self.x[0], self.y[0]), (self.x[0], self.y[1]), FAINT)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within a span, four to eight of them."""
    step = 10.0 ** np.floor(np.log10((high - low) / 4))
    step *= next(m for m in (5, 2.5, 2, 1) if (high - low) / (step * m) >= 3.5 or m == 1)
    return [float(k * step) for k in range(int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9)) + 1)]


def _span(values: Sequence[float], *more: float) -> tuple[float, float]:
    low, high = min([*values, *more]), max([*values, *more])
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def _axes(title: str, x: tuple[float, float], y: tuple[float, float], across: str, up: str, names: int) -> Axes:
    """White paper with a title, a frame of round numbers, what they count, and room for a legend of `names`."""
    axes = Axes(Sheet(LEFT + WIDE + LEGEND, max(TOP + HIGH + BELOW, TOP + 17 * names)), x, y)
    axes.sheet.text(LEFT, 10, title, 14)
    axes.sheet.text(LEFT, 28, up, 10, FAINT)
    axes.sheet.text(LEFT + WIDE / 2, TOP + HIGH + 34, across, 10, FAINT, "mm")
    axes.scales()
    return axes


def _dot(index: int) -> tuple[str, str]:
    """Fill and outline: once all colours are used, dots are hollow."""
    ink = INKS[index % len(INKS)]
    return (ink, PAPER) if index < len(INKS) else (PAPER, ink)


def _legend(axes: Axes, names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        y = TOP + 8 + 17 * i
        axes.sheet.dot(LEFT + WIDE + 16, y, 4, *_dot(i))
        axes.sheet.text(LEFT + WIDE + 26, y, _short(name), 10)


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:38]}…"


def lines(title: str, across: str, up: str, series: dict[str, list[Point]], y: tuple[float, float]) -> np.ndarray:
    """A curve per name, intervals as whiskers, moved apart a little so that they can be told from each other."""
    if len(series) > FEW:
        return panels(title, across, up, series, y)
    xs = [point.x for points in series.values() for point in points]
    axes = _axes(title, _span(xs), y, across, up, len(series))
    apart = 0.1 * (axes.x[1] - axes.x[0]) / max(1, len(set(xs))) / max(1, len(series))
    for i, points in enumerate(series.values()):
        moved = [replace(point, x=point.x + apart * i) for point in points]
        _curve(axes, moved, INKS[i])
        for point in moved:
            axes.dot(point.x, point.value, INKS[i])
    _legend(axes, list(series))
    return _margin(axes.sheet)


def _curve(axes: Axes, points: Sequence[Point], ink: str) -> None:
    """With intervals."""
    for point in points:
        axes.line((point.x, point.low), (point.x, point.high), ink)
    axes.curve(points, ink)


def panels(title: str, across: str, up: str, series: dict[str, list[Point]], y: tuple[float, float]) -> np.ndarray:
    """An area per name, in which the curves of all others are faint."""
    width, height = PANEL[0] + SPACE[0], PANEL[1] + SPACE[1]
    rows = -(-len(series) // COLUMNS)
    sheet = Sheet(LEFT + COLUMNS * width, TOP + 20 + rows * height)
    sheet.text(LEFT, 10, title, 14)
    sheet.text(LEFT, 28, f"{up}; {across}; faint: the others", 10, FAINT)
    span = _span([point.x for points in series.values() for point in points])
    for i, (name, points) in enumerate(series.items()):
        row, column = divmod(i, COLUMNS)
        axes = Axes(sheet, span, y, (LEFT + column * width, TOP + 20 + row * height), PANEL)
        axes.scales((i + COLUMNS >= len(series), column == 0))
        for others in series.values():
            axes.curve(others, GHOST, 1)
        _curve(axes, points, INKS[0])
        sheet.text(axes.corner[0], axes.corner[1] - 10, _short(name), 11)
    return _margin(sheet)


def scatter(title: str, across: str, up: str, points: dict[str, tuple[Point, Point]]) -> np.ndarray:
    """One dot per name, whose two values each have an interval."""
    spans = [[v for pair in points.values() for v in (pair[k].low, pair[k].high)] for k in (0, 1)]
    axes = _axes(title, _span(spans[0], 0.0), _span(spans[1], 1.0), across, up, len(points))
    axes.line((0, axes.y[0]), (0, axes.y[1]), FAINT)
    axes.line((axes.x[0], 1), (axes.x[1], 1), FAINT)
    for i, (x, y) in enumerate(points.values()):
        ink = INKS[i] if len(points) <= FEW else GHOST  # so many crosses would hide the dots
        axes.line((x.low, y.value), (x.high, y.value), ink)
        axes.line((x.value, y.low), (x.value, y.high), ink)
    for i, (x, y) in enumerate(points.values()):
        axes.dot(x.value, y.value, *_dot(i))
    _legend(axes, list(points))
    return _margin(axes.sheet)


def bars(title: str, unit: str, points: dict[str, Point]) -> np.ndarray:
    """A bar per name, with its interval and its number."""
    step, most = 24, max(max(point.high for point in points.values()), 1e-6)
    sheet = Sheet(LEGEND + WIDE + 70, TOP + step * len(points) + 10)
    sheet.text(0, 10, title, 14)
    sheet.text(0, 28, unit, 10, FAINT)
    for i, (name, point) in enumerate(points.items()):
        y, scale = TOP + step * i, WIDE / most
        sheet.text(LEGEND - 8, y + 9, _short(name), 10, INK, "rm")
        sheet.box(LEGEND, y, max(1.0, point.value * scale), 18, INKS[i % len(INKS)])
        sheet.box(LEGEND + point.low * scale, y + 8, max(1.0, (point.high - point.low) * scale), 2, INK)
        sheet.text(LEGEND + max(point.value, point.high) * scale + 8, y + 9, number(point.value), 10)
    return _margin(sheet)


def _margin(sheet: Sheet) -> np.ndarray:
    edge = MARGIN * SCALE
    whole = Image.new("RGB", (sheet.image.width + 2 * edge, sheet.image.height + 2 * edge), PAPER)
    whole.paste(sheet.image, (edge, edge))
    return np.asarray(whole)


# ------------------------------------------------------------------------------------------- from records
def draw_results(results: dict[str, Any], folder: Path, prefix: str = "") -> dict[str, list[Path]]:
    """By suite, every plot that the records are there for, as PNG files `folder`/PREFIX….png."""
    drawn: dict[str, list[Path]] = {}
    for suite in suites_of(results):
        for name, draw in _KINDS.get(suite.partition("-")[0], {}).items():
            picture = draw(results, suite)
            if picture is not None:
                drawn.setdefault(suite, []).append(save(folder / f"{prefix}{suite}-{name}.png", picture))
    return drawn


def _found(results: dict[str, Any], suite: str, metric: str) -> dict[str, Point]:
    """By contender, where the value is defined."""
    names = names_of(contenders(results))
    return {
        names[record["model"], record["preset"]]: _point(record)
        for record in results["records"]
        if (record["suite"], record["metric"]) == (suite, metric) and record["value"] is not None
    }


def _point(record: dict[str, Any]) -> Point:
    """A record's value; its interval is the value itself where one clip has none."""
    value = record["value"]
    low, high = (value, value) if record["low"] is None else (record["low"], record["high"])
    return Point(0.0, value, low, high)


def means(points: list[Point], count: int) -> list[Point]:
    """Of every `count` neighbours, at the place of the first; their intervals too, which are wider than the mean's."""
    groups = [points[i : i + count] for i in range(0, len(points), count)]
    mean = lambda group, name: float(np.mean([getattr(point, name) for point in group]))
    return [Point(g[0].x, *(mean(g, name) for name in ("value", "low", "high"))) for g in groups]


def _over_time(metric: str, title: str) -> Callable[[dict[str, Any], str], np.ndarray | None]:
    def draw(results: dict[str, Any], suite: str) -> np.ndarray | None:
        start = f"{metric}@"
        at = sorted(
            {int(r["metric"].removeprefix(start)) for r in results["records"]
             if r["suite"] == suite and r["metric"].startswith(start) and "[" not in r["metric"]}
        )  # fmt: skip
        series: dict[str, list[Point]] = {}
        for second in at:
            for name, point in _found(results, suite, f"{start}{second}").items():
                series.setdefault(name, []).append(Point(second, point.value, point.low, point.high))
        together = -(-len(at) // MOST)
        series = {name: means(points, together) for name, points in series.items()}
        across = f"seconds (beginning of {together * BIN // FPS} s)"
        return lines(f"{suite}: {title}", across, "share of clips", series, (-0.02, 1.02)) if series else None

    return draw


def _liveliness(results: dict[str, Any], suite: str) -> np.ndarray | None:
    drift, alive = (_found(results, suite, metric) for metric in ("all_right_change", "dynamic_degree"))
    points = {name: (drift[name], alive[name]) for name in drift if name in alive}
    if not points:
        return None
    across, up = "drift: all-right in the last 5 s minus the first", "dynamic degree (1 = as fast as the world)"
    return scatter(f"{suite}: dynamics against drift", across, up, points)


def _waiting(results: dict[str, Any], suite: str) -> np.ndarray | None:
    frames = _found(results, suite, "frames_until")
    seconds = {n: Point(0.0, p.value / FPS, p.low / FPS, p.high / FPS) for n, p in frames.items()}
    unit = "seconds of video from the request until the new word holds, where it does"
    return bars(f"{suite}: how long a new prompt takes", unit, seconds) if seconds else None


_KINDS = {
    "long": {"over-time": _over_time("all_right", "all-right over time"), "dynamics": _liveliness},
    "identity": {"over-time": _over_time("kept", "what was chosen is kept")},
    "switch": {"latency": _waiting},
}
