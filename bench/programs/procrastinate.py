"""procrastinate's side: ten jobs at a time in a worker, and jobs that are done are deleted.

procrastinate.py install   its schema into the database of libpq's variables
procrastinate.py work      a worker
procrastinate.py produce   one connection that adds jobs as told on standard input
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import procrastinate

from bench.programs.meter import Meter
from bench.programs.orders import Payload, obey

CONCURRENCY = 10
#: Added with one call.
CHUNK = 10_000

one_session = {"min_size": 1, "max_size": 1} if sys.argv[1] == "produce" else {}
app = procrastinate.App(connector=procrastinate.PsycopgConnector(**one_session))
meter = Meter()


async def noop(**payload: Any) -> None:
    meter.count(payload)


task = app.task(name="noop")(noop)


async def work() -> None:
    await meter.tell_while(app.run_worker_async(concurrency=CONCURRENCY, delete_jobs="always"))


async def produce() -> None:
    async def add(payload: Payload) -> None:
        await task.defer_async(**payload)

    async def add_many(payloads: list[Payload]) -> None:
        for begin in range(0, len(payloads), CHUNK):
            await task.batch_defer_async(*payloads[begin : begin + CHUNK])

    await obey(add, add_many)


async def main() -> None:
    async with app.open_async():
        match sys.argv[1]:
            case "install":
                await app.schema_manager.apply_schema_async()
            case "work":
                await work()
            case "produce":
                await produce()


if __name__ == "__main__":
    asyncio.run(main())
