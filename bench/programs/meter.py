"""What a worker process says of itself on standard output, every 10 ms: the worker's half of the protocol.

``@ handled N`` (so far) and ``@ delays NS NS …`` (one per job that says when it was sent). Times are nanoseconds of
CLOCK_MONOTONIC, the same in every process. A worker ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any


class Meter:
    """What the handlers did.

    Attributes:
        handled: jobs so far.
        delays: nanoseconds from sending to handling, of those that were not told yet.

    """

    def __init__(self) -> None:
        self.handled = 0
        self.delays: list[int] = []

    def count(self, payload: Mapping[str, Any]) -> None:
        """Count a job; called on the first line of its handler."""
        sent = payload.get("sent")
        if sent is not None:
            self.delays.append(time.monotonic_ns() - int(sent))
        self.handled += 1

    def start(self, stop: Callable[[], object]) -> None:
        """Begin to tell, and call ``stop``, in another thread, when standard input ends."""

        def listen() -> None:
            sys.stdin.read()
            stop()

        for background in (self._tell, listen):
            threading.Thread(target=background, daemon=True).start()

    async def tell_while(self, worker: Awaitable[object]) -> None:
        """Tell while a worker runs that ends by being cancelled; that is done when standard input ends."""
        running = asyncio.ensure_future(worker)
        loop = asyncio.get_running_loop()
        self.start(lambda: loop.call_soon_threadsafe(running.cancel))
        await asyncio.wait([running])
        if not running.cancelled():
            running.result()

    def _tell(self) -> None:
        told = 0
        while True:
            time.sleep(0.01)
            if self.delays:
                delays, self.delays = self.delays, []
                print("@ delays", *delays, flush=True)
            if self.handled != told:
                told = self.handled
                print("@ handled", told, flush=True)
