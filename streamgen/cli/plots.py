"""Pictures of a walk: which chunk takes which step at which tick, and which frames it reads at which positions.

    streamgen presets show rolling-forcing --plot rolling.png

Drawn with Pillow in its built-in typeface, which has little beyond ASCII, twice as large as laid out.
"""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from streamgen.cache.plan import FLIGHT, Group
from streamgen.engine import Engine
from streamgen.media.paths import MediaError, check_output
from streamgen.schedules import SlotOp
from streamgen.walk import PlannedCall

SCALE = 2  # pixels per unit of layout
MARGIN, LABELS, GAP = 18, 66, 10  # around everything; for the names of rows; between lines of text and grids
LEAST = 660  # width of a panel: its legend's
ROOM = 800  # that a grid may take in width, as long as its cells stay legible
INK, FAINT, LINE, PAPER = "#1f2430", "#6d7480", "#e4e7ec", "#ffffff"
SWITCH, COMMIT = "#d1334a", "#12a594"
NOISE = ((0, (238, 242, 251)), (0.5, (160, 186, 232)), (0.8, (104, 96, 190)), (1, (38, 28, 84)))  # sigma, its colour
OWN, OTHERS = "own", "others"  # frames in flight: of the row's chunk, of the chunks beside it
COLOURS = {
    "sink": "#f2b63c", "context": "#c9a27e", "anchor": "#ea7b5c", "bank": "#a77fd0", "chosen": "#c86fa8",
    "merged": "#8f9a4b", "recent": "#74addd", OWN: "#5fb878", OTHERS: "#c4e6cd",
}  # fmt: skip
NAMES = {OWN: "the chunk itself", OTHERS: "other chunks of the call"}
KNOWN = ("context", FLIGHT)  # regions whose negative frames are blank ones; elsewhere content decides which they are
ELSEWHERE = "#b9bec7"  # regions of policies from outside
AGAIN, CONTEXT = "re-encode", "context"  # rows of calls before a chunk: at a new prompt, or whatever is prompted


class Sheet:
    """A white picture, drawn on in units of layout."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.image = Image.new("RGB", (round(width * SCALE), round(height * SCALE)), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, x: float, y: float, width: float, height: float, fill, outline=None, thick: float = 1) -> None:
        left, top = round(x * SCALE), round(y * SCALE)
        corners = (left, top, round((x + width) * SCALE) - 1, round((y + height) * SCALE) - 1)
        self.draw.rectangle(corners, fill=fill, outline=outline, width=round(thick * SCALE) if outline else 0)

    def dot(self, x: float, y: float, radius: float, fill, outline) -> None:
        corners = [round(v * SCALE) for v in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(corners, fill=fill, outline=outline, width=SCALE)

    def text(self, x: float, y: float, text: str, size: float = 11, fill=INK, anchor: str = "lm") -> float:
        """Returns the x it ends at, if it is left-aligned."""
        font = _font(size)
        self.draw.text((x * SCALE, y * SCALE), text, font=font, fill=fill, anchor=anchor)
        return x + self.draw.textlength(text, font=font) / SCALE

    def centred(self, x: float, y: float, width: float, height: float, text: str, fill: str, size: float = 11) -> None:
        """In the middle of a cell, smaller where it would not fit, left out where it still would not."""
        for points in (size, size - 1.5, size - 3):
            if self.draw.textlength(text, font=_font(points)) / SCALE <= width - 2 and points <= height:
                self.text(x + width / 2, y + height / 2, text, points, fill, "mm")
                return


def _font(size: float):
    return ImageFont.load_default(size * SCALE)


def _shade(sigma: float) -> tuple[int, int, int]:
    """The colour of a noise level, between those listed."""
    (low, below), (high, above) = next(pair for pair in pairwise(NOISE) if sigma <= pair[1][0])
    part = (sigma - low) / (high - low)
    return tuple(round(a + (b - a) * part) for a, b in zip(below, above, strict=True))


def _on(colour) -> str:
    """Ink that is legible on a colour."""
    red, green, blue = ImageColor.getrgb(colour) if isinstance(colour, str) else colour
    return INK if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else PAPER


# ---------------------------------------------------------------------------------------------------- what is drawn
@dataclass
class Step:
    """A cell of the schedule: the noise level it begins at (None = finished), and what becomes of its chunk."""

    mark: str
    sigma: float | None
    leaves: bool = False
    committed: bool = False


@dataclass
class Schedule:
    """Cells by (chunk, tick), and the chunks that are encoded again before a tick: at a new prompt, or as context."""

    cells: dict[tuple[int, int], Step] = field(default_factory=dict)
    switches: dict[int, list[int]] = field(default_factory=dict)
    contexts: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Key:
    """A frame as it is read; `position` None = which frame it is, content decides. `folded`: others blended into it.

    `weight`: what its keys count in attention, beside 1.
    """

    region: str
    frame: int
    position: float | None
    folded: int = 0
    weight: float = 1.0

    @property
    def colour(self) -> str | tuple[int, int, int]:
        """Its region's, the paler the less it counts."""
        full = COLOURS.get(self.region, ELSEWHERE)
        mixed = lambda part: round(255 - (255 - part) * (0.25 + 0.75 * self.weight))
        return full if self.weight == 1 else tuple(map(mixed, ImageColor.getrgb(full)))

    @property
    def text(self) -> str:
        if self.frame < 0:
            return "?" if self.position is None else "-"
        return f"{self.frame}+{self.folded}" if self.folded else str(self.frame)


