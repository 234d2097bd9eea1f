"""The worker process that is measured: pgworker's own client, used as anybody would use it (see ``meter``)."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from bench.programs.meter import Meter
from pgworker_client import Context, Worker
from pgworker_client.settings import Settings

CONCURRENCY = 24  # what Graphile Worker's preset runs at

worker = Worker(concurrency=CONCURRENCY, buffer=int(os.environ.get("BENCH_BUFFER", Settings().buffer)))
meter = Meter()


@worker.task
async def noop(payload: dict[str, Any], _ctx: Context) -> None:
    """Do nothing, and count it."""
    meter.count(payload)


@worker.task
async def kept(payload: dict[str, Any], _ctx: Context) -> dict[str, int]:
    """Do nothing, count it, and have a result."""
    meter.count(payload)
    return {"n": 1}


@worker.task
async def stuck(payload: dict[str, Any], ctx: Context) -> None:
    """Never end, the first time."""
    if ctx.job.attempts == 1:
        await asyncio.get_running_loop().create_future()
    meter.count(payload)


if __name__ == "__main__":
    meter.start(worker.stop)
    worker.run()
