"""What a handler gets besides its payload: its job, and what it can do to it and to the database."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar, Unpack

import psycopg

from pgworker_client.connection import Link
from pgworker_client.enqueue import JobOptions, add_job
from pgworker_client.errors import LOCKED, NOT_HELD, JobLost, LinkDown
from pgworker_client.handler_connections import AsyncConnection, HandlerConnections, SyncConnection
from pgworker_client.hooks import Hooks
from pgworker_client.job import ATTEMPTS, ID, PROGRESS, TASK, Job, JobRow, Row, decode, to_json
from pgworker_client.logs import Log
from pgworker_client.node import NodeLike
from pgworker_client.outcome import WaitsForChildren
from pgworker_client.reports import LITTLE_PATIENCE
from pgworker_client.trees import add_children, children, get_children_values, get_failed_children_values

T = TypeVar("T")

#: Where somebody else has locked the job's row, what other jobs have to say must not wait behind it.
_HASTILY = f" where set_config('lock_timeout', '{LITTLE_PATIENCE}', true) <> ''"
_PROGRESS = "select pgworker.set_progress(%s, %s, %s::jsonb)" + _HASTILY
_COMPLETE = "select pgworker.complete_job(%s, %s, %s::jsonb, %s)"
_WAIT = "select pgworker.wait_for_children(%s, %s, %s)" + _HASTILY
#: Seconds until it is tried once more.
_LATER = 0.2

#: The fate of a run that has ended in `wait_for_children`: its job is the database's.
WAITING = "waiting"


@dataclasses.dataclass(slots=True)
class Surroundings:
    """What all contexts of a worker share."""

    state: Any
    log: Log
    link: Link
    connections: HandlerConnections
    loop: asyncio.AbstractEventLoop
    #: None: nobody wants to know.
    hooks: Hooks | None = None


class Context:
    """The context of an async handler. Made for every job, so everything in it is made when it is asked for."""

    __slots__ = ("_around", "_cancelled", "_job", "_logger", "_row", "_worker_id", "cancels", "ended", "fate")

    def __init__(self, around: Surroundings, row: Row, worker_id: int) -> None:
        self._around = around
        self._row = row
        self._worker_id = worker_id
        #: Why the run is to end early: None, "cancel", "lost", "stop", "timeout", which the worker sets, or WAITING.
        self.fate: str | None = None
        #: Whether `transaction` has completed the job already.
        self.ended = False
        #: How often the worker has cancelled the runner's task because of this run.
        self.cancels = 0
        self._job: Job | None = None
        self._logger: Log | None = None
        self._cancelled: asyncio.Event | None = None

    @property
    def worker_id(self) -> int:
        """The worker that claimed the job."""
        return self._worker_id

    @property
    def job(self) -> Job:
        """The job as it was claimed."""
        if self._job is None:
            self._job = Job.from_row(self._row)
        return self._job

    @property
    def logger(self) -> Log:
        """A logger whose records carry ``worker``, ``task`` and ``job_id``."""
        if self._logger is None:
            self._logger = self._around.log.of_job(self._row[TASK], self._row[ID])
        return self._logger

    @property
    def state(self) -> Any:
        """What the application gave to ``Worker(state=…)``; shared by all jobs of the worker."""
        return self._around.state

    @property
    def cancelled(self) -> asyncio.Event:
        """Set when the job is to stop: cancelled, lost to another worker, timed out, or the worker is stopping."""
        if self._cancelled is None:
            self._cancelled = asyncio.Event()
            if self.fate is not None:
                self._cancelled.set()
        return self._cancelled

    def recover(self) -> Any:
        """The progress that the last attempt left, None if it left none."""
        return None if self._row[PROGRESS] is None else decode(self._row[PROGRESS])

    async def progress(self, value: Any) -> None:
        """Keep ``value`` (anything that JSON can hold) as the job's progress: seen at once, found by the next attempt.

        Raises JobLost if the job is not held any more.
        """
        text = to_json("progress", value)
        while True:
            self.check_held()
            try:
                await self._around.link.fetch(_PROGRESS, (self._worker_id, self._row[ID], text), hasty=True)
                return
            except LinkDown:  # the same value once more does no harm
                continue
            except psycopg.Error as exc:
                await self._later(exc)

    async def add_job(self, identifier: str, payload: Any = None, **options: Unpack[JobOptions]) -> JobRow:
        """Add a job, committed at once; arguments and result are those of `pgworker_client.add_job`."""
        async with self._around.connections.for_coroutine(autocommit=True) as conn:
            return await add_job(conn, identifier, payload, **options)

    async def children(self) -> list[JobRow]:
        """The job's children, as far as the database still knows them."""
        async with self._around.connections.for_coroutine(autocommit=True) as conn:
            return await children(conn, self._row[ID])

    async def children_values(self) -> dict[int, Any]:
        """The results of the children that have completed, by id."""
        async with self._around.connections.for_coroutine(autocommit=True) as conn:
            return await get_children_values(conn, self._row[ID])

    async def failed_children_values(self) -> dict[int, Any]:
        """The last progress of the children that have failed, by id."""
        async with self._around.connections.for_coroutine(autocommit=True) as conn:
            return await get_failed_children_values(conn, self._row[ID])

    async def add_children(self, nodes: Iterable[NodeLike]) -> list[JobRow]:
        """Add children to this job (`Node` or dicts), committed at once, and return them in the order given.

        They are there too when this attempt fails afterwards: look at `children` before adding them once more. Raises
        JobLost if the job is not held any more.
        """
        holder = self.holder()
        async with self._around.connections.for_coroutine(autocommit=True) as conn:
            try:
                return await add_children(conn, *holder, nodes)
            except psycopg.Error as exc:
                raise self.judge(exc) from exc

    async def wait_for_children(self) -> None:
        """End this run if a child is not finished yet: the handler is started again, from the top, when all are.

        It ends by an exception, `WaitsForChildren`, that must be let pass; a block of `connection` or `transaction`
        that it leaves is rolled back. The attempt does not count. Returns when there is nothing to wait for, or the
        job is to stop. Raises JobLost if the job is not held any more.
        """
        unknown = False
        while True:
            self.check_held()
            try:
                ((waits,),) = await self._around.link.fetch(
                    _WAIT, (self._worker_id, self._row[ID], self._row[ATTEMPTS]), hasty=True
                )
            except LinkDown as down:
                unknown = unknown or down.unknown
                continue
            except psycopg.Error as exc:
                if not unknown or exc.sqlstate != NOT_HELD:
                    await self._later(exc)
                    continue
                waits = True  # the call whose answer was lost has done it
            if not waits:
                return
            self.stop(WAITING)
            raise WaitsForChildren

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncConnection]:
        """A psycopg connection for the block; committed at its end, rolled back if it raises."""
        async with self._around.connections.for_coroutine() as conn:
            yield conn

    @asynccontextmanager
    async def transaction(self, result: Any = None) -> AsyncIterator[AsyncConnection]:
        """A connection in a transaction at whose end the job is completed: its writes happen exactly once.

        ``result`` is kept as the job's result. When the block raises, everything is rolled back. Raises JobLost, with
        everything rolled back, if the job is not held any more. What the handler returns afterwards is ignored.
        """
        params = self.completion(result)
        async with self._around.connections.for_coroutine() as conn:
            async with conn.transaction():
                yield conn
                try:
                    await conn.execute(_COMPLETE, params)
                except psycopg.Error as exc:
                    raise self.judge(exc) from exc
            self.ended = True

    def stop(self, fate: str) -> None:
        """The run is to end early; called in the worker's event loop."""
        if self.fate != WAITING:
            self.fate = fate
        if self._cancelled is not None:
            self._cancelled.set()

    def check_held(self) -> None:
        """Raise what ends this run once more, if it knows already that the job is not its own any more."""
        if self.fate == WAITING:
            raise WaitsForChildren
        if self.fate in ("lost", "timeout"):
            why = "was given up after its timeout" if self.fate == "timeout" else "is not held by this worker any more"
            raise JobLost(f"job {self._row[ID]} {why}")

    def holder(self) -> tuple[int, int]:
        """The worker and the job, which it holds as far as it knows; raises what `check_held` does."""
        self.check_held()
        return self._worker_id, self._row[ID]

    def completion(self, result: Any) -> tuple[Any, ...]:
        """The parameters with which `transaction` completes the job; JobLost or RuntimeError if it cannot."""
        self.check_held()
        if self.ended:
            raise RuntimeError(f"job {self._row[ID]} was completed by an earlier ctx.transaction()")
        text = None if result is None else to_json("result", result)
        return self._worker_id, self._row[ID], text, self._row[ATTEMPTS]

    async def _later(self, exc: psycopg.Error) -> None:
        """Wait a moment if somebody else has locked the job; raise what `judge` says of any other error."""
        if exc.sqlstate != LOCKED:
            raise self.judge(exc) from exc
        await asyncio.sleep(_LATER)

    def judge(self, exc: psycopg.Error) -> Exception:
        """JobLost in place of the database's way of saying it, else the error itself."""
        if exc.sqlstate != NOT_HELD:
            return exc
        self.fate = "lost"
        return JobLost(f"job {self._row[ID]} is not held by this worker any more")