@dataclass
class Reads:
    """A row: what a call reads, and what its chunk's commit reads where that differs."""

    label: str
    keys: list[Key]
    commit: list[Key] = field(default_factory=list)


def schedule_of(engine: Engine, calls: Iterable[PlannedCall]) -> Schedule:
    """Which chunk takes which step when."""
    out = Schedule()
    for call in calls:
        if call.call.source != "flight":
            before = out.contexts if call.rebuilt else out.switches
            before[call.tick] = [slot.chunk for slot in call.row.slots]
            continue
        for slot in call.row.slots:
            sigma = None if slot.op is SlotOp.CLEAN else engine.ladder_of(slot.chunk).sigmas[slot.p_in]
            mark = {SlotOp.STEP: str(slot.p_in), SlotOp.HOLD: "=" if slot.p_in else "~", SlotOp.CLEAN: "c"}[slot.op]
            cell = out.cells.setdefault((slot.chunk, call.tick), Step(mark, sigma))
            cell.leaves |= slot.chunk in call.emits
            cell.committed |= slot.chunk in call.committed
    return out


def reads_of(calls: Iterable[PlannedCall]) -> list[Reads]:
    """What each chunk reads at its last step, and what a re-encoding reads, in order."""
    rows: dict[int | str, Reads] = {}
    folded: Counter = Counter()  # frames that a page of the sink has taken up
    for call in calls:
        if call.call.source != "flight":
            own, label = [frame for part in call.frames for frame in part], CONTEXT if call.rebuilt else AGAIN
            rows[f"{label} {call.tick}"] = Reads(label, _keys(call, call.plan.groups[-1], own, folded))
        else:
            _read_slots(call, rows, folded)
        folded.update(fold.target for fold in call.plan.folds)
        for write in call.plan.writes:
            folded.pop(write.page, None)
    return list(rows.values())


def _read_slots(call: PlannedCall, rows: dict[int | str, Reads], folded: Counter) -> None:
    for slot, frames in zip(call.row.slots, call.frames, strict=True):
        leaves = slot.chunk in call.emits
        if not leaves and not (slot.op is SlotOp.CLEAN and slot.chunk in rows):
            continue
        keys = _keys(call, next(group for group in call.plan.groups if _asks(call, group, frames)), frames, folded)
        if leaves:
            rows[slot.chunk] = Reads(f"chunk {slot.chunk}", keys)
        elif _places(keys) != _places(key for key in rows[slot.chunk].keys if key.frame < frames.stop):
            rows[slot.chunk].commit = keys  # younger chunks in flight apart, which no commit reads


