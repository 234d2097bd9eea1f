"""What the demo shows: lines, a progress bar, a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

_WIDTH = 40
_LINE_EVERY = 2.0


def say(text: str = "") -> None:
    """One line, or several."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table: the first column to the left, numbers to the right."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    shown = []
    for first, *others in lines:
        numbers = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        shown.append("  ".join(["", first.ljust(widths[0]), *numbers]))
    return "\n".join(shown)


class ProgressBar:
    """One line that is written anew on a terminal; elsewhere a line at each quarter, and every few seconds."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._begun = time.monotonic()
        self._said = self._begun
        self._quarter = 0
        self._terminal = sys.stdout.isatty()
        self._open = False

    def show(self, done: int) -> None:
        """So many of the total are done."""
        now = time.monotonic()
        if self._terminal:
            sys.stdout.write(f"\r{self._text(done, now)}")
            sys.stdout.flush()
            self._open = True
            return
        quarter = 4 * done // self._total
        if quarter > self._quarter or now - self._said > _LINE_EVERY:
            self._quarter, self._said = quarter, now
            say(self._text(done, now))

    def close(self) -> None:
        """End the line."""
        if self._open:
            say()
            self._open = False

    def _text(self, done: int, now: float) -> str:
        filled = _WIDTH * done // self._total
        bar = "#" * filled + "." * (_WIDTH - filled)
        width = len(f"{self._total:,}")
        return f"  [{bar}] {done:>{width},} of {self._total:,} jobs  {now - self._begun:5.1f} s"
