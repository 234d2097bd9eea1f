"""Many database sessions at once, each in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psycopg

Conn = psycopg.Connection[Any]


def in_parallel(dsn: str, parts: Sequence[Callable[[Conn], None]], *, options: str = "", timeout: float = 90) -> None:
    """Run each part in a thread with an autocommit connection; all are connected before the first begins.

    ``options`` are server settings as libpq takes them. When a part raises, the sessions of the others are ended and
    the error is raised here. Parts that have not ended after ``timeout`` seconds are an error too.
    """
    start = threading.Barrier(len(parts))
    errors: list[BaseException] = []
    sessions: list[int] = []

    def run(part: Callable[[Conn], None]) -> None:
        try:
            with psycopg.connect(dsn, autocommit=True, options=options) as conn:
                sessions.append(conn.info.backend_pid)
                start.wait(timeout)
                part(conn)
        except BaseException as error:  # handed to the caller's thread
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=run, args=(part,), daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    while any(thread.is_alive() for thread in threads):
        if errors or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    first = list(errors)
    if stuck := [thread for thread in threads if thread.is_alive()]:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("select pg_terminate_backend(pid) from unnest(%s::int[]) pid", [sessions])
        for thread in stuck:
            thread.join(10)
    for error in first:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not stuck, f"{len(stuck)} of {len(threads)} sessions did not end within {timeout} s"
