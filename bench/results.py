"""What is kept of a run: every number, the table with the command that made it, and a plot for each question."""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.report import Numbers, Row, questions
from bench.setting import Sizes
from bench.sides import ROOT

#: Where results go unless a name says where.
RESULTS = ROOT / "bench/results"


def command(arguments: Sequence[str]) -> str:
    """Return the command that does the same again; where the peers are installed is another machine's own affair."""
    named = os.environ.get("BENCH_PEERS", "")
    return shlex.join([*([f"BENCH_PEERS={named}"] if named else []), "./run", "bench", *arguments])


def save(name: str, made_by: str, document: str, printed: str) -> None:
    """Write ``NAME.json`` and ``NAME.md``, over what had that name."""
    place = RESULTS / name
    place.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{place}.json").write_text(document + "\n", encoding="utf-8")
    text = f"# {place.name}\n\nMade by\n\n```sh\n{made_by}\n```\n\n```text\n{printed}\n```\n"
    Path(f"{place}.md").write_text(text, encoding="utf-8")
    print(f"\nwritten: {place}.json, {place}.md")


def plot(name: str, numbers: Numbers, sides: Sequence[str], sizes: Sizes) -> None:
    """Write ``NAME-QUESTION.svg`` for each question that was asked; without matplotlib, say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: they need matplotlib, .venv/bin/pip install matplotlib")
        return
    for question, rows in questions(sizes).items():
        measured = [row for row in rows if row.key in numbers]
        units = list(dict.fromkeys(row.unit for row in measured))
        if not units:
            continue
        figure = Figure(figsize=(10, 1 + 0.25 * len(measured) * len(sides) + 0.8 * len(units)), layout="constrained")
        heights = [sum(row.unit == unit for row in measured) for unit in units]
        axes = figure.subplots(len(units), squeeze=False, height_ratios=heights)[:, 0]
        for axis, unit in zip(axes, units, strict=True):
            _bars(axis, [row for row in measured if row.unit == unit], numbers, sides)
            axis.set_xlabel(unit)
        handles, labels = max((axis.get_legend_handles_labels() for axis in axes), key=lambda found: len(found[1]))
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
        figure.suptitle(question)
        place = f"{RESULTS / name}-{question}.svg"
        figure.savefig(place)
        print(f"written: {place}")


def _bars(axis, rows: Sequence[Row], numbers: Numbers, sides: Sequence[str]) -> None:  # type: ignore[no-untyped-def]
    """Draw a bar for each side in each row: the median, and a line from the least to the most."""
    for index, side in enumerate(sides):
        at = [position for position, row in enumerate(rows) if side in numbers[row.key]]
        if not at:
            continue
        found = [numbers[rows[position].key][side] for position in at]
        medians = [statistics.median(each) for each in found]
        below = [median - min(each) for median, each in zip(medians, found, strict=True)]
        above = [max(each) - median for median, each in zip(medians, found, strict=True)]
        places = [position + 0.8 * ((index + 0.5) / len(sides) - 0.5) for position in at]
        axis.barh(places, medians, 0.8 / len(sides), xerr=[below, above], label=side)
    axis.set_yticks(range(len(rows)), [row.title.strip() for row in rows])
    axis.invert_yaxis()
