"""The worker process that is measured: pgworker's own client, used as anybody would use it.

Says on standard output, every 10 ms, ``@ handled N`` (so far) and ``@ delays NS NS …`` (one per job that says when it
was sent); ends when standard input does. Times are nanoseconds of CLOCK_MONOTONIC, the same in every process.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from typing import Any

from pgworker_client import Context, Worker

CONCURRENCY = 24  # what the other side's preset runs at

worker = Worker(concurrency=CONCURRENCY)


class Meter:
    """What the handlers did, told every 10 ms.

    Attributes:
        handled: jobs so far.
        delays: nanoseconds from sending to handling, of those that were not told yet.

    """

    def __init__(self) -> None:
        self.handled = 0
        self.delays: list[int] = []

    def tell(self) -> None:
        """Tell until the process ends."""
        told = 0
        while True:
            time.sleep(0.01)
            if self.delays:
                delays, self.delays = self.delays, []
                print("@ delays", *delays, flush=True)
            if self.handled != told:
                told = self.handled
                print("@ handled", told, flush=True)


meter = Meter()


@worker.task
async def noop(payload: dict[str, Any], _ctx: Context) -> None:
    """Do nothing, and count it."""
    sent = payload.get("sent")
    if sent is not None:
        meter.delays.append(time.monotonic_ns() - int(sent))
    meter.handled += 1


@worker.task
async def kept(_payload: dict[str, Any], _ctx: Context) -> dict[str, int]:
    """Do nothing, count it, and have a result."""
    meter.handled += 1
    return {"n": 1}


@worker.task
async def stuck(_payload: dict[str, Any], ctx: Context) -> None:
    """Never end, the first time."""
    if ctx.job.attempts == 1:
        await asyncio.get_running_loop().create_future()
    meter.handled += 1


def _stop_with_input() -> None:
    sys.stdin.read()
    worker.stop()


if __name__ == "__main__":
    for background in (meter.tell, _stop_with_input):
        threading.Thread(target=background, daemon=True).start()
    worker.run()
