"""Statistics that say "empty", as an analyze under a long transaction leaves them, do not turn look-ups into scans.

Counted in index entries read, not in seconds: a plan that goes through the whole table for every id reads millions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.calling import Conn, call, claim_ids, register, rows, value
from tests.connections import Connections

COUNT = 1000


def entries_read(conn: Conn) -> int:
    """Return how many index entries of the tables of jobs this database has read so far."""
    conn.execute("select pg_stat_force_next_flush()")
    read: int = value(
        conn, "select sum(idx_tup_read + 0)::bigint from pg_stat_user_indexes where schemaname = 'pgworker'"
    )
    return read


def finish(conn: Conn, worker: int, ids: list[int]) -> None:
    rows(conn, "select * from pgworker.finish_jobs(%s, %s, null, null, null)", worker, ids)


def finish_with_results(conn: Conn, worker: int, ids: list[int]) -> None:
    results = ["1"] * len(ids)
    rows(conn, "select * from pgworker.finish_jobs(%s, %s, %s::jsonb[], null, null)", worker, ids, results)


def fail(conn: Conn, worker: int, ids: list[int]) -> None:
    rows(conn, "select * from pgworker.finish_jobs(%s, null, null, %s, null)", worker, ids)


def release(conn: Conn, worker: int, ids: list[int]) -> None:
    call(conn, "release_jobs", worker, ids)


def cancel(conn: Conn, worker: int, ids: list[int]) -> None:
    call(conn, "cancel_jobs", ids)
    call(conn, "heartbeat", worker)


def unlock(conn: Conn, worker: int, ids: list[int]) -> None:
    assert len(call(conn, "force_unlock_workers", [worker])) == len(ids)


def leave(conn: Conn, worker: int, ids: list[int]) -> None:
    call(conn, "unregister_worker", worker)


@pytest.mark.parametrize("end", [finish, finish_with_results, fail, release, cancel, unlock, leave])
@pytest.mark.parametrize("queued", [False, True])
def test_jobs_are_looked_up_one_by_one(
    db: Conn, connect: Connections, end: Callable[[Conn, int, list[int]], None], queued: bool
) -> None:
    if value(db, "show server_version_num")[:2] == "14":
        pytest.skip("pg_stat_force_next_flush() is there from 15 on")
    name: Any = "'queue_name', 'q' || n" if queued else "'flags', null"
    adding = f"""select count(*) from pgworker.add_jobs((
        select jsonb_agg(jsonb_build_object('identifier', 'a', {name})) from generate_series(1, {3 * COUNT}) n))"""
    holder = connect()
    holder.execute("begin isolation level repeatable read")
    holder.execute("select count(*) from pg_class")
    db.execute(adding)
    db.execute("delete from pgworker.job")
    db.execute("vacuum analyze pgworker.job, pgworker.queue, pgworker.finished")
    assert value(db, "select reltuples from pg_class where oid = 'pgworker.job'::regclass") == 0

    conn = connect()
    worker = register(conn)
    conn.execute(adding)
    ids: list[int] = []
    while len(ids) < COUNT:
        ids += claim_ids(conn, worker, COUNT - len(ids))
    before = entries_read(conn)
    end(conn, worker, ids)
    assert entries_read(conn) - before < 40 * COUNT
    holder.rollback()
