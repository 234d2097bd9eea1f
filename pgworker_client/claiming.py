"""Claiming: one loop that keeps the feed filled, and sleeps exactly as long as there is nothing to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

import psycopg
from psycopg.types.string import ByteaBinaryLoader

from pgworker_client.connection import Link
from pgworker_client.errors import UNKNOWN_WORKER, LinkDown
from pgworker_client.feed import Feed
from pgworker_client.finishing import Finisher
from pgworker_client.job import CLAIM_COLUMNS, ID, Row
from pgworker_client.logs import Log
from pgworker_client.pace import Pace
from pgworker_client.settings import Settings, text_array

_CLAIM = f"select {CLAIM_COLUMNS} from pgworker.get_jobs(%s::bigint, %s::int, %s::text[], %s::text[])"
_NEXT = "select extract(epoch from pgworker.next_run_at(%s::text[]) - clock_timestamp())::float8"
_HELD = "select job_id, attempts from pgworker.held_jobs(%s)"
_FORGET = "select set_config('pgworker.cursor', '', false)"

_CHANNEL = "pgworker"
#: What a new connection says to itself, to see that it is told.
_TEST = "pgworker_test"

#: After a claim that found nothing the database is asked again so many seconds later: a producer that looked just
#: before us whether anybody sleeps, and committed just after, told nobody. Then the poll interval takes over.
_LOOK_AGAIN = (0.003, 0.1)
#: Jobs that have waited here for so many seconds go back, for workers that have time for them.
_STALE = 1.0
#: After a claim whose answer was lost: seconds to the next look for jobs that we hold without knowing it, from when the
#: database answers again. More than one, because the old session may go on, and commit, for a while after we have
#: noticed that its connection is broken.
_RECONCILE_AFTER = (0.0, 5.0, 30.0)


class Claimer:
    """Claims jobs whenever there is room for them."""

    def __init__(
        self,
        settings: Settings,
        link: Link,
        feed: Feed,
        finisher: Finisher,
        log: Log,
        tasks: Iterable[str],
        running: Callable[[], set[int]],
        on_claimed_again: Callable[[int], None],
    ) -> None:
        self._settings = settings
        self._link = link
        self._feed = feed
        self._finisher = finisher
        self._log = log
        self._tasks = text_array(list(tasks))
        flags = settings.forbidden_flags
        self._flags = text_array(flags) if flags else None
        self._running = running
        self._on_claimed_again = on_claimed_again
        self._pace = Pace(settings.buffer, settings.concurrency)
        self._most_pending = 2 * settings.buffer + 100 * settings.concurrency
        self._wakened = asyncio.Event()
        self._hinted = False
        self._closing = False
        self._warned = False
        self._reconcile_at = 0.0
        self._reconcile_after: list[float] = []

    async def prepare(self, conn: psycopg.AsyncConnection[Any]) -> None:
        """Make a new connection ready for claims, and listen on it."""
        conn.adapters.register_loader("timestamptz", ByteaBinaryLoader)  # bytes until somebody looks at them
        if self._settings.pooled:
            return
        # A claim that a crash of the server undoes is only run again; completions stay durable.
        await conn.execute("set synchronous_commit = off")
        heard: set[str] = set()
        conn.add_notify_handler(lambda notify: heard.add(notify.channel))
        for statement in (f"listen {_TEST}", f"notify {_TEST}", f"unlisten {_TEST}", f"listen {_CHANNEL}"):
            await conn.execute(statement)
        if _TEST not in heard and not self._warned:
            self._warned = True
            self._log.warning(
                "notifications do not arrive on this connection: jobs are found by polling only. If a transaction "
                "pooler stands between, give the worker a lease"
            )
        conn.add_notify_handler(lambda _notify: self.hint())
        self.hint()  # whatever was said while nobody listened

    def hint(self) -> None:
        """There may be work: a notification, or a report that makes other jobs claimable."""
        self._hinted = True
        self._wakened.set()

    def unsure(self) -> None:
        """The answer to a claim, or to a report that gives jobs back, is lost: look for what we hold unknowingly."""
        self._reconcile_at = time.monotonic()
        self._reconcile_after = list(_RECONCILE_AFTER)
        self._wakened.set()

    def room(self) -> None:
        """There may be room for more jobs."""
        self._wakened.set()

    def close(self) -> None:
        """End the loop after the claim that is under way, which is never cut off: its jobs would be lost from sight."""
        self._closing = True
        self._wakened.set()
        self._link.stop_trying()

    async def run(self, *, once: bool) -> None:
        """Claim until closed, or with ``once`` until nothing is due and everything that ran is reported."""
        fruitless = 0
        certain = False
        while not self._closing:
            self._wakened.clear()
            self._give_back_stale()
            await self._reconcile()
            wanted = self._wanted()
            if not wanted:
                await self._wait_for_room()
                continue
            self._hinted = False
            settled = self._feed.quiet and not self._finisher.pending
            rows = await self._claim(wanted)
            if rows and self._told_to_close():  # told to stop while the claim was under way: none of these is started
                self._finisher.give_back(rows)
            elif rows:
                fruitless = 0
                # Taken away and claimed again by ourselves: heartbeat() will not say that the first claim is lost.
                for job_id in self._here().intersection([row[ID] for row in rows]):
                    self._on_claimed_again(job_id)
                self._feed.put(rows)
                if len(rows) <= self._settings.concurrency:
                    await asyncio.sleep(0)  # a few jobs: let them start before the next claim is sent
            elif rows is not None:
                if once and settled:
                    # Nothing from the session's cursor on. Only without a cursor it is certain that nothing is due.
                    if certain:
                        return
                    certain = await self._forget_cursor()
                    continue
                await self._sleep(fruitless)
                fruitless = 0 if self._hinted else fruitless + 1

    def _told_to_close(self) -> bool:
        return self._closing

    async def _forget_cursor(self) -> bool:
        """Make the next claim look at everything; false if the database could not be told."""
        try:
            await self._link.fetch(_FORGET)
        except LinkDown:
            return False
        return True

    def _wanted(self) -> int:
        """How many jobs to claim now."""
        feed, waiting = self._feed, len(self._feed.jobs)
        if self._finisher.pending > self._most_pending:
            return 0  # the database does not keep up with the reports: more jobs would not help it
        ahead = self._pace.ahead(feed.ended, feed.busy())
        if waiting > ahead // 2 and waiting >= feed.idle:
            return 0
        return max(0, feed.idle + ahead - waiting)

    async def _wait_for_room(self) -> None:
        feed = self._feed
        feed.low = max(1, len(feed.jobs) // 2 + 1)
        await self._pause(_STALE / 4 if feed.jobs else self._settings.poll_interval)
        feed.low = 0

    def _give_back_stale(self) -> None:
        if self._feed.oldest() > _STALE:
            self._give_back("nobody had time to start them")

    def _give_back(self, why: str) -> None:
        rows = self._feed.take_all()
        if rows:
            self._log.info("%d claimed jobs go back: %s", len(rows), why)
            self._finisher.give_back(rows)

    async def _claim(self, wanted: int) -> list[Row] | None:
        """The jobs claimed; None if the database could not be asked."""
        worker_id = self._finisher.outbox.worker_id
        try:
            rows = await self._link.fetch(_CLAIM, (worker_id, wanted, self._tasks, self._flags), binary=True)
        except LinkDown as down:
            if down.unknown:
                self.unsure()
                # If this takes long they will be somebody else's, who runs them: better not to begin.
                self._give_back("the database is gone")
            return None
        except psycopg.Error as exc:
            if exc.sqlstate != UNKNOWN_WORKER:
                raise
            await self._pause(_STALE)  # the next heartbeat finds it out too, and registers anew
            return None
        if worker_id != self._finisher.outbox.worker_id:
            return None  # registered anew meanwhile: the old id's jobs are the database's again
        return rows

    async def _sleep(self, fruitless: int) -> None:
        """Sleep until the next look: soon after lying down, then at the poll interval or when a job becomes due."""
        longest = _LOOK_AGAIN[fruitless] if fruitless < len(_LOOK_AGAIN) else self._settings.poll_interval
        longest = min(longest, self._settings.poll_interval)
        if self._feed.jobs:
            longest = min(longest, _STALE / 4)
        if not self._hinted:
            try:
                ((due,),) = await self._link.fetch(_NEXT, (self._tasks,))
            except LinkDown:
                return
            if due is not None:
                longest = min(longest, max(0.0, due))
        deadline = time.monotonic() + longest
        with self._link.hearing(self.hint):
            while not self._hinted and not self._closing and (left := deadline - time.monotonic()) > 0:
                await self._pause(left)

    async def _pause(self, longest: float) -> None:
        if self._closing:
            return
        try:
            async with asyncio.timeout(longest):
                await self._wakened.wait()
        except TimeoutError:
            pass
        self._wakened.clear()

    async def _reconcile(self) -> None:
        """Give back what the database says that we hold and we do not know of: the answer of a claim that got lost."""
        if not self._reconcile_after or time.monotonic() < self._reconcile_at + self._reconcile_after[0]:
            return
        known = self._known()
        try:
            held = dict(await self._link.fetch(_HELD, (self._finisher.outbox.worker_id,)))
        except LinkDown:
            return
        self._reconcile_at = time.monotonic()
        del self._reconcile_after[0]
        unknown = held.keys() - known - self._known()
        if unknown:
            self._log.warning("%d jobs were claimed as the connection broke; they go back", len(unknown))
            self._finisher.give_back([(job_id, "", "", held[job_id]) for job_id in unknown])

    def _known(self) -> set[int]:
        return self._here() | self._finisher.unreported()

    def _here(self) -> set[int]:
        # Copied at once: the presence thread may take jobs out meanwhile.
        return {row[ID] for row in list(self._feed.jobs)} | self._running()
