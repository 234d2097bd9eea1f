"""Runs that were claimed and have not begun: each waits for a process, or in middleware, until its handler is called.

In the database the time of a run counts from its claim, so it has to be told of them, or it would take them away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pgworker_client.connection import Link
from pgworker_client.errors import LinkDown
from pgworker_client.job import ATTEMPTS, ID, Row

#: Seconds between two times; well below the 10 seconds for which the database waits longer than a timeout.
EVERY = 1.0
_RESTART = "select from pgworker.restart_timeouts(%s, %s::bigint[], %s::int[])"


class Unbegun:
    """Restarts the timeouts of runs that have not begun, from the event loop: if that hangs, nobody does."""

    def __init__(self, link: Link, worker_id: Callable[[], int], rows: Callable[[], list[Row]]) -> None:
        self._link = link
        self._worker_id = worker_id
        self._rows = rows

    async def run(self) -> None:
        """Do so from time to time, for ever."""
        while True:
            await asyncio.sleep(EVERY)
            rows = self._rows()
            if rows:
                jobs, attempts = [row[ID] for row in rows], [row[ATTEMPTS] for row in rows]
                try:
                    await self._link.fetch(_RESTART, (self._worker_id(), jobs, attempts))
                except LinkDown:
                    continue
