"""From raw values, one file per model, preset and suite, to records with intervals, and to a table.

    raw/sprites--default--short.json    what was asked, and every case's numbers: finished ones are not run again
    results.json                        `records`, `differences` to the first preset, `confusions`, `failures`; no
                                        timings, so that the same seeds give the same file
    latency.json                        records of the suite `latency`
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from streamgen.errors import InputError
from streamgen.evaluation.statistics import mean_interval, paired_interval
from streamgen.evaluation.suites import find_suite

VERSION = 3
DIGITS = 6
TIMED = "latency"
ENOUGH = 6  # pairs for a mark: fewer agree in sign by chance more often than 5 times of 100
FIELDS = ("model", "preset", "suite", "metric", "value", "low", "high", "n")
# {"settings": …, "versions": …, "cases": [{"prompts", "seed", "part", "values", also "said", "pairs"}], "failure": line
# or None, also "confusions": what became of the pairs}
Raw = dict[str, Any]


# ------------------------------------------------------------------------------------------- files
def slug(*words: str) -> str:
    """A file's name that tells them apart: a--b--c."""
    return "--".join(re.sub(r"[^\w.+=-]+", "_", word).strip("_") for word in words)


def write_json(path: Path, item: object) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    text = json.dumps(item, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path, keys: Sequence[str], again: str) -> dict[str, Any]:
    """A JSON object with at least `keys`. Raises InputError that says what to do: `again`."""
    try:
        item = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; {again}") from None
    except ValueError:
        raise InputError(f"{path} is damaged: it is not JSON; {again}") from None
    missing = [key for key in keys if not isinstance(item, dict) or key not in item]
    if missing:
        raise InputError(f"{path} is damaged: it has no {', '.join(missing)}; {again}")
    return item


