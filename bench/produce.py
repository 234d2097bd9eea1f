"""One session that adds jobs through pgworker's client, as told on standard input.

``single N`` adds N jobs, each in a transaction of its own; ``bulk N`` adds N at once; ``timed N MS`` adds N that say
when they were sent, pausing MS milliseconds after each. Each is answered by ``@ took NS``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import psycopg

from pgworker_client import add_job, add_jobs


def main() -> None:
    """Obey until the input ends."""
    with psycopg.connect(autocommit=True) as conn:

        def single(count: int) -> None:
            for number in range(count):
                add_job(conn, "noop", {"id": number})

        def bulk(count: int) -> None:
            add_jobs(conn, [{"identifier": "noop", "payload": {"id": number}} for number in range(count)])

        def timed(count: int, pause: int) -> None:
            for _ in range(count):
                add_job(conn, "noop", {"sent": str(time.monotonic_ns())})
                time.sleep(pause / 1000)

        ways: dict[str, Callable[..., None]] = {"single": single, "bulk": bulk, "timed": timed}
        single(20)  # the connection is there and its statements are prepared
        print("@ ready", flush=True)
        for line in sys.stdin:
            what, *numbers = line.split()
            begun = time.monotonic_ns()
            ways[what](*map(int, numbers))
            print("@ took", time.monotonic_ns() - begun, flush=True)


if __name__ == "__main__":
    main()
