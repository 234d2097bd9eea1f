"""The feed: jobs that were claimed and not started yet, and the runners that wait for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from time import perf_counter

from pgworker_client.job import ID, Row

#: Seconds of handlers that do not suspend before the event loop gets a turn, so that claims and reports flow meanwhile.
SLICE = 0.001


class Feed:
    """A queue of claimed jobs that starts no more runners than it must.

    Handlers that never suspend are run one after the other by a single runner; waking another would only cost. So
    runners are woken one at a time, and the next one only when the event loop has its turn while jobs are waiting: then
    the last one is inside a handler that suspended.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_room: Callable[[], None]) -> None:
        self._loop = loop
        self._on_room = on_room
        self.jobs: deque[Row] = deque()
        self.closed = False
        #: `on_room` is called when fewer than so many jobs are left; 0: nobody wants to know.
        self.low = 0
        #: Jobs that were ever put in, and run to their end.
        self.arrived = 0
        self.ended = 0
        #: perf_counter() at which the present slice is over.
        self.slice_end = 0.0
        #: Seconds during which at least one runner was awake, and since when one is.
        self._busy = 0.0
        self._busy_since = 0.0
        self._awake = 0
        self._parked: list[asyncio.Future[None]] = []
        self._yielding = 0
        self._starting = False
        self._batches: deque[tuple[float, int]] = deque()

    @property
    def idle(self) -> int:
        """How many runners wait for a job."""
        return len(self._parked)

    @property
    def quiet(self) -> bool:
        """Whether nothing waits and every runner is parked."""
        return not self.jobs and not self._awake

    def put(self, rows: Iterable[Row]) -> None:
        """Jobs that were just claimed."""
        came = list(rows)
        if not self.jobs:
            self._batches.clear()
        self.arrived += len(came)
        self.jobs.extend(came)
        self._batches.append((perf_counter(), self.arrived))
        self._start_one()

    def take_all(self) -> list[Row]:
        """Take back every job that was not started. The one method that another thread may call too."""
        rows = []
        with contextlib.suppress(IndexError):
            while True:  # one by one: each is either taken here, or started, and never both
                rows.append(self.jobs.popleft())
        return rows

    def take(self, job_id: int) -> Row | None:
        """Take back one job, if it was not started."""
        for row in list(self.jobs):
            if row[ID] == job_id:
                with contextlib.suppress(ValueError):
                    self.jobs.remove(row)
                    return row
        return None

    def oldest(self) -> float:
        """For how many seconds the next job has been waiting here; 0 where there is none."""
        while self._batches and self._batches[0][1] <= self.arrived - len(self.jobs):
            self._batches.popleft()
        return perf_counter() - self._batches[0][0] if self.jobs and self._batches else 0.0

    def busy(self) -> float:
        """Seconds in which at least one runner was awake."""
        return self._busy + (perf_counter() - self._busy_since if self._awake else 0.0)

    def need(self) -> None:
        """Called by a runner that leaves fewer than `low` jobs behind."""
        self.low = 0
        self._on_room()

    def join(self) -> None:
        """A runner's first step: it counts as awake from here on."""
        self._woken()

    def leave(self) -> None:
        """A runner's last step."""
        self._awake -= 1
        if not self._awake:
            self._busy += perf_counter() - self._busy_since

    async def park(self) -> None:
        """Wait until there is a job, or the feed is closed."""
        self.leave()
        future = self._loop.create_future()
        self._parked.append(future)
        if self.low:
            self.need()
        try:
            await future
        except asyncio.CancelledError:
            if future in self._parked:
                self._parked.remove(future)
            raise
        finally:
            self._woken()

    async def give_way(self) -> None:
        """Let the event loop have its turn; the slice begins anew after it."""
        self._yielding += 1
        try:
            await asyncio.sleep(0)
        finally:
            self._yielding -= 1
        self.slice_end = perf_counter() + SLICE
        if self.jobs and self._parked:
            self._soon()

    def close(self) -> None:
        """Wake every runner, to end when no job is left."""
        self.closed = True
        while self._parked:
            self._wake(self._parked.pop())

    def _woken(self) -> None:
        self._awake += 1
        if self._awake == 1:
            self._busy_since = perf_counter()
            self.slice_end = self._busy_since + SLICE

    def _soon(self) -> None:
        if not self._starting:
            self._starting = True
            self._loop.call_soon(self._start_next)

    def _start_next(self) -> None:
        self._starting = False
        if not self._yielding:  # else a runner between two jobs will take the next itself
            self._start_one()

    def _start_one(self) -> None:
        if self.jobs and self._parked:
            self._wake(self._parked.pop())
            if self._parked:
                self._soon()

    @staticmethod
    def _wake(future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)