def unlike(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys in which two settings differ."""
    return [key for key in {**now, **was} if now.get(key, ...) != was.get(key, ...)]


def read_raw(path: Path) -> Raw:
    """Raises InputError for a file that is no raw result."""
    again = "delete it, or give --overwrite, to measure that again"
    raw = read_json(path, ("settings", "versions", "cases", "failure"), again)
    whole = isinstance(raw["settings"], dict) and isinstance(raw["cases"], list)
    if not whole or not all(isinstance(c, dict) and isinstance(c.get("values"), dict) for c in raw["cases"]):
        raise InputError(f"{path} is damaged: its cases have no values; {again}")
    return raw


# ------------------------------------------------------------------------------------------- numbers
def _interval(value: float | None, low: float | None, high: float | None, n: int) -> dict[str, float | int | None]:
    shown = (None if number is None else round(float(number), DIGITS) for number in (value, low, high))
    return {**dict(zip(("value", "low", "high"), shown)), "n": n}


def _names(raw: Raw) -> list[str]:
    """The metrics of a raw result, in the order they came up."""
    return list(dict.fromkeys(name for case in raw["cases"] for name in case["values"]))


def _series(raw: Raw, metric: str, part: str | None = None) -> list[float | None]:
    return [case["values"].get(metric) for case in raw["cases"] if part in (None, case["part"])]


def _who(raw: Raw) -> dict[str, str]:
    return {name: raw["settings"][name] for name in ("model", "preset", "suite")}


def records(raws: Iterable[Raw], seed: int) -> Iterator[dict[str, Any]]:
    """Every metric's mean over the cases, with an interval; METRIC[PART] for the parts of a suite's headline."""
    for raw in raws:
        parts = sorted({case["part"] for case in raw["cases"]})
        headline = find_suite(raw["settings"]["suite"]).headline if len(parts) > 1 else ()
        wanted = [(name, None) for name in _names(raw)]
        wanted += [(name, part) for name in headline if name in _names(raw) for part in parts]
        for name, part in wanted:
            found = mean_interval(_series(raw, name, part), seed)
            yield {**_who(raw), "metric": name if part is None else f"{name}[{part}]", **_interval(*found)}


def differences(raws: Sequence[Raw], seed: int) -> Iterator[dict[str, Any]]:
    """Every metric's difference to the model's first preset, over cases of the same prompt and seed."""
    first: dict[tuple[str, str], Raw] = {}
    for raw in raws:
        who = _who(raw)
        base = first.setdefault((who["model"], who["suite"]), raw)
        if base is raw:
            continue
        for name in _names(raw):
            found = paired_interval(_series(raw, name), _series(base, name), seed)
            yield {**who, "metric": name, "to": base["settings"]["preset"], **_interval(*found)}


def made_with() -> dict[str, str]:
    """Versions that last bits may depend on."""
    from streamgen import __version__

    return {"streamgen": __version__, **{name: metadata.version(name) for name in ("torch", "numpy")}}


def versions(raws: Sequence[Raw]) -> dict[str, str]:
    """What raw results were measured with; several where a comparison went on after an update."""
    found = [raw["versions"] for raw in raws]
    return {name: " and ".join(dict.fromkeys(each[name] for each in found)) for name in found[0]}


def summary(raws: Sequence[Raw], setting: dict[str, Any], seed: int) -> dict[str, Any]:
    """The content of a results file."""
    good = [raw for raw in raws if raw["failure"] is None]
    timed = any(raw["settings"]["suite"] == TIMED for raw in raws)
    return {
        "streamgen_eval": VERSION,
        "setting": setting,
        "records": list(records(good, seed)),
        "differences": [] if timed else list(differences(good, seed)),  # timed streams are no pairs
        "confusions": [{**_who(raw), "attributes": raw["confusions"]} for raw in good if raw.get("confusions")],
        "failures": [{**_who(raw), "failure": raw["failure"]} for raw in raws if raw["failure"] is not None],
    }


def load_results(folder: Path) -> dict[str, Any]:
    """What `streamgen eval` wrote into a folder, the timed suite too. Raises InputError."""
    again = "give a folder that `streamgen eval --output` wrote"
    keys = ("streamgen_eval", "setting", "records", "differences", "failures")
    found = [read_json(folder / "results.json", keys, again)]
    if (folder / "latency.json").is_file():
        found.append(read_json(folder / "latency.json", keys, again))
    for item in found:
        if item["streamgen_eval"] != VERSION:
            raise InputError(f"{folder} is of version {item['streamgen_eval']}, and {VERSION} can be read; {again}")
        if not all(isinstance(record, dict) and set(FIELDS) <= record.keys() for record in item["records"]):
            raise InputError(f"{folder} is damaged: a record lacks some of {', '.join(FIELDS)}; {again}")
    lists = ("records", "differences", "confusions", "failures")
    joined = {key: [entry for item in found for entry in item.get(key, [])] for key in lists}
    return {"setting": found[0]["setting"], **joined}


# ------------------------------------------------------------------------------------------- the table
def contenders(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(model, preset), in order."""
    both = [*results["records"], *results["failures"]]
    return list(dict.fromkeys((item["model"], item["preset"]) for item in both))


def names_of(who: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """How a model and preset are called: by the preset alone where there is one model."""
    several = len({model for model, _ in who}) > 1
    return {(model, preset): f"{model} {preset}" if several else preset for model, preset in who}


def suites_of(results: dict[str, Any]) -> list[str]:
    both = [*results["records"], *results["failures"]]
    return list(dict.fromkeys(item["suite"] for item in both))


def table(results: dict[str, Any], suite: str) -> str:
    """Markdown: a row per contender, and per part where there is one alone; a column per headline metric.

    Of values that fewer clips have than others of their row, their number is said. ▲ ▼ = the interval of the difference
    to the first preset leaves 0 out (up and down are directions, not praise).
    """
    key = lambda item: (item["model"], item["preset"], item["metric"])
    found = {key(r): r for r in results["records"] if r["suite"] == suite}
    apart = {key(d): d for d in results["differences"] if d["suite"] == suite}
    headline, titles = find_suite(suite).headline, names_of(contenders(results))
    lines = [f"| {suite} | {' | '.join(headline)} |", f"|---|{'---|' * len(headline)}"]
    for who, title in titles.items():
        for part in ("", *_parts(found) * (len(titles) == 1)):
            row = [(found.get((*who, name + part)), apart.get((*who, name + part))) for name in headline]
            most = max((record["n"] for record, _ in row if record), default=0)
            cells = (result_cell(record, difference, most) for record, difference in row)
            lines.append(f"| {title}{part and f' {part}, n={most}'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _parts(metrics: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """[PART], as metrics have it at their end."""
    return tuple(dict.fromkeys(metric[metric.index("[") :] for *_, metric in metrics if "[" in metric))


def result_cell(record: dict[str, Any] | None, difference: dict[str, Any] | None = None, most: int = 0) -> str:
    """A value with its interval, its mark, and how many clips have it if that is less than `most`."""
    if record is None or record["value"] is None:
        return "–"
    mark = ""
    if difference is not None and difference["n"] >= ENOUGH:
        mark = " ▲" if difference["low"] > 0 else " ▼" if difference["high"] < 0 else ""
    few = f" (n={record['n']})" if record["n"] < most else ""
    if record["low"] is None:
        return number(record["value"]) + few
    return f"{number(record['value'])} [{number(record['low'])}, {number(record['high'])}]{few}{mark}"


def number(value: float) -> str:
    """Three digits that count; two of what is smaller than a hundredth."""
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
