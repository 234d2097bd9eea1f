"""The table of what was survived."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.faults.trial import Outcome

HEAD = ("fault", "jobs", "lost", "doubled", "unexplained", "recovery (s)")


def lines(outcomes: Iterable[Outcome]) -> list[str]:
    """Return the table, a line for each outcome; what could not be tried is not in it."""
    cells: list[Sequence[str]] = [HEAD]
    for one in outcomes:
        recovery = "" if one.recovery is None else f"{one.recovery:.1f}"
        cells.append((one.fault, f"{one.jobs:,}", str(one.lost), str(one.doubled), str(one.unexplained), recovery))
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEAD))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def together(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return one outcome for each fault: sums, and the longest recovery."""
    by_fault: dict[str, Outcome] = {}
    for one in outcomes:
        sum_ = by_fault.get(one.fault)
        if sum_ is None:
            by_fault[one.fault] = one
            continue
        known = [seconds for seconds in (sum_.recovery, one.recovery) if seconds is not None]
        by_fault[one.fault] = Outcome(
            one.fault,
            sum_.jobs + one.jobs,
            sum_.lost + one.lost,
            sum_.doubled + one.doubled,
            sum_.unexplained + one.unexplained,
            max(known, default=None),
            sum_.problems + one.problems,
        )
    return list(by_fault.values())
