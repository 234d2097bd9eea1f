"""Processes for CPU-bound handlers: what runs in them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from pgworker_client.importable import Place, find
from pgworker_client.job import Job
from pgworker_client.logs import Log
from pgworker_client.outcome import error_text, handlers_frames
from pgworker_client.payloads import typed

#: How the processes are called.
NAME = "pgworker handler"

_PR_SET_PDEATHSIG = 1


class ProcessContext:
    """The context of a handler with ``executor="process"``: what can be had without the worker's connections."""

    def __init__(self, job: Job, logger: Log, cancelled: threading.Event, keep: Callable[[Any], None]) -> None:
        #: The job as it was claimed.
        self.job = job
        #: A logger whose records carry ``worker``, ``task`` and ``job_id``; they go to the worker's handlers.
        self.logger = logger
        #: Set when the job is to stop; two seconds later the process is killed.
        self.cancelled = cancelled
        self._keep = keep

    def recover(self) -> Any:
        """The progress that the last attempt left, None if it left none."""
        return self.job.progress

    def progress(self, value: Any) -> None:
        """Keep ``value`` as the job's progress; see `Context.progress`."""
        self._keep(value)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"ctx.{name} is not there in a handler with executor='process', which has job, logger, cancelled, "
            "progress() and recover(); connect to the database yourself, or leave the executor out"
        )


class _Line:
    """The way to the worker, whose messages may come from several threads."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._sending = threading.Lock()
        self._asking = threading.Lock()
        self._run = 0

    def during(self, run: int) -> None:
        """From now on questions of this run are asked, 0: none."""
        with self._asking:
            self._run = run

    def send(self, *message: Any) -> None:
        with self._sending:
            self._pipe.send(message)

    def keep(self, run: int, value: Any) -> None:
        """Have the worker keep the progress of this run, and wait until it has."""
        with self._asking:
            if run != self._run:  # a thread that was left behind: it would get in the way of the next job
                raise RuntimeError("ctx.progress() was called after the handler had ended")
            self.send("progress", value)
            error = self._pipe.recv()
        if error is not None:
            raise error


class _Relay(QueueHandler):
    """Sends log records to the worker."""

    def __init__(self, line: _Line) -> None:
        super().__init__(queue=None)  # type: ignore[arg-type]  # it has a line
        self._line = line

    def enqueue(self, record: logging.LogRecord) -> None:
        self._line.send("log", record)


class _Watch:
    """Hears, while a handler runs, that it is to stop, and that the worker is gone."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._lock = threading.Lock()
        self._run, self._stopped = 0, 0
        self._cancelled = threading.Event()
        threading.Thread(target=self._hear, name="pgworker-watch", daemon=True).start()

    def begin(self, run: int) -> threading.Event:
        """The event that is set when this run is to stop; it may have been said before it began."""
        with self._lock:
            self._run, self._cancelled = run, threading.Event()
            if self._stopped >= run:
                self._cancelled.set()
            return self._cancelled

    def _hear(self) -> None:
        while True:
            try:
                stopped = self._control.recv()
            except (EOFError, OSError):
                os._exit(1)  # nobody is left who would want the result
            with self._lock:
                self._stopped = stopped
                if stopped >= self._run:
                    self._cancelled.set()


def serve(pipe: Connection, control: Connection) -> None:
    """Run handlers, one after the other, until the worker is gone."""
    _belong_to_the_worker()
    watch, line = _Watch(control), _Line(pipe)
    relays: dict[str, logging.Handler] = {}
    while True:
        try:
            number, place, payload, job, logger_name, level, extra = pipe.recv()
        except (EOFError, OSError):
            return
        cancelled = watch.begin(number)
        logger = logging.getLogger(logger_name)
        if logger_name not in relays:
            relays[logger_name] = _Relay(line)
            logger.addHandler(relays[logger_name])
            logger.propagate = False
        logger.setLevel(level)
        ctx = ProcessContext(job, Log(logger, extra), cancelled, functools.partial(line.keep, number))
        line.during(number)
        outcome = _call(line, place, payload, ctx)
        line.during(0)
        line.send(*outcome)
        del payload, job, ctx, outcome  # nothing of a job outlives it here


def _call(line: _Line, place: Place, payload: Any, ctx: ProcessContext) -> tuple[Any, ...]:
    """Call the handler; what is to be said of it."""
    try:
        handler = _handler(place)
        line.send("begun")
        result = handler(payload, ctx)
        try:
            return "returned", pickle.dumps(result)
        except Exception as exc:
            raise TypeError(
                f"the result of the handler cannot leave its process: {exc}; use dicts, lists, text, numbers, None"
            ) from None
    except BaseException as exc:  # whatever a handler raises, SystemExit too, is its job's and not the process's
        return "raised", _pickled(exc), error_text(exc, handlers_frames(exc.__traceback__))


@functools.cache
def _handler(place: Place) -> Callable[[Any, Any], Any]:
    return typed(find(place), is_async=False)


def _pickled(exc: BaseException) -> bytes:
    """The exception, or one that says as much, for the worker; those that mean something to its own tasks do not."""
    if isinstance(exc, Exception) and not isinstance(exc, StopIteration):
        with contextlib.suppress(Exception):
            pickled = pickle.dumps(exc)
            pickle.loads(pickled)
            return pickled
    return pickle.dumps(RuntimeError(f"the handler raised {type(exc).__name__}: {exc}"))


def _belong_to_the_worker() -> None:
    """Leave signals that go to all processes at once to the worker, and do not outlive it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _nothing)  # unlike SIG_IGN, not inherited by what a handler starts
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    if sys.platform == "linux":
        # The watch sees the end of the worker too, but not while a handler is in C code that holds the GIL.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _nothing(*_: Any) -> None:
    pass
