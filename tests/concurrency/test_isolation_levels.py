"""REPEATABLE READ and SERIALIZABLE transactions get a right answer or are told to try again, never a wrong one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.connections import Connections
from tests.invariants import assert_consistent

Conn = psycopg.Connection[Any]

MODES = ("replace", "preserve_run_at", "unsafe_dedupe")
LEVELS = ("repeatable read", "serializable")


@pytest.fixture(params=LEVELS)
def strict(connect: Connections, request: pytest.FixtureRequest) -> Iterator[Conn]:
    """A session of that level; a statement that loops for ever would be ended."""
    level = request.param.replace(" ", "\\ ")
    conn = connect(autocommit=False, options=f"-cdefault_transaction_isolation={level} -cstatement_timeout=10s")
    yield conn
    conn.rollback()


def _jobs(conn: Conn) -> list[tuple[Any, ...]]:
    return conn.execute("select id, state, payload, key from pgworker.jobs order by id").fetchall()


_MEANWHILE = {
    "added": "select pgworker.add_job('other', '[9]', job_key => 'new')",
    "updated": "select pgworker.add_job('other', '[9]', job_key => 'pending')",
    "claimed": "select pgworker.get_jobs(%(worker)s, 100)",
    "completed": "select pgworker.complete_job(%(holder)s, %(running)s)",
    "failed": "select pgworker.fail_job(%(holder)s, %(running)s, 'broken')",
    "removed": "select pgworker.remove_job('pending')",
    "nothing": "select 1",
}


@pytest.mark.parametrize("mode", MODES)
def test_add_job_after_a_change_that_its_snapshot_does_not_show(db: Conn, strict: Conn, mode: str) -> None:
    tries_again = 0
    for meanwhile, key in itertools.product(_MEANWHILE, ["new", "pending", "running"]):
        tries_again += _add_job_after(meanwhile, key, mode, db, strict)
        db.execute("truncate pgworker.job, pgworker.finished, pgworker.queue, pgworker.worker, pgworker.notice")
    assert 0 < tries_again < 18  # both happen


def _add_job_after(meanwhile: str, key: str, mode: str, db: Conn, strict: Conn) -> bool:
    def value(query: str, *parameters: Any) -> Any:
        row = db.execute(query, parameters).fetchone()
        assert row is not None
        return row[0]

    holder = value("select pgworker.register_worker()")
    running = value("select id from pgworker.add_job('t', '[1]', job_key => 'running')")
    value("select id from pgworker.get_jobs(%s)", holder)
    value("select id from pgworker.add_job('t', '[1]', job_key => 'pending')")
    worker = value("select pgworker.register_worker()")
    strict.execute("select count(*) from pgworker.jobs")
    db.execute(_MEANWHILE[meanwhile].encode(), {"worker": worker, "holder": holder, "running": running})
    before = _jobs(db)
    try:
        added = strict.execute(
            "select id, state, payload, key from pgworker.add_job('t', '[2]', job_key => %s, job_key_mode => %s)",
            [key, mode],
        ).fetchone()
        strict.commit()
    except psycopg.errors.SerializationFailure:
        strict.rollback()
        assert meanwhile != "nothing"
        assert _jobs(db) == before
        return True
    assert added is not None
    assert None not in added
    # What it was told is what is there now, and nothing of what was there is gone.
    assert added in _jobs(db)
    assert added[3] == key
    assert {job[0] for job in before} <= {job[0] for job in _jobs(db)}
    if mode != "unsafe_dedupe" or key == "new":
        assert 2 in added[2]
    assert_consistent(db)
    return False


@pytest.mark.parametrize("queue", [None, "q"])
@pytest.mark.parametrize("ran_before", [False, True])
def test_get_jobs_after_a_claim_that_its_snapshot_does_not_show(
    db: Conn, strict: Conn, queue: str | None, ran_before: bool
) -> None:
    def add() -> None:
        db.execute("select pgworker.add_job('t', queue_name => %s) from generate_series(1, 4)", [queue])

    worker, other = db.execute("select pgworker.register_worker(), pgworker.register_worker()").fetchone() or (0, 0)
    if ran_before:
        add()
        while got := db.execute("select id from pgworker.get_jobs(%s, 100)", [worker]).fetchall():
            db.execute("select pgworker.finish_jobs(%s, %s, null, null, null)", [worker, [row[0] for row in got]])
    add()
    strict.execute("select count(*) from pgworker.jobs")
    taken = {row[0] for row in db.execute("select id from pgworker.get_jobs(%s, 2)", [worker])}
    assert len(taken) == (1 if queue else 2)
    try:
        got_too = {row[0] for row in strict.execute("select id from pgworker.get_jobs(%s, 100)", [other])}
        strict.commit()
    except psycopg.errors.SerializationFailure:
        strict.rollback()
    else:
        assert not taken & got_too
        assert not (queue and got_too), "two jobs of one queue"
    assert_consistent(db)
    # Tried again it is right.
    rest = {row[0] for row in strict.execute("select id from pgworker.get_jobs(%s, 100)", [other])}
    strict.commit()
    assert not taken & rest
    assert_consistent(db)


def test_finishing_a_job_that_was_taken_away_meanwhile_is_refused(db: Conn, strict: Conn) -> None:
    worker = (db.execute("select pgworker.register_worker()").fetchone() or (0,))[0]
    db.execute("select pgworker.add_job('t', queue_name => 'q')")
    (job,) = (row[0] for row in db.execute("select id from pgworker.get_jobs(%s)", [worker]))
    strict.execute("select count(*) from pgworker.jobs")
    db.execute("select pgworker.force_unlock_workers(array[%s::bigint])", [worker])
    with pytest.raises((psycopg.errors.SerializationFailure, psycopg.Error)) as refused:
        strict.execute("select pgworker.complete_job(%s, %s)", [worker, job])
    assert refused.value.sqlstate in ("40001", "PW001")
    strict.rollback()
    assert [row[:2] for row in _jobs(db)] == [(job, "ready")]
    assert_consistent(db)
