"""What one claim costs in SQL while other work lies in the table, against what it costs on an empty one."""

from __future__ import annotations

import time
from typing import Any

import psycopg

from bench.setting import Bench

_ADD_QUEUED = """
    select from pgworker.add_jobs((
        select jsonb_agg(jsonb_build_object('identifier', %(task)s::text, 'queue_name', 'queue ' || n %% %(queues)s))
        from generate_series(1, %(count)s) as n))"""


def claims(bench: Bench) -> None:
    """Claim one job at a time: with nothing else there, then with many jobs that may not be run now."""
    sizes = bench.sizes
    for _ in range(bench.runs):
        for row, task, queues, count in (
            ("claim_empty", "", 0, 0),
            ("claim_behind", "noop", 1, sizes.behind),
            ("claim_busy_queues", "noop", sizes.queues, 10 * sizes.queues),
            ("claim_foreign_queues", "foreign", sizes.queues, 10 * sizes.queues),
        ):
            with bench.ours.connect(bench.server) as conn, bench.ours.connect(bench.server) as other:
                conn.execute(bench.ours.clear)
                if count:
                    conn.execute(_ADD_QUEUED, {"task": task, "queues": queues, "count": count})
                if task == "noop":
                    _occupy(other, queues)
                bench.ours.settle(conn)
                bench.note(row, bench.ours, cost(conn, sizes.claims))


def _occupy(conn: psycopg.Connection[Any], queues: int) -> None:
    """Claim jobs until every queue runs one; they run until the session ends."""
    worker = register(conn)
    busy = 0
    while busy < queues:
        busy += conn.execute("select from pgworker.get_jobs(%s, %s)", [worker, queues]).rowcount


def cost(conn: psycopg.Connection[Any], claims: int, tasks: str = "{noop}") -> float:
    """Return the mean time of a claim in ms; what a session does at times and not with every claim is in it."""
    worker = register(conn)
    spent = 0.0
    for number in range(-20, claims):
        conn.execute("select from pgworker.add_job('noop')")
        begun = time.perf_counter()
        row = conn.execute("select id from pgworker.get_jobs(%s, 1, %s)", [worker, tasks]).fetchone()
        if number >= 0:
            spent += time.perf_counter() - begun
        if row is None:
            raise RuntimeError("a job that was just added was not claimed")
        conn.execute("select pgworker.complete_job(%s, %s)", [worker, row[0]])
    return spent / claims * 1000


def register(conn: psycopg.Connection[Any]) -> int:
    row = conn.execute("select pgworker.register_worker('bench')").fetchone()
    assert row is not None
    return int(row[0])
