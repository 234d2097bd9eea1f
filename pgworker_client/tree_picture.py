"""A tree of jobs as lines of text, with what matters least folded where it is too wide to read."""

from __future__ import annotations

import dataclasses
import heapq
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable

FINISHED = ("completed", "failed", "cancelled")

#: Where not all siblings fit, those are shown whose state, or that of anything below them, comes first here.
_INTEREST = ("failed", "running", "scheduled", "cancelled", "ready", "waiting", "completed")
_STATE_WIDTH = max(map(len, _INTEREST)) + 2
#: Characters of branches before a job; of a deeper one only the last branches are drawn.
_DEEPEST = 48
#: How many siblings are shown: as many as make a picture that fits, or is not longer than this.
_FEWER = (12, 8, 6, 4, 3, 2, 1)
_LONG = 100

Paint = Callable[[str, str], str]


@dataclasses.dataclass(slots=True)
class Shown:
    """What the picture says of a job."""

    depth: int
    id: int
    name: str | None
    task: str
    state: str
    attempts: int
    max_attempts: int
    #: Seconds: how long it has been running, or ran; or, negative, until it may run.
    run_time: float | None
    #: Seconds from when it was added to its end, where the time of its run is not known.
    age: float | None
    error: str | None
    children: list[Shown] = dataclasses.field(default_factory=list)
    interest: int = 0
    #: How many jobs are below it.
    below: int = 0


class Tree:
    """A tree, from the rows of ``job_tree`` in their order.

    Args:
        jobs: the root first, each job after its parent.
        asked: the job that the user named: never folded, and marked unless it is the root.
    """

    def __init__(self, jobs: Iterable[Shown], asked: int) -> None:
        self.jobs = list(jobs)
        self.asked = asked
        self.root = self.jobs[0]
        #: The root, and any job whose parent somebody has deleted.
        self.tops: list[Shown] = []
        above: list[Shown] = []
        for job in self.jobs:
            job.interest = -1 if job.id == asked else _INTEREST.index(job.state)
            del above[job.depth :]
            (above[-1].children if above else self.tops).append(job)
            above.append(job)
        for job in reversed(self.jobs):  # from the leaves up
            for child in job.children:
                job.interest = min(job.interest, child.interest)
                job.below += 1 + child.below

    def summary(self) -> str:
        """How many jobs there are, and how many in each state."""
        return f"{_count(len(self.jobs), 'job')}: {_states(self.jobs)}"

    def lines(
        self, paint: Paint, *, width: int | None = None, height: int | None = None, fold: bool = True
    ) -> list[str]:
        """The picture, with the summary as its last line.

        Args:
            paint: gives a text the colour of a state.
            width: no line is wider, if given.
            height: no more lines than that, if given: more is folded, and the rest cut off.
            fold: whether of many siblings only the most interesting are shown.
        """
        lines: list[str] = []
        for siblings in _FEWER if fold else (len(self.jobs),):
            lines = self._draw(siblings, paint, width)
            if len(lines) < (height or _LONG):
                break
        if height is not None and len(lines) >= height:
            cut = len(lines) - (height - 2)
            lines = [*lines[: height - 2], clip(f"… {_count(cut, 'more line')}", width)]
        return [*lines, clip(self.summary(), width)]

    def _draw(self, siblings: int, paint: Paint, width: int | None) -> list[str]:
        lines: list[str] = []
        # With a stack of its own: trees may be deeper than Python's. On it are what to draw, what stands before it, and
        # what stands before all that is below it.
        stack: list[tuple[Shown | str, str, str]] = [(top, "", "") for top in reversed(_fold(self.tops, siblings))]
        while stack:
            entry, branch, indent = stack.pop()
            shown_branch = branch if len(branch) <= _DEEPEST else "…" + branch[1 - _DEEPEST :]
            room = None if width is None else max(1, width - _STATE_WIDTH)
            if isinstance(entry, str):
                lines.append(" " * _STATE_WIDTH + clip(shown_branch + entry, room))
                continue
            text = clip(shown_branch + self._describe(entry), room)
            lines.append(paint(entry.state.ljust(_STATE_WIDTH), entry.state) + text)
            below = _fold(entry.children, siblings)
            for number, child in enumerate(reversed(below)):
                end = number == 0
                stack.append((child, indent + ("└─ " if end else "├─ "), indent + ("   " if end else "│  ")))
        return lines

    def _describe(self, job: Shown) -> str:
        parts = [f"{job.name} ({job.task}) #{job.id}" if job.name else f"{job.task} #{job.id}"]
        if job.id == self.asked and job is not self.root:
            parts[0] += " ←"
        if job.attempts > 1 or (job.attempts and job.state in ("failed", "scheduled")):
            parts.append(f"attempt {job.attempts} of {job.max_attempts}")
        if job.run_time is not None:
            parts.append(f"in {duration(-job.run_time)}" if job.run_time < 0 else duration(job.run_time))
        elif job.age is not None:
            parts.append(f"after {duration(job.age)}")
        if job.error and job.state != "completed":
            parts.append(job.error)
        return printable("  ".join(parts))


def _fold(children: list[Shown], siblings: int) -> list[Shown | str]:
    """The children to draw, in their order, and a line about the others."""
    if len(children) <= siblings + 1:  # a line about one job takes as much room as the job
        return list(children)
    kept = set(heapq.nsmallest(siblings, range(len(children)), key=lambda n: (children[n].interest, n)))
    folded = [child for n, child in enumerate(children) if n not in kept]
    text = f"… {len(folded):,} more: {_states(folded)}"
    below = sum(child.below for child in folded)
    if below:
        text += f", with {_count(below, 'job')} below them"
    return [*(child for n, child in enumerate(children) if n in kept), text]


def _states(jobs: Iterable[Shown]) -> str:
    counted = Counter(job.state for job in jobs)
    return ", ".join(f"{counted[state]:,} {state}" for state in reversed(_INTEREST) if counted[state])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as one reads them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60)} s"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} days"


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: errors hold whatever a handler raised."""
    return "".join([one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text])


def clip(text: str, width: int | None) -> str:
    """``text``, cut off where it is wider than so many columns of a terminal."""
    if width is None or sum(map(_columns, text)) <= width:
        return text
    taken = 1  # for the mark
    for index, one in enumerate(text):
        taken += _columns(one)
        if taken > width:
            return text[:index] + "…"
    return text


def _columns(one: str) -> int:
    if unicodedata.combining(one):
        return 0
    return 2 if unicodedata.east_asian_width(one) in "WF" else 1
