"""Runners: each takes claimed jobs one after the other, calls the handler and puts what becomes of it in the outbox."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from pgworker_client.context import WAITING, BlockingContext, Context, Surroundings
from pgworker_client.errors import JobLost
from pgworker_client.feed import Feed
from pgworker_client.finishing import Finisher
from pgworker_client.hooks import JobEventName
from pgworker_client.importable import Place
from pgworker_client.job import ATTEMPTS, ID, MAX_ATTEMPTS, PAYLOAD, TASK, TIMEOUT, Row, decode, items_of, to_json
from pgworker_client.middleware import Around
from pgworker_client.outcome import (
    Cancel,
    Fail,
    ProcessDied,
    RemoteTraceback,
    Retry,
    TimedOut,
    WaitsForChildren,
    error_text,
    handlers_frames,
    parts_error,
    reason_text,
)
from pgworker_client.process_pool import ProcessPool, ProcessRun
from pgworker_client.reports import Outbox
from pgworker_client.tasks import Task
from pgworker_client.threads import HandlerThread

#: Seconds that a handler which is to stop gets to do so. Then it is reported as stopped, and left behind.
PATIENCE = 5.0


class Runner:
    """One of the ``concurrency`` loops of a worker.

    Async handlers are awaited right here, in the runner's own task: making a task for each job would cost more than the
    rest of its way through the worker. Sync handlers run in the runner's thread, which is made when first needed.
    """

    def __init__(
        self,
        feed: Feed,
        tasks: dict[str, Task],
        finisher: Finisher,
        around: Surroundings,
        middleware: Around | None,
        processes: ProcessPool,
        on_given_up: Callable[[Runner], None],
    ) -> None:
        self._feed = feed
        self._tasks = tasks
        self._finisher = finisher
        self._around = around
        self._middleware = middleware
        self._processes = processes
        self._thread: HandlerThread | None = None
        self._blocking: BlockingContext | None = None
        self._abandoned = False
        self._on_given_up = on_given_up
        #: Whether the run of this runner was given up: somebody else is in its place.
        self._replaced = False
        self.task: asyncio.Task[None] | None = None
        #: Done when there is nothing here to wait for any more: all is run, or what runs is given up.
        self.over: asyncio.Future[None] = around.loop.create_future()
        #: The run that is going on.
        self.current: Context | None = None
        self._row: Row | None = None
        #: The job of that run, if it has a timeout and its handler is not called yet.
        self.unbegun: Row | None = None
        self.waits_for_process = False

    @property
    def job_id(self) -> int | None:
        """The job that is being run."""
        return None if self.current is None or self._row is None else int(self._row[ID])

    async def run(self) -> None:
        """Run jobs until the feed is closed and empty."""
        feed = self._feed
        feed.join()
        try:
            while not self._replaced:
                if feed.jobs:
                    await self._run_jobs()
                elif feed.closed:
                    return
                else:
                    await feed.park()
        finally:
            if not self._replaced:
                feed.leave()
                self.over.set_result(None)
            if self._thread is not None:
                self._thread.leave()

    def interrupt(self, fate: str) -> None:
        """End the present run early: "cancel", "lost" or "stop". A thread is only told.

        At a stop the caller waits, and calls `abandon`; else a run that does not end is given up after `PATIENCE`.
        """
        ctx = self.current
        if ctx is None or ctx.fate in (fate, "lost"):
            return
        if ctx.fate == WAITING and fate != "stop":
            return  # it is said of the job's next run
        if fate != "stop" and ctx.fate is None:
            self._around.loop.call_later(PATIENCE, self._give_up, ctx)
        if self._blocking is not None:
            self._blocking.stop(fate)
            return
        ctx.stop(fate)
        if self.task is not None and (fate == "stop" or not ctx.cancels):
            ctx.cancels += 1
            self.task.cancel()

    def _give_up(self, ctx: Context) -> None:
        """Its handler does not stop. A thread is replaced by another; with a coroutine the whole runner is."""
        if self.current is not ctx or self._row is None:
            return
        if self._blocking is not None:
            if not isinstance(self._blocking, ProcessRun):  # a process is killed
                self.abandon()
            return
        row, outbox = self._row, self._finisher.outbox
        ctx.logger.error("the handler ignores that it is to stop (%s); it is left behind", ctx.fate or "timeout")
        if outbox.worker_id != ctx.worker_id:
            ctx.stop("lost")
        if ctx.fate is None:
            ctx.stop("timeout")
            longest = _longest(self._tasks[row[TASK]], row)
            self._raised(row, ctx, outbox, TimedOut(f"timed out after {longest:g} s"))
        else:
            self._raised(row, ctx, outbox, asyncio.CancelledError())
        ctx.stop("lost")
        self.current = None
        self._replaced = True
        self.over.set_result(None)
        self._feed.ended += 1
        self._feed.leave()
        self._finisher.wake()
        self._on_given_up(self)

    def abandon(self) -> bool:
        """Give up a run that does not end: its thread is left behind. False for a coroutine, which cannot be left."""
        if self._blocking is None or self.current is None or self.task is None:
            self._abandoned = True
            return self.current is None
        self.current.cancels += 1
        self.task.cancel()
        return True

    async def _run_jobs(self) -> None:
        # The hot path. Up to 50,000 times a second, so: no task, future, lock, date or log record for a job.
        feed, finisher, tasks, around = self._feed, self._finisher, self._tasks, self._around
        jobs = feed.jobs
        bare = self._middleware is None
        on_start = around.hooks if around.hooks is not None and around.hooks.wants("started") else None
        while jobs:
            try:
                row = jobs.popleft()
            except IndexError:  # given back by the presence thread, which thought that nobody would come
                break
            if len(jobs) < feed.low:
                feed.need()
            outbox = finisher.outbox
            self._row = row
            self.current = ctx = Context(around, row, outbox.worker_id)
            try:
                task = tasks[row[TASK]]
                text = row[PAYLOAD]
                payload = {} if text == "{}" else decode(text)
                if on_start is not None:
                    on_start.job("started", row)
                if bare and task.is_async and task.timeout is None and row[TIMEOUT] is None:
                    result = await task.handler(payload, ctx)
                else:
                    result = await self._call(task, payload, ctx)
            except BaseException as exc:
                if self._replaced:
                    return
                self.current = None
                self._raised(row, ctx, outbox, exc)
            else:
                self.current = None
                if result is None and ctx.fate is None and not ctx.ended:
                    outbox.done.append(row)
                    outbox.results.append(None)
                elif self._replaced:
                    return
                else:
                    self._returned(row, ctx, outbox, result)
            feed.ended += 1
            if outbox is not finisher.outbox:
                finisher.keep(outbox)
            if finisher.asleep:
                finisher.wake()
            if perf_counter() >= feed.slice_end:
                await feed.give_way()
        self._row = None

    async def _call(self, task: Task, payload: Any, ctx: Context) -> Any:
        """Call the handler with everything that is around it."""
        if task.is_async:
            how = self._alone if _longest(task, self._row) is None else self._limited
        else:
            how = self._in_thread if task.place is None else partial(self._in_process, task.place)
        self.unbegun = None if _longest(task, self._row) is None else self._row
        try:
            if self._middleware is None:
                return await how(task, payload, ctx)
            return await self._middleware(ctx, partial(how, task, payload, ctx))
        finally:
            self._begin()
            self.waits_for_process = False

    def _begin(self) -> None:
        """The handler is called: its time counts from now."""
        self.unbegun = None

    @staticmethod
    async def _alone(task: Task, payload: Any, ctx: Context) -> Any:
        return await task.handler(payload, ctx)

    async def _limited(self, task: Task, payload: Any, ctx: Context) -> Any:
        longest = _longest(task, self._row)
        limit = asyncio.timeout(longest)
        enough = self._around.loop.call_later((longest or 0) + PATIENCE, self._give_up, ctx)
        self._begin()
        try:
            async with limit:
                return await task.handler(payload, ctx)
        except TimeoutError:
            if not limit.expired():
                raise
            if ctx.fate is None:
                ctx.stop("timeout")
            raise TimedOut(f"timed out after {longest:g} s") from None
        finally:
            enough.cancel()

    async def _in_thread(self, task: Task, payload: Any, ctx: Context) -> Any:
        if self._thread is None:
            self._thread = HandlerThread(self._around.loop)
        thread, blocking = self._thread, BlockingContext(ctx, self._around)
        future = thread.call(task.handler, payload, blocking)
        self._blocking = blocking
        longest = _longest(task, self._row)
        limit = asyncio.timeout(longest)
        self._begin()
        try:
            async with limit:
                result = await future
        except (TimeoutError, asyncio.CancelledError):
            if not future.cancelled():  # the handler's own
                raise
            self._thread = None
            thread.leave()
            if not limit.expired():
                ctx.logger.warning("the handler did not stop; its thread is left behind")
                raise
            if ctx.fate is None:
                blocking.stop("timeout")
            ctx.logger.warning("timed out after %g s; its thread is left behind", longest)
            raise TimedOut(f"timed out after {longest:g} s") from None
        finally:
            self._blocking = None
        return await result if inspect.isawaitable(result) else result

    async def _in_process(self, place: Place, task: Task, payload: Any, ctx: Context) -> Any:
        longest = _longest(task, self._row)
        self.waits_for_process = True
        async with self._processes.process() as process:
            self.waits_for_process = False
            if self._thread is None:
                self._thread = HandlerThread(self._around.loop)
            self._blocking = run = ProcessRun(ctx, self._around, process, longest, self._begin)
            try:
                return await self._thread.call(partial(process.call, place), payload, run)
            finally:
                self._blocking = None
                run.over()
                if run.timed_out:  # whatever it had to say when it was told so
                    raise TimedOut(f"timed out after {longest:g} s") from None

    def _returned(self, row: Row, ctx: Context, outbox: Outbox, result: Any) -> None:
        self._uncancel(ctx)
        if ctx.ended:
            self._tell("completed", row)
            return
        if ctx.fate == WAITING:
            self._tell("waiting", row)
            ctx.logger.error(
                "the handler did not let WaitsForChildren pass; the job waits for its children, what this run returned "
                "is dropped"
            )
            return
        if ctx.fate in ("lost", "stop"):
            # Stopped: whether it returned because it was told to stop or because it was done cannot be known, and
            # running a job twice is allowed, losing it is not. Lost: the attempt tells the database whether it is.
            outbox.release([row])
            self._tell("lost" if ctx.fate == "lost" else "released", row)
            return
        try:
            if isinstance(result, list) and row[PAYLOAD][0] == "[" and self._partly(row, ctx, outbox, result):
                return
            text = None if result is None else to_json("the result of the handler", result)
        except BaseException as exc:
            self._raised(row, ctx, outbox, exc)
            return
        outbox.complete(row, text)

    def _partly(self, row: Row, ctx: Context, outbox: Outbox, result: list[Any]) -> bool:
        """Deal with the list that the handler of an array returned; false if it is a result like any other."""
        items = items_of(row[PAYLOAD])
        if len(items) != len(result):
            return False
        failed = [(index, entry) for index, entry in enumerate(result) if isinstance(entry, BaseException)]
        if failed:
            text = parts_error(failed, len(items))
            ctx.logger.warning("attempt %s of %s: %s", row[ATTEMPTS], row[MAX_ATTEMPTS], text.partition("\n")[0])
            outbox.fail_partly(row, text, "[" + ",".join([items[index] for index, _ in failed]) + "]")
        elif all(entry is None for entry in result):
            outbox.complete(row, None)
        else:
            return False
        return True

    def _raised(self, row: Row, ctx: Context, outbox: Outbox, exc: BaseException) -> None:
        if isinstance(exc, (KeyboardInterrupt, GeneratorExit)):
            raise exc
        if isinstance(exc, asyncio.CancelledError) and not ctx.cancels and self._abandoned:
            raise exc  # the event loop itself is ending
        self._uncancel(ctx)
        if ctx.ended:
            self._tell("completed", row)
            if not isinstance(exc, asyncio.CancelledError):
                ctx.logger.error("raised after its transaction had completed the job; it stays completed", exc_info=exc)
        elif ctx.fate == WAITING:
            self._tell("waiting", row)
            if not isinstance(exc, (WaitsForChildren, asyncio.CancelledError)):
                ctx.logger.error("raised after its job had begun to wait for children; it waits on", exc_info=exc)
        elif ctx.fate == "lost" or isinstance(exc, JobLost):
            ctx.logger.warning("the job was lost while it ran; its outcome is dropped")
            outbox.release([row])
            self._tell("lost", row)
        elif isinstance(exc, Cancel):
            outbox.cancel(row, exc.reason)
        elif isinstance(exc, (Retry, Fail)):
            ctx.logger.info("attempt %s of %s: %r", row[ATTEMPTS], row[MAX_ATTEMPTS], exc)
            outbox.fail(row, exc, reason_text(exc))
        elif ctx.fate == "stop":
            outbox.release([row])
            self._tell("released", row)
        elif ctx.fate == "cancel":
            outbox.cancel(row, None)
        elif row[TASK] not in self._tasks:  # the database was asked for our tasks only
            outbox.release([row])
        else:
            self._failed(row, ctx, outbox, exc)

    @staticmethod
    def _failed(row: Row, ctx: Context, outbox: Outbox, exc: BaseException) -> None:
        frames = handlers_frames(exc.__traceback__)
        elsewhere = exc.__cause__ if isinstance(exc.__cause__, RemoteTraceback) else None
        shown = (type(exc), exc, frames) if frames is not None or elsewhere is not None else None
        if isinstance(exc, (TimedOut, ProcessDied)):
            text = str(exc)
        elif elsewhere is not None:
            text = str(elsewhere)
        else:
            text = error_text(exc, frames)
        ctx.logger.warning(
            "attempt %s of %s failed: %s", row[ATTEMPTS], row[MAX_ATTEMPTS], text.partition("\n")[0], exc_info=shown
        )
        outbox.fail(row, exc, text)

    def _tell(self, event: JobEventName, row: Row) -> None:
        """Tell the hooks how a run ended of which the database has nothing to say."""
        if self._around.hooks is not None:
            self._around.hooks.job(event, row)

    def _uncancel(self, ctx: Context) -> None:
        while ctx.cancels and self.task is not None:
            ctx.cancels -= 1
            self.task.uncancel()


def _longest(task: Task, row: Row | None) -> float | None:
    """How many seconds a run may take: as its handler says, else as the task's settings in the database do."""
    return task.timeout if task.timeout is not None or row is None else row[TIMEOUT]
