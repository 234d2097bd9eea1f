"""How many jobs to claim ahead: about a tenth of a second of work, by the pace at which jobs were lately finished.

Long jobs give a pace near zero, so nothing is held back from other workers; for short ones there is always a batch at
hand while the next one is on its way.
"""

from __future__ import annotations

AHEAD = 0.1
_GROWTH = 4
_WINDOW = 0.05


class Pace:
    """A running estimate of jobs per second of busy time."""

    def __init__(self, most: int, concurrency: int) -> None:
        self._most = most
        self._concurrency = concurrency
        self._per_second = 0.0
        self._ahead = 0
        self._done = 0
        self._busy = 0.0

    def ahead(self, done: int, busy: float) -> int:
        """How many jobs may wait for a runner, given the jobs done and the busy seconds since the worker started."""
        jobs, spent = done - self._done, busy - self._busy
        if spent > 0 and (jobs or spent > _WINDOW):
            self._done, self._busy = done, busy
            old = 0.5 ** max(1.0, spent / _WINDOW)
            self._per_second = old * self._per_second + (1 - old) * jobs / spent
        # A few quick jobs prove little: grow step by step.
        limit = _GROWTH * self._ahead + self._concurrency
        self._ahead = min(self._most, limit, int(self._per_second * AHEAD))
        return self._ahead
