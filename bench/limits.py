"""What limits cost those that they do not concern and those that they do, and what turns among keys are worth."""

from __future__ import annotations

from typing import Any

import psycopg

from bench.claims import cost, register
from bench.setting import Bench

_ADD = """
    select from pgworker.add_jobs((
        select jsonb_agg(jsonb_build_object('identifier', 'limited', 'limit_key', %(key)s || n %% %(keys)s))
        from generate_series(1, %(count)s) as n))"""


def limits(bench: Bench) -> None:
    """Claim one job at a time: unlimited ones beside others that wait for their limits, then limited ones."""
    sizes = bench.sizes
    for _ in range(bench.runs):
        for row, setting, keys, count in (
            ("limit_none", "", 0, 0),
            ("limit_few", "max_concurrency => 1", 1, sizes.behind // 1000),
            ("limit_one", "max_concurrency => 1", 1, sizes.behind),
            ("limit_keys", "max_concurrency_per_key => 1", sizes.queues, 10 * sizes.queues),
        ):
            with bench.ours.connect(bench.server) as conn, bench.ours.connect(bench.server) as other:
                conn.execute(bench.ours.clear)
                if count:
                    conn.execute(f"select from pgworker.configure_task('limited', {setting})".encode())
                    conn.execute(_ADD, {"key": "key ", "keys": keys, "count": count})
                    worker = register(other)
                    while other.execute("select from pgworker.get_jobs(%s, 1000)", [worker]).rowcount:
                        pass
                bench.ours.settle(conn)
                bench.note(row, bench.ours, cost(conn, sizes.claims, "{noop,limited}"))
        with bench.ours.connect(bench.server) as conn:
            conn.execute(bench.ours.clear)
            conn.execute(
                "select from pgworker.configure_task('noop', max_concurrency => 50, max_concurrency_per_key => 5)"
            )
            bench.note("limit_own", bench.ours, cost(conn, sizes.claims))
            conn.execute(bench.ours.clear)


def fairness(bench: Bench) -> None:
    """Ten jobs of one key behind very many of another: how many are claimed until the tenth of them is."""
    for _ in range(bench.runs):
        for row, setting in (("fair_not", "max_concurrency => 100000"), ("fair", "fair => true")):
            with bench.ours.connect(bench.server) as conn:
                conn.execute(bench.ours.clear)
                conn.execute(f"select from pgworker.configure_task('limited', {setting})".encode())
                conn.execute(_ADD, {"key": "many ", "keys": 1, "count": bench.sizes.behind})
                conn.execute(_ADD, {"key": "few ", "keys": 1, "count": 10})
                bench.ours.settle(conn)
                bench.note(row, bench.ours, _until_served(conn))
                conn.execute(bench.ours.clear)


def _until_served(conn: psycopg.Connection[Any]) -> float:
    """Return how many jobs are claimed, in batches of ten, until the last of the few is among them."""
    worker = register(conn)
    last = conn.execute("select max(id) from pgworker.jobs").fetchone()
    claimed = 0
    while True:
        ids = [row[0] for row in conn.execute("select id from pgworker.get_jobs(%s, 10)", [worker])]
        claimed += len(ids)
        if last is not None and last[0] in ids:
            return claimed
        if not ids:
            raise RuntimeError("a job that is due was not claimed")
        conn.execute("select pgworker.finish_jobs(%s, %s, null, null, null)", [worker, ids])