def _asks(call: PlannedCall, group: Group, frames: range) -> bool:
    own = [frame for part in call.frames for frame in part]
    return any(own[index] in frames for index in group.query_frames)


def _places(keys: Iterable[Key]) -> set[tuple[int, float | None]]:
    return {(key.frame, key.position) for key in keys}


def _keys(call: PlannedCall, group: Group, own: Sequence[int], folded: Counter) -> list[Key]:
    keys = []
    for segment in group.segments:
        for page, frame, position in zip(segment.pages, segment.frames, segment.positions, strict=True):
            region = segment.region
            if region == FLIGHT:
                region = OWN if frame in own else OTHERS
            place = None if frame < 0 and segment.region not in KNOWN else position
            taken_up = folded[page] if region == "sink" else 0
            keys.append(Key(region, frame, place, taken_up, math.exp(segment.log_bias)))
    return keys


# ---------------------------------------------------------------------------------------------------- how it is drawn
def picture(engine: Engine, calls: Iterable[PlannedCall], title: str, notes: Sequence[str] = ()) -> np.ndarray:
    """Both panels of a walk. Returns: uint8 [H, W, 3]."""
    calls = list(calls)
    parts, rows = [_heading(title, notes), _schedule_panel(schedule_of(engine, calls))], reads_of(calls)
    if rows:
        parts.append(_reads_panel(rows))
    width = max(part.width for part in parts) + 2 * MARGIN
    whole = Sheet(width, sum(part.height for part in parts) + 2 * MARGIN)
    y = MARGIN
    for part in parts:
        whole.image.paste(part.image, (MARGIN * SCALE, round(y * SCALE)))
        y += part.height
    return np.asarray(whole.image)


def save(path: str | os.PathLike[str], array: np.ndarray) -> Path:
    """Write as .png with its 80 commonest colours, which a drawing does with. Raises: InputError, MediaError."""
    target = check_output(path, (".png",))
    colours = np.array([colour for _, colour in sorted(Image.fromarray(array).getcolors(array.size), reverse=True)])
    nearest = np.abs(colours[:, None] - colours[None, :80]).sum(-1).argmin(1)
    packed = lambda rgb: rgb.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    index = np.zeros(1 << 24, np.uint8)  # of every colour in the palette
    index[packed(colours)] = nearest
    image, file = Image.fromarray(index[packed(array)]), io.BytesIO()
    image.putpalette(colours[:80].astype(np.uint8).tobytes())
    image.save(file, "PNG", optimize=True)
    try:
        target.write_bytes(file.getvalue())
    except OSError as error:
        raise MediaError(f"{target}: {error.strerror or error}") from None
    return target


def _heading(title: str, notes: Sequence[str]) -> Sheet:
    plain = lambda text: "".join(c if c.isascii() or c in "·…" else "?" for c in text)
    widest = Sheet(1, 1)
    width = max(widest.text(0, 0, plain(title), 19), *(widest.text(0, 0, plain(note), 11) for note in (*notes, "")))
    sheet = Sheet(width + 1, 28 + 16 * len(notes) + 8)
    sheet.text(0, 11, plain(title), 19)
    for i, note in enumerate(notes):
        sheet.text(0, 33 + 16 * i, plain(note), 11, FAINT)
    return sheet


