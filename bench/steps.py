"""Where the microseconds of a job go in the database, beside what the least that could be done there takes.

The least is one insert, one update that touches no index, and one delete, in bulk, of a table that has the columns and
the indexes of the live jobs and nothing else: no rules, no checks, no triggers, nobody to share it with.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psycopg

from bench.claims import register
from bench.setting import Bench

#: As many as a worker's client claims and reports at once when there is much to do.
BATCH = 500

_BARE = "create temporary table bare (like pgworker.job including all)"
_INSERT = """
    insert into bare (id, run_at, created_at, task_identifier, payload)
    select n, now(), now(), 'noop', jsonb_build_object('id', n) from generate_series(1, %s) as n"""
_UPDATE = "update bare b set locked_at = now(), locked_by = 1, attempts = b.attempts + 1 where b.id = any (%s)"
_DELETE = "delete from bare b where b.id = any (%s)"
_SPECS = """
    create temporary table specs as
    select jsonb_agg(jsonb_build_object('identifier', 'noop', 'payload', jsonb_build_object('id', n))) as specs
    from generate_series(1, %s) as n"""
_ADD = "select from pgworker.add_jobs((select s.specs from specs s))"
_CLAIM = "select id from pgworker.get_jobs(%s, %s, '{noop}')"
_FINISH = "select count(*) from pgworker.finish_jobs(%s, %s, null, null, null)"


def steps(bench: Bench) -> None:
    """Take jobs from add to finish in batches, from one session without a worker, and rows through the same."""
    for _ in range(bench.runs):
        with bench.ours.connect(bench.server) as conn:
            conn.execute(bench.ours.clear)
            conn.execute(_BARE)
            bench.note("step_trip", bench.ours, _timed(_trips, conn, BATCH) / BATCH * 1e6)
            _rows(bench, conn)
            _jobs(bench, conn)


def _rows(bench: Bench, conn: psycopg.Connection[Any]) -> None:
    count = bench.sizes.jobs
    bench.note("step_insert", bench.ours, _timed(conn.execute, _INSERT, [count]) / count * 1e6)
    conn.execute("vacuum (analyze) bare")
    ids = list(range(1, count + 1))
    for row, query in (("step_update", _UPDATE), ("step_delete", _DELETE)):
        spent = 0.0
        for start in range(0, count, BATCH):
            batch = ids[start : start + BATCH]
            spent += _timed(conn.execute, query, [batch])
        bench.note(row, bench.ours, spent / count * 1e6)


def _jobs(bench: Bench, conn: psycopg.Connection[Any]) -> None:
    count = bench.sizes.jobs
    psycopg.ClientCursor(conn).execute(_SPECS, [count])
    bench.note("step_add", bench.ours, _timed(conn.execute, _ADD) / count * 1e6)
    bench.ours.settle(conn)
    worker = register(conn)
    claiming = finishing = 0.0
    for _ in range(0, count, BATCH):
        begun = time.perf_counter()
        ids = [row[0] for row in conn.execute(_CLAIM, [worker, BATCH])]
        claiming += time.perf_counter() - begun
        finishing += _timed(conn.execute, _FINISH, [worker, ids])
    bench.note("step_claim", bench.ours, claiming / count * 1e6)
    bench.note("step_finish", bench.ours, finishing / count * 1e6)
    left = conn.execute("select count(*) from pgworker.job").fetchone()
    assert left == (0,), left


def _trips(conn: psycopg.Connection[Any], count: int) -> None:
    for _ in range(count):
        conn.execute("select")


def _timed(call: Callable[..., object], *arguments: object) -> float:
    begun = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begun
