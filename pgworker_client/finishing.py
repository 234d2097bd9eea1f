"""Finishing: one loop that reports what became of jobs as soon as the previous report is back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable

import psycopg

from pgworker_client.connection import Link
from pgworker_client.errors import LOCKED, NOT_HELD, LinkDown, one_line
from pgworker_client.hooks import Hooks, JobEventName
from pgworker_client.job import ATTEMPTS, ID, MAX_ATTEMPTS, PARENT, QUEUE, TASK, Row
from pgworker_client.logs import Log
from pgworker_client.reports import LITTLE_PATIENCE, PATIENCE, Cancelled, Finish, Outbox, Released, Report, Special

#: What hooks are told of an outcome; any other is the state of a job that is to run again.
_EVENTS: dict[str, JobEventName] = {
    "completed": "completed", "failed": "failed", "cancelled": "cancelled", "lost": "lost",
}  # fmt: skip
#: Seconds until the report of a job that somebody else has locked is tried once more.
_LATER = 1.0
#: How often in a row it is tried to find out which jobs these are: all may be, one after the other.
_TRIES = 20


class Finisher:
    """Sends the outboxes. Nothing waits for a batch to fill; what gathers while a report is under way is the next one.

    A report that was under way when the connection broke is sent again: the database fences it by worker and attempt,
    so that it counts once at most. A job that somebody else has locked, in a transaction that may never end, keeps no
    other from being reported.
    """

    def __init__(
        self,
        link: Link,
        log: Log,
        hooks: Hooks | None,
        on_flushed: Callable[[bool], None],
        on_unsure: Callable[[], None],
    ) -> None:
        self._link = link
        self._log = log
        self._hooks = hooks
        self._on_flushed = on_flushed
        #: Called when nobody knows any more whether jobs have been given back.
        self._on_unsure = on_unsure
        self.outbox = Outbox(0)
        #: Whether the loop sleeps and must be woken; runners look at it after every job.
        self.asleep = False
        self._old: list[Outbox] = []
        self._under_way: deque[tuple[int, Report, bool]] = deque()
        #: Those of jobs that somebody else has locked, and when they are tried once more.
        self._locked: list[tuple[int, Report, bool]] = []
        self._try_locked_at = 0.0
        self._told: set[int] = set()
        self._patience = PATIENCE
        self._tries = _TRIES
        self._wake = asyncio.Event()
        self._closing = False

    def new_worker_id(self, worker_id: int) -> None:
        """Jobs claimed from now on belong to this id; what concerns older ones is still reported under theirs."""
        if len(self.outbox):
            self._old.append(self.outbox)
        self.outbox = Outbox(worker_id)

    def keep(self, outbox: Outbox) -> None:
        """See to it that an outbox of an older worker id is sent: a run that began under that id has ended."""
        if outbox is not self.outbox and outbox not in self._old:
            self._old.append(outbox)

    @property
    def pending(self) -> int:
        """How many jobs have ended here and are not known to the database yet."""
        sent = sum(len(report.rows()) for _, report, _ in (*self._under_way, *self._locked))
        return len(self.outbox) + sent + sum(map(len, self._old))

    def unreported(self) -> set[int]:
        """The ids of those jobs."""
        ids = {row[ID] for _, report, _ in (*self._under_way, *self._locked) for row in report.rows()}
        for box in (self.outbox, *self._old):
            ids.update(box.ids())
        return ids

    def wake(self) -> None:
        """There is something to report."""
        self.asleep = False
        self._wake.set()

    def give_back(self, rows: list[Row]) -> None:
        """Report that these are not started here: others may have them."""
        if rows:
            self.outbox.release(rows)
            self.wake()

    def close(self) -> None:
        """End the loop once everything is reported."""
        self._closing = True
        self._wake.set()

    async def run(self) -> None:
        """Report until closed. Raises what the database says when it refuses reports for good."""
        while True:
            self._collect()
            if not self._under_way:
                if self._closing and not self._locked:
                    return
                await self._sleep()
                continue
            more = False
            while self._under_way:
                more = await self._send_first() or more
            self._on_flushed(more)

    async def _sleep(self) -> None:
        self._wake.clear()
        self.asleep = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._try_locked_at - time.monotonic() if self._locked else None):
                await self._wake.wait()
        self.asleep = False

    def _collect(self) -> None:
        self._patience, self._tries = LITTLE_PATIENCE if self._locked else PATIENCE, _TRIES
        if self._locked and time.monotonic() >= self._try_locked_at:
            self._under_way.extend(self._locked)
            self._locked.clear()
        for box in (*self._old, self.outbox):
            for report in box.take():
                self._under_way.append((box.worker_id, report, False))
        self._old.clear()

    async def _send_first(self) -> bool:
        """Send the first report; returns whether its jobs may have made others claimable."""
        worker_id, report, again = self._under_way[0]
        try:
            rows = await self._link.fetch(report.QUERY, (self._patience, *report.params(worker_id)), hasty=True)
        except LinkDown as down:
            if down.unknown and isinstance(report, Released):
                # Not sent again: what was given back may have been claimed anew by then, in the same attempt.
                self._under_way.popleft()
                self._on_unsure()
            else:
                self._under_way[0] = (worker_id, report, again or down.unknown)
            return False
        except psycopg.Error as exc:
            self._under_way.popleft()
            if exc.sqlstate == LOCKED:
                self._held_up(worker_id, report, again)
            else:
                self._refused(worker_id, report, again, exc)
            return False
        self._under_way.popleft()
        if self._told:
            self._told.difference_update([row[ID] for row in report.rows()])
        outcomes = {row[0]: row[1] for row in rows if row[0] is not None}
        if outcomes or self._hooks is not None:
            self._tell(report, outcomes, again)
        return not isinstance(report, Finish) or bool(outcomes) or _frees_others(report)

    def _held_up(self, worker_id: int, report: Report, again: bool) -> None:
        """Somebody else has locked a job of these, or its queue."""
        self._patience = LITTLE_PATIENCE  # they have waited together
        self._tries -= 1
        rows = report.rows()
        if len(rows) > 1 and self._tries > 0:
            self._halve(worker_id, report, again)
            return
        if not self._locked:
            self._try_locked_at = time.monotonic() + _LATER
        self._locked.append((worker_id, report, again))
        row = rows[0]
        if len(rows) == 1 and row[ID] not in self._told:
            self._told.add(row[ID])
            self._log.of_job(row[TASK], row[ID]).warning(
                "somebody else has locked this job, its queue or its place in a tree: its report waits"
            )

    def _halve(self, worker_id: int, report: Report, again: bool) -> None:
        first, second = report.halves()
        self._under_way.extendleft([(worker_id, second, again), (worker_id, first, again)])

    def _refused(self, worker_id: int, report: Report, again: bool, exc: psycopg.Error) -> None:
        rows = report.rows()
        if len(rows) > 1:
            self._halve(worker_id, report, again)
            return
        row = rows[0]
        if exc.sqlstate == NOT_HELD:
            self._tell(report, {row[ID]: "lost"}, again)
            return
        instead = report.instead(one_line(exc))
        if instead is None:
            raise exc
        self._log.of_job(row[TASK], row[ID]).error("the database refused the report of this job: %s", one_line(exc))
        self._under_way.appendleft((worker_id, instead, again))

    def _tell(self, report: Report, outcomes: dict[int, str], again: bool) -> None:
        if self._hooks is not None and not isinstance(report, Released):
            self._tell_hooks(self._hooks, report, outcomes)
        for row in report.rows():
            outcome = outcomes.get(row[ID])
            if outcome is None or isinstance(report, Released):
                continue
            log = self._log.of_job(row[TASK], row[ID])
            if outcome == "lost" and again:
                log.info("reported twice, because the connection broke: counted the first time, or lost")
            elif outcome == "lost":
                log.warning("job %s was lost: this worker does not hold it any more; its outcome is dropped", row[ID])
            elif outcome == "failed":
                log.error("job %s failed for good after attempt %s of %s", row[ID], row[ATTEMPTS], row[MAX_ATTEMPTS])
            elif outcome == "cancelled":
                log.info("job %s was cancelled", row[ID])

    @staticmethod
    def _tell_hooks(hooks: Hooks, report: Finish | Special | Cancelled, outcomes: dict[int, str]) -> None:
        """Whatever is not in ``outcomes`` has completed."""
        errors = report.errors_by_id()
        for row in report.rows():
            event = _EVENTS.get(outcomes.get(row[ID], "completed"), "retried")
            hooks.job(event, row, None if event == "completed" else errors.get(row[ID]))


def _frees_others(report: Finish) -> bool:
    return any(row[QUEUE] is not None or row[PARENT] is not None for row in report.done)
