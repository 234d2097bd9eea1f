"""Hooks: functions of the application that are told what becomes of jobs and of the worker, beside the jobs' way.

Each hook has a queue and a task of its own, a synchronous one also a thread, and is called with one event after the
other. So no job, no report and no other hook ever waits for it; one that cannot keep up loses events, and it is said
how many. What a hook raises is logged.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

from pgworker_client.job import ATTEMPTS, ID, TASK, Job, Row
from pgworker_client.logs import Log
from pgworker_client.threads import HandlerThread

Hook = Callable[[Any], Any]

#: ``started``: its handler is about to be called. Then comes one of the others: the database has taken note that it is
#: completed, to be retried, failed for good, cancelled; it is not this worker's any more; it goes back because the
#: worker stops; it waits for its children.
JobEventName = Literal["started", "completed", "retried", "failed", "cancelled", "lost", "released", "waiting"]
WorkerEventName = Literal["worker_started", "worker_stopped"]

#: A hook that is behind by so many events loses the next ones.
_LIMIT = 10_000

_JOB_EVENTS: tuple[str, ...] = get_args(JobEventName)
_WORKER_EVENTS: tuple[str, ...] = get_args(WorkerEventName)


@dataclasses.dataclass(frozen=True, slots=True)
class JobEvent:
    """Something has become of a job that this worker runs."""

    name: JobEventName
    #: As it was claimed.
    job: Job
    #: What was reported as the job's last_error, if it did not end well.
    error: str | None
    #: What the application gave to ``Worker(state=…)``.
    state: Any


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerEvent:
    """The worker has begun or ended."""

    name: WorkerEventName
    #: The worker's name.
    worker: str
    #: What the application gave to ``Worker(state=…)``.
    state: Any


class HookList:
    """The hooks of a worker, as they are registered."""

    def __init__(self) -> None:
        self.by_event: dict[str, list[Hook]] = {}

    def add(self, names: tuple[str, ...], hook: Hook) -> None:
        """Have ``hook`` called at these events. TypeError or ValueError for what cannot be."""
        unknown = [name for name in names if name not in _JOB_EVENTS + _WORKER_EVENTS]
        if unknown or not names:
            known = ", ".join(_JOB_EVENTS + _WORKER_EVENTS)
            raise ValueError(f"on() takes the names of events, not {unknown or 'nothing'}; they are {known}")
        if not callable(hook):
            raise TypeError(f"a hook must be a function of (event), not {hook!r}")
        try:
            inspect.signature(hook).bind(None)
        except TypeError as exc:
            raise TypeError(f"a hook must take one argument, the event: {exc}") from None
        except ValueError:  # a builtin without a signature
            pass
        for name in dict.fromkeys(names):
            self.by_event.setdefault(name, []).append(hook)


class Hooks:
    """The hooks of a running worker; to be made in its event loop."""

    def __init__(self, hooks: HookList, state: Any, worker: str, log: Log) -> None:
        self._state = state
        self._worker = worker
        self._log = log
        known = {id(hook): hook for wanted in hooks.by_event.values() for hook in wanted}
        callers = {key: _Caller(hook, log) for key, hook in known.items()}
        #: Per event, the callers of its hooks; an event that nobody wants is not in it.
        self._callers = {name: [callers[id(hook)] for hook in wanted] for name, wanted in hooks.by_event.items()}
        self._all = list(callers.values())

    def wants(self, *names: JobEventName) -> bool:
        """Whether there is a hook for one of these events."""
        return any(name in self._callers for name in names)

    def job(self, name: JobEventName, row: Row, error: str | None = None) -> None:
        """Tell of a job."""
        callers = self._callers.get(name)
        if callers is None:
            return
        try:
            event = JobEvent(name, Job.from_row(row), error, self._state)
        except Exception as exc:  # a payload that Python cannot read
            self._log.of_job(row[TASK], row[ID]).error(
                "no hook is told that this job has %s in attempt %s: %s", name, row[ATTEMPTS], exc
            )
            return
        self._tell(callers, event)

    def worker(self, name: WorkerEventName) -> None:
        """Tell of the worker."""
        self._tell(self._callers.get(name, ()), WorkerEvent(name, self._worker, self._state))

    async def close(self, patience: float) -> None:
        """Wait until the hooks know everything, for so many seconds at most, and end them."""
        tasks = [caller.task for caller in self._all if caller.close()]
        if tasks:
            await asyncio.wait(tasks, timeout=patience)
        left = [caller for caller in self._all if not caller.task.done()]
        for caller in left:
            self._log.error("hook %s did not end; it is left behind, with %d events", caller.name, len(caller.events))
            caller.task.cancel()
        if left:
            await asyncio.wait([caller.task for caller in left], timeout=0.1)

    @staticmethod
    def _tell(callers: Iterable[_Caller], event: JobEvent | WorkerEvent) -> None:
        for caller in callers:
            caller.put(event)


class _Caller:
    """Calls one hook, with one event after the other."""

    def __init__(self, hook: Hook, log: Log) -> None:
        self.name = getattr(hook, "__qualname__", None) or repr(hook)
        self.events: deque[JobEvent | WorkerEvent] = deque()
        self._hook = hook
        self._log = log
        self._lost = 0
        self._more = asyncio.Event()
        self._closing = False
        self.task = asyncio.create_task(self._run(), name=f"hook {self.name}")

    def put(self, event: JobEvent | WorkerEvent) -> None:
        if len(self.events) >= _LIMIT:
            if not self._lost:
                self._log.error("hook %s is %d events behind; it is told of no more", self.name, _LIMIT)
            self._lost += 1
            return
        if self._lost:
            self._log.error("hook %s was not told of %d events", self.name, self._lost)
            self._lost = 0
        self.events.append(event)
        self._more.set()

    def close(self) -> bool:
        """End when nothing is left to be told; true if there may be something."""
        self._closing = True
        self._more.set()
        return not self.task.done()

    async def _run(self) -> None:
        is_async = inspect.iscoroutinefunction(self._hook) or inspect.iscoroutinefunction(
            getattr(self._hook, "__call__", None)  # noqa: B004
        )
        thread = None if is_async else HandlerThread(asyncio.get_running_loop())
        try:
            while True:
                while self.events:
                    event = self.events.popleft()
                    try:
                        if thread is None:
                            await self._hook(event)
                        else:
                            await thread.call(lambda event, _: self._hook(event), event, None)
                    except BaseException as exc:  # whatever a hook raises is its own affair
                        if self._is_end(exc):
                            raise
                        self._log.error("hook %s raised at %r: %r", self.name, event.name, exc, exc_info=exc)
                if self._closing:
                    return
                self._more.clear()
                await self._more.wait()
        finally:
            if thread is not None:
                thread.leave()

    @staticmethod
    def _is_end(exc: BaseException) -> bool:
        """Whether somebody cancels the task, and not a hook itself."""
        task = asyncio.current_task()
        return isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling() > 0