class BlockingContext:
    """The context of a synchronous handler, which runs in a thread of its own: the same, with calls that block."""

    __slots__ = ("_async", "_around", "_cancelled")

    def __init__(self, context: Context, around: Surroundings) -> None:
        self._async = context
        self._around = around
        self._cancelled = threading.Event()

    @property
    def job(self) -> Job:
        """The job as it was claimed."""
        return self._async.job

    @property
    def logger(self) -> Log:
        """A logger whose records carry ``worker``, ``task`` and ``job_id``."""
        return self._async.logger

    @property
    def state(self) -> Any:
        """What the application gave to ``Worker(state=…)``; shared by all jobs of the worker."""
        return self._async.state

    @property
    def cancelled(self) -> threading.Event:
        """Set when the job is to stop. A thread cannot be stopped from outside: a long handler should look at it."""
        return self._cancelled

    def recover(self) -> Any:
        """The progress that the last attempt left, None if it left none."""
        return self._async.recover()

    def progress(self, value: Any) -> None:
        """Keep ``value`` as the job's progress; see `Context.progress`."""
        self._wait(self._async.progress(value))

    def add_job(self, identifier: str, payload: Any = None, **options: Unpack[JobOptions]) -> JobRow:
        """Add a job, committed at once; arguments and result are those of `pgworker_client.add_job`."""
        with self._around.connections.for_thread(autocommit=True) as conn:
            return add_job(conn, identifier, payload, **options)

    def children(self) -> list[JobRow]:
        """The job's children, as far as the database still knows them."""
        with self._around.connections.for_thread(autocommit=True) as conn:
            return children(conn, self.job.id)

    def children_values(self) -> dict[int, Any]:
        """The results of the children that have completed, by id."""
        with self._around.connections.for_thread(autocommit=True) as conn:
            return get_children_values(conn, self.job.id)

    def failed_children_values(self) -> dict[int, Any]:
        """The last progress of the children that have failed, by id."""
        with self._around.connections.for_thread(autocommit=True) as conn:
            return get_failed_children_values(conn, self.job.id)

    def add_children(self, nodes: Iterable[NodeLike]) -> list[JobRow]:
        """Add children to this job, committed at once; see `Context.add_children`."""
        holder = self._async.holder()
        with self._around.connections.for_thread(autocommit=True) as conn:
            try:
                return add_children(conn, *holder, nodes)
            except psycopg.Error as exc:
                raise self._async.judge(exc) from exc

    def wait_for_children(self) -> None:
        """End this run if a child is not finished yet; see `Context.wait_for_children`."""
        try:
            self._wait(self._async.wait_for_children())
        except WaitsForChildren:
            self._cancelled.set()
            raise

    @contextmanager
    def connection(self) -> Iterator[SyncConnection]:
        """A psycopg connection for the block; committed at its end, rolled back if it raises."""
        with self._around.connections.for_thread() as conn:
            yield conn

    @contextmanager
    def transaction(self, result: Any = None) -> Iterator[SyncConnection]:
        """A connection in a transaction at whose end the job is completed; see `Context.transaction`."""
        params = self._async.completion(result)
        with self._around.connections.for_thread() as conn:
            with conn.transaction():
                yield conn
                try:
                    conn.execute(_COMPLETE, params)
                except psycopg.Error as exc:
                    raise self._async.judge(exc) from exc
            self._async.ended = True

    def stop(self, fate: str) -> None:
        """Called by the worker: the run is to end early."""
        self._async.stop(fate)
        self._cancelled.set()

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._around.loop).result()
