"""One session that adds jobs through pgworker's client, as told on standard input (see ``orders``)."""

from __future__ import annotations

import asyncio

import psycopg

from bench.programs.orders import Payload, obey
from pgworker_client import add_job, add_jobs


async def main() -> None:
    """Obey until the input ends."""
    with psycopg.connect(autocommit=True) as conn:

        async def add(payload: Payload) -> None:
            add_job(conn, "noop", payload)

        async def add_many(payloads: list[Payload]) -> None:
            add_jobs(conn, [{"identifier": "noop", "payload": payload} for payload in payloads])

        await obey(add, add_many)


if __name__ == "__main__":
    asyncio.run(main())
