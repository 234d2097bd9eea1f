"""Handlers that processes run: they are found by import, so they cannot stand in the tests themselves."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pgworker_client import Cancel, Fail, ProcessContext, Retry


@dataclasses.dataclass
class Order:
    number: int


class Unpicklable(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.lock = open(os.devnull)  # noqa: SIM115


def pid(_payload: Any, _ctx: ProcessContext) -> int:
    return os.getpid()


def look(payload: Any, ctx: ProcessContext) -> Any:
    ctx.logger.info("looking at %s", payload, extra={"more": 1})
    before = ctx.recover()
    ctx.progress({"seen": payload})
    return [ctx.job.id, ctx.job.payload, ctx.job.attempts, ctx.cancelled.is_set(), before]


def typed_order(order: Order, _ctx: ProcessContext) -> Any:
    return [type(order).__name__, order.number]


def die(payload: Any, _ctx: ProcessContext) -> None:
    os.kill(os.getpid(), getattr(signal, payload))
    signal.pause()


def null_pointer(_payload: Any, _ctx: ProcessContext) -> None:
    ctypes.string_at(0)


def exit_at_once(payload: Any, _ctx: ProcessContext) -> None:
    os._exit(payload)


def sys_exit(payload: Any, _ctx: ProcessContext) -> None:
    sys.exit(payload)


def returns(payload: Any, _ctx: ProcessContext) -> Any:
    return {"lambda": lambda: 1, "set": {1}, "generator": (n for n in range(3)), "big": "x" * 3_000_000}[payload]


def raises(payload: Any, _ctx: ProcessContext) -> Any:
    raise {
        "value": ValueError("no luck"),
        "unpicklable": Unpicklable(code=7),
        "interrupt": KeyboardInterrupt(),
        "stop": StopIteration(),
        "retry": Retry(in_=3600, reason="later"),
        "fail": Fail("never"),
        "cancel": Cancel("no need"),
    }[payload]


def batch(payload: Any, _ctx: ProcessContext) -> Any:
    return [None if item else ValueError("odd") for item in payload]


def connect(_payload: Any, ctx: Any) -> None:
    ctx.connection()


def spin(payload: Any, ctx: ProcessContext) -> str:
    """Busy until told to stop, or, if it is to be deaf, for ever."""
    ctx.progress(os.getpid())
    while payload == "deaf" or not ctx.cancelled.is_set():
        pass
    return "told"


def busy(payload: float, _ctx: ProcessContext) -> int:
    """Computes for so many seconds."""
    end = time.monotonic() + payload
    while time.monotonic() < end:
        pass
    return os.getpid()


def in_c(_payload: Any, ctx: ProcessContext) -> None:
    """Never lets go of the GIL."""
    ctx.progress(os.getpid())
    ctypes.PyDLL(None).sleep(600)


def until_file(payload: Any, _ctx: ProcessContext) -> int:
    Path(f"{payload}-{os.getpid()}").touch()
    while not Path(payload).exists():
        time.sleep(0.01)
    return os.getpid()


def leaves_a_thread(payload: Any, ctx: ProcessContext) -> None:
    """Once there is a file ``next``, the thread calls ``ctx.progress``; what comes of it is in ``said``."""

    def late() -> None:
        while not Path(payload, "next").exists():
            time.sleep(0.01)
        try:
            ctx.progress("late")
            text = "kept"
        except RuntimeError as exc:
            text = str(exc)
        Path(payload, "new").write_text(text)
        Path(payload, "new").rename(Path(payload, "said"))

    threading.Thread(target=late).start()


def hears_the_thread(payload: Any, _ctx: ProcessContext) -> str:
    Path(payload, "next").touch()
    while not Path(payload, "said").exists():
        time.sleep(0.01)
    return Path(payload, "said").read_text()


def forks_and_dies(payload: Any, _ctx: ProcessContext) -> None:
    """What it forked holds every file descriptor open."""
    if os.fork() == 0:
        while not Path(payload).exists():
            time.sleep(0.01)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
