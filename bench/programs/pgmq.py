"""pgmq's side: the plainest client, which reads 1,000 messages, looks at each, and deletes them.

pgmq.py install   its SQL, as its package on PyPI brings it, into the database of libpq's variables
pgmq.py work      one session that reads and deletes
pgmq.py produce   one session that sends as told on standard input
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from importlib.resources import files

import psycopg
from psycopg.types.json import Jsonb

from bench.programs.meter import Meter
from bench.programs.orders import Payload, obey

BATCH = 1_000
#: Seconds for which messages that were read are hidden from others.
HIDDEN = 30
#: Seconds between two looks at an empty queue.
PAUSE = 0.001


def install() -> None:
    with psycopg.connect(autocommit=True) as conn:
        conn.execute(files("pgmq.sql").joinpath("pgmq.sql").read_bytes())
        conn.execute("select pgmq.create('noop')")


def work() -> None:
    meter = Meter()
    stopping = threading.Event()
    meter.start(stopping.set)
    with psycopg.connect(autocommit=True) as conn:
        while not stopping.is_set():
            rows = conn.execute("select msg_id, message from pgmq.read('noop', %s, %s)", [HIDDEN, BATCH]).fetchall()
            for _, message in rows:
                meter.count(message)
            if rows:
                ids = [number for number, _ in rows]
                conn.execute("select count(*) from pgmq.delete('noop', %s::bigint[])", [ids])
            else:
                time.sleep(PAUSE)


async def produce() -> None:
    with psycopg.connect(autocommit=True) as conn:

        async def add(payload: Payload) -> None:
            conn.execute("select pgmq.send('noop', %s)", [Jsonb(payload)])

        async def add_many(payloads: list[Payload]) -> None:
            query = "select count(*) from pgmq.send_batch('noop', %s::jsonb[])"
            conn.execute(query, [[Jsonb(payload) for payload in payloads]])

        await obey(add, add_many)


if __name__ == "__main__":
    match sys.argv[1]:
        case "install":
            install()
        case "work":
            work()
        case "produce":
            asyncio.run(produce())
