"""Watching the worker's event loop from another thread: a handler that blocks it must not keep other jobs waiting."""

from __future__ import annotations

import time
from collections.abc import Callable

from pgworker_client.feed import Feed
from pgworker_client.job import Row
from pgworker_client.logs import Log

#: Seconds without a turn after which the loop is taken to be blocked.
BLOCKED = 2.0


class LoopWatch:
    """Asks the event loop for a sign of life, and takes away what it cannot start while it gives none."""

    def __init__(self, call: Callable[[Callable[[], None]], None], feed: Feed, log: Log) -> None:
        self._call = call  # has something called in the event loop
        self._feed = feed
        self._log = log
        self._asked_at: float | None = None
        self._said = False
        self._taken: list[Row] = []

    def look(self) -> list[Row]:
        """The jobs to give back: those that were claimed and not started, once the loop is blocked."""
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._call(self._answer)
        elif now - self._asked_at > BLOCKED:
            taken = self._feed.take_all()
            self._taken += taken
            if not self._said:
                self._said = True
                self._log.warning(
                    "the event loop has been blocked for %.1f s by an async handler; %d claimed jobs go back. What "
                    "takes long without awaiting belongs into a plain function, or a process (executor='process')",
                    now - self._asked_at,
                    len(taken),
                )
        return self._taken

    def given_back(self) -> None:
        """The database has them again."""
        self._taken = []

    def _answer(self) -> None:
        self._asked_at = None
        self._said = False
