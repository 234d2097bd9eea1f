"""One run of a worker: puts its parts together, watches over them, and stops them in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pgworker_client.claiming import Claimer
from pgworker_client.connection import Link, connection_string
from pgworker_client.context import Surroundings
from pgworker_client.database import Database
from pgworker_client.errors import WorkerFailed, one_line
from pgworker_client.feed import Feed
from pgworker_client.finishing import Finisher
from pgworker_client.handler_connections import HandlerConnections
from pgworker_client.hooks import HookList, Hooks
from pgworker_client.logs import Log
from pgworker_client.middleware import Middleware, compose
from pgworker_client.presence_thread import PresenceThread
from pgworker_client.process_pool import ProcessPool
from pgworker_client.running import Runner
from pgworker_client.settings import Settings
from pgworker_client.tasks import Task
from pgworker_client.unbegun import Unbegun

#: Seconds that whatever has been told to end gets to do so: cancelled handlers, the last claim, the last report.
_LAST_WAIT = 5.0
#: Seconds, about thirty years; the database takes no longer timeouts.
_LONGEST = 1e9


class Engine:
    """The parts of a running worker.

    Four connections: one claims and listens, one reports, one is present, one maintains, so that none of them waits for
    another. The last two belong to a thread of their own.
    """

    def __init__(
        self,
        settings: Settings,
        tasks: dict[str, Task],
        state: Any,
        logger: logging.Logger,
        hooks: HookList,
        middleware: Sequence[Middleware],
    ) -> None:
        self._settings = settings
        loop = asyncio.get_running_loop()
        name = settings.worker_name()
        self._log = log = Log(logger, {"worker": name})
        pooled = settings.pooled
        conninfo = connection_string(settings.dsn, name=f"pgworker {name}")
        self._database = database = Database(conninfo, log, pooled=pooled)

        self._claim_link = Link("claim", database, setup=lambda conn: self._claimer.prepare(conn))
        self._finish_link = Link("finish", database)
        self._connections = HandlerConnections(database, settings.concurrency)
        self._hooks = Hooks(hooks, state, name, log) if hooks.by_event else None
        around = Surroundings(state, log, self._finish_link, self._connections, loop, self._hooks)
        self._finisher = Finisher(
            self._finish_link, log, self._hooks, self._flushed, on_unsure=lambda: self._claimer.unsure()
        )
        self._feed = Feed(loop, self._room)
        wrap = compose(middleware)
        self._processes = ProcessPool(settings.concurrency)
        self._make_runner: Callable[[], Runner] = lambda: Runner(
            self._feed, tasks, self._finisher, around, wrap, self._processes, self._replace
        )
        self._runners = [self._make_runner() for _ in range(settings.concurrency)]
        self._unbegun = Unbegun(
            self._finish_link,
            lambda: self._finisher.outbox.worker_id,
            lambda: [runner.unbegun for runner in self._runners if runner.unbegun is not None],
        )
        self._parts: set[asyncio.Task[None]] = set()
        self._part_ended = asyncio.Event()
        self._runners_started = 0
        self._claimer = Claimer(
            settings,
            self._claim_link,
            self._feed,
            self._finisher,
            log,
            tasks,
            self._running,
            lambda job_id: self._notice(job_id, "lost"),
        )
        self._presence = PresenceThread(
            settings,
            database,
            log,
            self._feed,
            {
                name: task.timeout
                for name, task in tasks.items()
                if task.timeout is not None and task.timeout <= _LONGEST
            },
            on_worker_id=self._new_worker_id,
            on_notice=self._notice,
            on_unsure=self._claimer.unsure,
        )
        self._stops = 0
        self._stopping = asyncio.Event()
        self._interrupting = asyncio.Event()

    def stop(self) -> None:
        """First call: claim no more and let what runs end. Second call: cancel what runs."""
        self._stops += 1
        self._stopping.set()
        self._claimer.close()
        self._give_back_unstarted()
        if self._stops > 1:
            self._interrupting.set()

    async def run(self, *, once: bool, started: Callable[[], None]) -> None:
        """Work until stopped, or with ``once`` until nothing is due. WorkerFailed if a part of the worker dies.

        ``started`` is called when the worker is connected and registered.
        """
        looking_after = asyncio.create_task(self._database.look_after(), name="silence")
        try:
            if not await self._start():
                return
            started()
            await self._work(looking_after, once=once)
        finally:
            looking_after.cancel()
            self._processes.close()
            await self._presence.close()
            for link in (self._claim_link, self._finish_link):
                await link.close()
            await self._connections.close()
            if self._hooks is not None:
                await self._hooks.close(_LAST_WAIT)

    async def _start(self) -> bool:
        """Connect; false if a stop came meanwhile."""

        async def connect() -> None:
            await self._presence.start()
            await self._claim_link.connect()
            await self._finish_link.connect()

        connecting = asyncio.create_task(connect(), name="connect")
        stop = asyncio.create_task(self._stopping.wait(), name="stop")
        try:
            await asyncio.wait((connecting, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if not connecting.done():
                connecting.cancel()
        if connecting.done() and not connecting.cancelled():
            connecting.result()
            return True
        await asyncio.wait((connecting,))
        await self._presence.leave()
        return False

    async def _work(self, looking_after: asyncio.Task[None], *, once: bool) -> None:
        self._watch(looking_after)
        claiming = self._watch(asyncio.create_task(self._claimer.run(once=once), name="claim"))
        finishing = self._watch(asyncio.create_task(self._finisher.run(), name="finish"))
        present = self._watch(asyncio.create_task(self._presence.run(), name="presence"))
        unbegun = self._watch(asyncio.create_task(self._unbegun.run(), name="unbegun"))
        for runner in self._runners:
            self._start_runner(runner)
        stop = asyncio.create_task(self._stopping.wait(), name="stop")
        ended = asyncio.create_task(self._part_ended.wait(), name="part ended")
        self._log.info("worker started, concurrency %d", self._settings.concurrency)
        if self._hooks is not None:
            self._hooks.worker("worker_started")
        cancelled: asyncio.CancelledError | None = None
        try:
            await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError as exc:  # whoever awaits us wants the end now: in order, but at once
            cancelled = exc
            self._interrupting.set()
        stop.cancel()
        ended.cancel()
        dead = _dead(self._parts)
        if dead is not None:
            self._log.error("%s; the worker stops", _death(dead))
            if dead is finishing:  # nothing can be reported any more, so nothing is worth waiting for
                self._interrupting.set()
        await self._drain(claiming, finishing)
        unbegun.cancel()
        await self._presence.leave()
        await asyncio.wait((present,), timeout=_LAST_WAIT)
        present.cancel()  # whatever it still waits for
        await asyncio.wait((present,), timeout=_LAST_WAIT)
        dead = dead or _dead(self._parts)
        self._log.info("worker stopped")
        if self._hooks is not None:
            self._hooks.worker("worker_stopped")
        if cancelled is not None:
            raise cancelled
        if dead is not None:
            raise WorkerFailed(_death(dead)) from dead.exception()

    def _watch(self, part: asyncio.Task[None]) -> asyncio.Task[None]:
        """The worker stops when this one ends."""
        self._parts.add(part)
        part.add_done_callback(lambda ended: self._part_ended.set() if ended in self._parts else None)
        return part

    def _start_runner(self, runner: Runner) -> None:
        self._runners_started += 1
        runner.task = self._watch(asyncio.create_task(runner.run(), name=f"runner {self._runners_started}"))

    def _replace(self, given_up: Runner) -> None:
        """A handler does not stop, and its runner can run no other: another takes its place."""
        if given_up.task is not None:
            self._parts.discard(given_up.task)
        runner = self._runners[self._runners.index(given_up)] = self._make_runner()
        if not self._feed.closed:
            self._start_runner(runner)

    async def _drain(self, claiming: asyncio.Task[None], finishing: asyncio.Task[None]) -> None:
        """Let go of what was not started, wait for what runs, interrupt it if need be, report everything."""
        feed = self._feed
        self._claimer.close()
        await asyncio.wait((claiming,), timeout=_LAST_WAIT)
        self._give_back_unstarted()
        feed.close()
        runners = {runner.over for runner in self._runners if runner.task is not None}
        await self._wait_unless_interrupted(runners)
        if any(runner.current is not None for runner in self._runners):
            self._log.warning("cancelling %d jobs that still run; they go back", len(self._running()))
            for runner in self._runners:
                runner.interrupt("stop")
            await asyncio.wait(runners, timeout=_LAST_WAIT)
            left = [runner for runner in self._runners if not runner.abandon()]
            await asyncio.wait(runners, timeout=0.1)
            for runner in left:
                self._log.error("job %s ignored its cancellation; it is left behind", runner.job_id)
        self._finisher.close()
        await self._wait_unless_interrupted({finishing})
        await asyncio.wait((finishing,), timeout=_LAST_WAIT)
        if not claiming.done() or not finishing.done():
            self._log.error("the database cannot be reached; it will give back what this worker holds")
            self._finish_link.stop_trying()
            for task in (claiming, finishing):
                task.cancel()
            await asyncio.wait((claiming, finishing))

    async def _wait_unless_interrupted(self, futures: Iterable[asyncio.Future[None]]) -> None:
        """Wait until these are done, at most for the grace, and no longer than until the second stop."""
        hurry = asyncio.create_task(self._interrupting.wait())
        deadline = asyncio.get_running_loop().time() + self._settings.grace
        waiting: set[asyncio.Future[Any]] = set(futures)
        while waiting and not hurry.done():
            left = deadline - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait({*waiting, hurry}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            waiting -= done
        hurry.cancel()

    def _give_back_unstarted(self) -> None:
        self._finisher.give_back(self._feed.take_all())
        for runner in self._runners:
            if runner.waits_for_process:
                runner.interrupt("stop")

    def _running(self) -> set[int]:
        return {runner.job_id for runner in self._runners if runner.job_id is not None}

    def _room(self) -> None:
        self._claimer.room()

    def _flushed(self, others: bool) -> None:
        """A report is back. ``others``: jobs that could not be claimed before may be claimable now."""
        if others:
            self._claimer.hint()
        else:
            self._claimer.room()

    def _new_worker_id(self, worker_id: int) -> None:
        self._feed.take_all()  # the database has given them back, or will
        self._finisher.new_worker_id(worker_id)
        for runner in self._runners:
            runner.interrupt("lost")

    def _notice(self, job_id: int, notice: str) -> None:
        row = self._feed.take(job_id)
        if row is not None:
            if notice == "cancel":
                self._finisher.outbox.cancel(row, None)
            else:  # if it is ours after all, claimed again since, it must not stay with us unknown
                self._finisher.outbox.release([row])
            self._finisher.wake()
        for runner in self._runners:
            if runner.job_id == job_id:
                runner.interrupt(notice)


def _death(part: asyncio.Task[None]) -> str:
    error = part.exception() or RuntimeError("no reason")
    return f"{part.get_name()} died: {type(error).__name__}: {one_line(error)}"


def _dead(parts: set[asyncio.Task[None]]) -> asyncio.Task[None] | None:
    """The part that ended with an error, if one has."""
    for task in parts:
        if task.done() and not task.cancelled() and task.exception() is not None:
            return task
    return None
