"""The last children of a parent, finished at the same moment in as many sessions, some of which roll back at first."""

from __future__ import annotations

import functools
import random
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.calling import Conn, claim_ids, register, rows, seen, value
from tests.invariants import assert_consistent
from tests.parallel import in_parallel

ENDS = {
    "complete": "select pgworker.complete_job(%(worker)s, %(job)s, '1')",
    "report": "select * from pgworker.finish_jobs(%(worker)s, array[%(job)s::bigint], null, null, null)",
    "give up": "select pgworker.fail_job(%(worker)s, %(job)s, 'broken', permanent => true)",
    "cancel": "select pgworker.cancel_jobs(array[%(job)s::bigint])",
    "delete": "delete from pgworker.job where id = %(job)s",
}


def _end(worker: int, job: int, chance: random.Random, conn: Conn) -> None:
    """End one child, after up to two attempts that are rolled back."""
    rolled_back = chance.choice([0, 0, 1, 2])
    how = chance.choice(list(ENDS))
    for attempt in range(rolled_back + 1):
        with conn.transaction(force_rollback=attempt < rolled_back):
            conn.execute(ENDS[how].encode(), {"worker": worker, "job": job})
            if how == "cancel":  # it runs: its worker says when it has stopped
                conn.execute(ENDS["complete"].encode(), {"worker": worker, "job": job})


@pytest.mark.parametrize(
    ("number", "where", "policy"),
    [
        (2, "children", "ignore"),
        (2, "children", "remove"),
        (2, "after", "ignore"),
        (2, "after", "remove"),
        (200, "children", "ignore"),
        (200, "after", "remove"),
    ],
)
def test_whoever_comes_last_releases_exactly_once_and_at_once(
    dsn: str, db: Conn, number: int, where: str, policy: str
) -> None:
    children: list[dict[str, Any]] = [
        {"identifier": "child", "name": f"c{n}", "on_failure": policy} for n in range(number)
    ]
    if where == "after":
        children.append({"identifier": "next", "after": [child["name"] for child in children]})
    tree = Jsonb({"identifier": "next" if where == "children" else "parent", "children": children})
    worker = register(db, lease="1 hour")
    for round in range(5 if number == 2 else 1):
        db.execute("select pgworker.add_job_tree(%s)", [tree])
        running = claim_ids(db, worker, 500)
        assert len(running) == number
        parts = [functools.partial(_end, worker, job, random.Random(job * 7 + round)) for job in running]
        in_parallel(dsn, parts, options="-cdeadlock_timeout=100ms")
        # No maintain() has been needed, and none is: one claim finds it, another finds nothing.
        assert rows(db, "select * from pgworker.unsettled") == []
        assert_consistent(db)
        (released,) = claim_ids(db, worker, 500)
        assert seen(db, released)["task_identifier"] == "next"
        assert claim_ids(db, worker, 500) == []
        db.execute("select pgworker.complete_job(%s, %s)", [worker, released])
        for parent in claim_ids(db, worker, 500):
            db.execute("select pgworker.complete_job(%s, %s)", [worker, parent])
        assert rows(db, "select * from pgworker.counter") == []
        assert_consistent(db)
    assert value(db, "select deadlocks from pg_stat_database where datname = current_database()") == 0


def _fail(worker: int, job: int, conn: Conn) -> None:
    try:
        conn.execute(ENDS["give up"].encode(), {"worker": worker, "job": job})
    except psycopg.Error as error:
        if error.sqlstate != "PW001":
            raise


@pytest.mark.parametrize("number", [2, 100])
def test_a_parent_whose_children_all_fail_at_once_fails_once(dsn: str, db: Conn, number: int) -> None:
    worker = register(db, lease="1 hour")
    child = {"identifier": "child"}
    middle = {"identifier": "middle", "children": [child] * (number // 2)}
    for _ in range(5 if number == 2 else 1):
        tree = {"identifier": "root", "children": [middle, middle, *[child] * number]}
        root = value(db, "select id from pgworker.add_job_tree(%s)", Jsonb(tree))
        running = claim_ids(db, worker, 500)
        assert len(running) == 2 * number
        in_parallel(dsn, [functools.partial(_fail, worker, job) for job in running], options="-cdeadlock_timeout=100ms")
        while rows(db, "select * from pgworker.unsettled"):
            db.execute("select pgworker.maintain()")
        assert_consistent(db)
        assert seen(db, root)["state"] == "failed"
        assert rows(db, "select * from pgworker.job") == []
        assert rows(db, "select * from pgworker.counter") == []
        states = {row["state"] for row in rows(db, "select state from pgworker.jobs where root_id = %s", root)}
        assert states <= {"failed", "cancelled"}
    assert value(db, "select deadlocks from pg_stat_database where datname = current_database()") == 0
