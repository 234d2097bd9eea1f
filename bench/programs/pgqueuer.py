"""pgqueuer's side, on asyncpg and uvloop, in batches of 1,000.

pgqueuer.py install   its tables into the database of libpq's variables
pgqueuer.py work      a worker
pgqueuer.py produce   one connection that adds jobs as told on standard input
"""

from __future__ import annotations

import json
import os
import sys

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

from bench.programs.meter import Meter
from bench.programs.orders import Payload, obey

BATCH = 1_000


async def install(conn: asyncpg.Connection) -> None:
    await Queries(AsyncpgDriver(conn)).install()


async def work(conn: asyncpg.Connection) -> None:
    meter = Meter()
    queuer = PgQueuer.from_asyncpg_connection(conn)

    async def noop(job: Job) -> None:
        meter.count(json.loads(job.payload))

    queuer.entrypoint("noop")(noop)
    await meter.tell_while(queuer.run(batch_size=BATCH))


async def produce(conn: asyncpg.Connection) -> None:
    queries = Queries(AsyncpgDriver(conn))

    async def add(payload: Payload) -> None:
        await queries.enqueue("noop", json.dumps(payload).encode())

    async def add_many(payloads: list[Payload]) -> None:
        count = len(payloads)
        await queries.enqueue(["noop"] * count, [json.dumps(payload).encode() for payload in payloads], [0] * count)

    await obey(add, add_many)


async def main() -> None:
    # asyncpg knows libpq's variables but this one.
    conn = await asyncpg.connect(server_settings={"application_name": os.environ["PGAPPNAME"]})
    await {"install": install, "work": work, "produce": produce}[sys.argv[1]](conn)


if __name__ == "__main__":
    uvloop.run(main())
