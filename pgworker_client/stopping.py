"""What tells a running worker, or the supervisor of some, to stop: signals."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

#: Inside its block, entered in the running loop, the function given is called each time a stop is wanted.
StopSource = Callable[[Callable[[], None]], AbstractContextManager[None]]


@contextlib.contextmanager
def on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` at each SIGTERM and SIGINT, if this is the main thread, the only one that may handle them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            loop.add_signal_handler(number, stop)
    except NotImplementedError:  # Windows
        for number in before:
            signal.signal(number, lambda *_: stop())
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)
            signal.signal(number, handler)