def _cell(columns: int, least: float, most: float) -> float:
    return min(most, max(least, ROOM // max(1, columns)))


def _schedule_panel(schedule: Schedule) -> Sheet:
    ticks = 1 + max(tick for _, tick in schedule.cells)
    chunks = 1 + max(chunk for chunk, _ in schedule.cells)
    wide, high, top = _cell(ticks, 15, 26), 20, 60 if schedule.switches else 44
    sheet = Sheet(max(LABELS + ticks * wide + 1, LEAST), top + chunks * high + GAP + 24 + GAP)
    sheet.text(0, 8, "Schedule: the step each chunk takes, tick by tick", 13)
    sheet.text(LABELS - 8, top - 9, "tick", 10, FAINT, "rm")
    for tick in range(0, ticks, 1 if wide >= 18 else 2):
        sheet.text(LABELS + (tick + 0.5) * wide, top - 9, str(tick), 10, FAINT, "mm")
    for chunk in range(chunks):
        sheet.text(LABELS - 8, top + (chunk + 0.5) * high, f"chunk {chunk}", 10, INK, "rm")
        sheet.box(LABELS, top + (chunk + 1) * high - 0.5, ticks * wide, 0.5, LINE)
    for (chunk, tick), cell in schedule.cells.items():
        _draw_step(sheet, LABELS + tick * wide, top + chunk * high, wide, high, cell)
    for tick, again in schedule.switches.items():
        x = LABELS + tick * wide
        sheet.box(x - 1, top - 2, 1.5, chunks * high + 2, SWITCH)
        sheet.text(x, top - 25, "new prompt", 10, SWITCH, "mm")
        for chunk in again:
            sheet.dot(x - 0.25, top + (chunk + 0.5) * high, 4, COMMIT, SWITCH)
    for tick, again in schedule.contexts.items():
        for chunk in again:
            sheet.dot(LABELS + tick * wide - 0.25, top + (chunk + 0.5) * high, 4, COMMIT, INK)
    _schedule_legend(sheet, top + chunks * high + GAP + 8, schedule)
    return sheet


def _draw_step(sheet: Sheet, x: float, y: float, wide: float, high: float, cell: Step) -> None:
    fill = PAPER if cell.sigma is None else _shade(cell.sigma)
    outline = "#aab1bd" if cell.sigma is None else None
    sheet.box(x + 0.5, y + 0.5, wide - 1, high - 1, fill, outline, 0.5)
    sheet.centred(x, y, wide, high - (4 if cell.committed else 0), cell.mark, _on(fill))
    if cell.committed:
        sheet.box(x + 0.5, y + high - 5, wide - 1, 4.5, COMMIT)
    if cell.leaves:
        sheet.box(x + wide - 3, y + 0.5, 2.5, high - 1, INK)


def _schedule_legend(sheet: Sheet, y: float, schedule: Schedule) -> None:
    x = sheet.text(LABELS, y, "noise 1", 10, FAINT) + 5
    for i in range(16):
        sheet.box(x + 5 * i, y - 5, 5, 10, _shade(1 - i / 15))
    x = sheet.text(x + 85, y, "0", 10, FAINT) + 18
    sheet.box(x, y - 5, 2.5, 10, INK)
    x = sheet.text(x + 8, y, "leaves", 10, FAINT) + 18
    if any(cell.committed for cell in schedule.cells.values()):
        sheet.box(x, y - 2, 14, 4.5, COMMIT)
        x = sheet.text(x + 19, y, "keys and values committed", 10, FAINT) + 18
    if schedule.switches:
        sheet.dot(x, y, 4, COMMIT, SWITCH)
        x = sheet.text(x + 9, y, "encoded again under the new prompt", 10, FAINT) + 18
    if schedule.contexts:
        sheet.dot(x, y, 4, COMMIT, INK)
        x = sheet.text(x + 9, y, "encoded again as context", 10, FAINT) + 18
    if any(cell.mark in "=~" for cell in schedule.cells.values()):
        sheet.text(x, y, "= held as it is, ~ held as noise", 10, FAINT)


def _columns(rows: list[Reads]) -> tuple[int, int, int]:
    """First position, number of positions, and columns for frames without one."""
    keys = [key for row in rows for key in (*row.keys, *row.commit)]
    known = [int(key.position) for key in keys if key.position is not None]
    unknown = max(sum(key.position is None for key in row.keys) for row in rows)
    return min(known), max(known) - min(known) + 1, unknown


def _reads_panel(rows: list[Reads]) -> Sheet:
    first, positions, unknown = _columns(rows)
    aside = unknown + bool(unknown)  # columns left of the axis
    wide, line, top = _cell(positions + aside, 14, 26), 20, 44
    axis = LABELS + aside * wide
    heights = [line * _depth(row) + (9 if row.commit else 3) for row in rows]
    sheet = Sheet(max(axis + positions * wide + 1, LEAST), top + sum(heights) + GAP + 24)
    sheet.text(0, 8, "Cache: the frames each chunk reads at its last step, at their temporal positions", 13)
    sheet.text(LABELS - 8, top - 9, "position", 10, FAINT, "rm")
    for i in range(0, positions, 1 if wide >= 18 else 3):
        sheet.text(axis + (i + 0.5) * wide, top - 9, str(first + i), 10, FAINT, "mm")
    if unknown:
        sheet.text(LABELS + unknown * wide / 2, top - 9, "by content", 10, FAINT, "mm")
    y = top
    for row, height in zip(rows, heights, strict=True):
        sheet.text(LABELS - 8, y + line * _depth(row) / 2, row.label, 10, _label_ink(row), "rm")
        _draw_reads(sheet, row, y, line, wide, axis, first)
        y += height
    _reads_legend(sheet, y + GAP + 6, rows)
    return sheet


def _label_ink(row: Reads) -> str:
    return SWITCH if row.label == AGAIN else INK


def _depth(row: Reads) -> int:
    """Frames that are read at one position, at most."""
    return max(Counter(key.position for key in row.keys if key.position is not None).values(), default=1)


def _draw_reads(sheet: Sheet, row: Reads, y: float, line: float, wide: float, axis: float, first: int) -> None:
    shared = Counter(key.position for key in row.keys)
    taken: Counter = Counter()
    whole = line * _depth(row)
    for key in row.keys:
        if key.position is None:
            x, top, high = LABELS + taken[None] * wide, y, whole
        else:
            high = whole / shared[key.position]
            x, top = axis + (key.position - first) * wide, y + taken[key.position] * high
        taken[key.position] += 1
        sheet.box(x + 0.5, top + 0.5, wide - 1, high - 1, key.colour)
        sheet.centred(x, top, wide, high, key.text, _on(key.colour))
    for key in row.commit:
        if key.position is not None:
            x = axis + (key.position - first) * wide
            sheet.box(x + 0.5, y + whole + 1, wide - 1, 4, key.colour)


def _reads_legend(sheet: Sheet, y: float, rows: list[Reads]) -> None:
    keys = [key for row in rows for key in row.keys]
    seen, x = {key.region: key for key in keys}, LABELS
    for region in [name for name in COLOURS if name in seen] + [name for name in seen if name not in COLOURS]:
        sheet.box(x, y - 5, 14, 10, seen[region].colour)
        x = sheet.text(x + 19, y, NAMES.get(region, region), 10, FAINT) + 16
    weak = [key.weight for key in keys if key.weight < 1]
    if weak:
        x = sheet.text(x, y, f"pale: counts {weak[0]:.2g}", 10, FAINT) + 16
    if any(key.frame < 0 and key.position is not None for key in keys):
        x = sheet.text(x, y, "-: a blank frame", 10, FAINT) + 16
    if any(key.folded for key in keys):
        x = sheet.text(x, y, "0+2: two more frames folded in", 10, FAINT) + 16
    if any(row.commit for row in rows):
        sheet.box(x, y - 2, 14, 4, COLOURS["recent"])
        sheet.text(x + 19, y, "thin: what its commit reads", 10, FAINT)
