"""A database that was dumped and restored has every job in every state, and goes on where it was."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgworker_client.embedded import EmbeddedServer
from tests.calling import Conn, add, call, claim_ids, contents, register, rows, value
from tests.clock import move_clock
from tests.events.witness import Witness
from tests.invariants import assert_all_claimable, assert_consistent
from tests.lifecycle import STATES, job_in
from tests.restore.dumping import FORMATS, restoring
from tests.waiting import until

COPY = "pgworker_restored"

Restored = Callable[[str], Conn]


@pytest.fixture
def restored(server: EmbeddedServer, db: Conn, tmp_path: Path) -> Iterator[Restored]:
    """Dump the test's database in a format, restore it elsewhere, and connect to the copy."""
    with restoring(server, db.info.dbname, tmp_path, COPY) as take:
        yield take


def _sequences(conn: Conn) -> dict[str, tuple[Any, ...]]:
    names = [row["relname"] for row in rows(conn, _RELATIONS, "S")]
    return {name: conn.execute(f"select last_value, is_called from pgworker.{name}").fetchone() or () for name in names}


_RELATIONS = "select relname from pg_class where relnamespace = 'pgworker'::regnamespace and relkind = %s order by 1"


def _populate(conn: Conn) -> dict[str, int]:
    """Leave something in every table and every state; return what is worth knowing of it, by name."""
    known: dict[str, int] = {}
    conn.execute("insert into pgworker.setting values ('rescue_grace', '20 ms')")
    session, leased = register(conn, "by session"), register(conn, "by lease", "1 hour")
    for state in STATES:
        known[state] = job_in(conn, state, session, priority=-7)
        known[f"{state}, full"] = job_in(
            *(conn, state, leased),
            payload='{"text": "\\u00fc \\\\ \\" \\n \\t $$ ", "n": 1.50}',
            queue_name=f"queue of {state}" if state != "stopping" else None,
            max_attempts=7,
            job_key=f"key\t{state}\\N",
            flags=["a", 'b"{,}', "\\N"],
        )
    for state in ("running", "running, full", "stopping"):
        holder = leased if state.endswith("full") else session
        call(conn, "set_progress", holder, known[state], '{"half": true}')
    known["running, last attempt"] = job_in(conn, "running", session, max_attempts=1)
    known["behind the running one"] = add(conn, queue_name="queue of running")["id"]
    known["in the paused queue"] = add(conn, queue_name="paused")["id"]
    known["of the paused task"] = add(conn, "paused")["id"]
    known["completed by hand"] = add(conn, payload="[1, 2]")["id"]
    call(conn, "complete_jobs", [known["completed by hand"]])
    call(conn, "pause_queue", "paused")
    call(conn, "pause_task", "paused")
    call(conn, "configure_task", "limited", max_concurrency=1, backoff='["1 minute"]', fair=True, timeout="1 hour")
    known["limited, running"], known["limited"] = (add(conn, "limited", limit_key=key)["id"] for key in "ab")
    assert claim_ids(conn, session, 5, tasks=["limited"]) == [known["limited, running"]]
    call(conn, "forbid_flag", "forbidden")
    tree = {
        "identifier": "tree", "children": [
            {"identifier": "first", "name": "first", "priority": -20, "compensate": {"identifier": "\\N\t"}},
            {"identifier": "behind", "after": ["first"]},
            {"identifier": "half", "children": [{"identifier": "leaf", "priority": -20}, {"identifier": "leaf"}]},
        ],
    }  # fmt: skip
    known["half a tree"] = value(conn, "select id from pgworker.add_job_tree(%s::text::jsonb)", json.dumps(tree))
    (leaf,) = claim_ids(conn, session, tasks=["leaf"])
    call(conn, "complete_job", session, leaf, '{"n": 1}')
    conn.execute("insert into pgworker.unsettled (job_id, what) values (%s, 'release')", [known["half a tree"]])
    move_clock(conn, "2020-05-10 10:00+00")
    call(conn, "schedule_job", "every\t\\N", "*/10 * * * *", "scheduled", payload='{"text": "\\t\\\\N"}',
         backfill="2 hours", timezone="Europe/Berlin", queue_name="q", max_attempts=3, priority=-5,
         job_key="tick", job_key_mode="preserve_run_at", flags=["\\N", "b,{}"])  # fmt: skip
    call(conn, "schedule_job", "resting", "@daily", "resting")
    call(conn, "load_crontab", "0 4 * * * from_crontab")
    call(conn, "pause_schedule", "resting")
    move_clock(conn, "2020-05-10 10:10+00")
    call(conn, "maintain")
    move_clock(conn, "")
    known["never given out"] = value(conn, "select nextval('pgworker.job_id')")
    return known


@pytest.mark.parametrize("kind", FORMATS)
def test_a_restored_database_is_the_dumped_one_and_goes_on(db: Conn, restored: Restored, kind: str) -> None:
    known = _populate(db)
    for table, lines in contents(db).items():
        assert lines, f"nothing in {table}: the test would not see it lost"
    assert_consistent(db)
    copy = restored(kind)
    assert contents(copy) == contents(db)
    assert _sequences(copy) == _sequences(db)
    every_job = "select * from pgworker.jobs order by id"
    assert rows(copy, every_job) == rows(db, every_job)
    assert rows(copy, "select * from pgworker.schedules order by name") == rows(
        db, "select * from pgworker.schedules order by name"
    )
    assert_consistent(copy)

    # Limits still count what ran.
    assert rows(copy, "select * from pgworker.tasks order by 1") == rows(db, "select * from pgworker.tasks order by 1")
    asking = register(copy)
    assert claim_ids(copy, asking, 5, tasks=["limited"]) == []
    call(copy, "unregister_worker", asking)

    # Ids go on, for jobs and for workers, and the counters of turns and epochs too.
    assert add(copy)["id"] == known["never given out"] + 1
    assert register(copy) == value(db, "select max(id) from pgworker.worker") + 2  # one came above
    assert add(copy, job_key="key\tready\\N")["id"] == known["ready, full"]  # the unique index is there

    # Schedules go on where they were: nothing that has run runs again, nothing that is owed is forgotten.
    every_schedule = "select * from pgworker.schedules order by name"
    assert [row["last_tick"] is not None for row in rows(copy, every_schedule)] == [True, False, False]
    move_clock(copy, "2020-05-10 10:30:01+00")
    call(copy, "remove_job", "tick")
    call(copy, "maintain")
    (tick,) = rows(copy, "select run_at, revision from pgworker.jobs where key = 'tick'")
    assert (str(tick["run_at"]), tick["revision"]) == ("2020-05-10 10:20:00+00:00", 1)  # 10:20, kept by 10:30
    move_clock(copy, "")

    # The workers of the other database are not there: their jobs come back, except those that may not.
    hours = itertools.count(2)

    def rescued() -> bool:
        move_clock(copy, value(copy, "select (now() + %s * interval '1 hour')::text", next(hours)))
        call(copy, "maintain")
        return bool(value(copy, "select count(*) = 1 from pgworker.worker"))

    until(rescued, "the rescue of the jobs of both workers")
    assert_consistent(copy)
    states = {row["id"]: row["state"] for row in rows(copy, every_job)}
    expected = {
        "running": "ready",
        "running, full": "ready",
        "running, last attempt": "failed",
        "stopping": "cancelled",
        "stopping, full": "cancelled",
        "completed by hand": "completed",
    }
    for name in STATES:
        expected.setdefault(name, {"retrying": "scheduled"}.get(name, name))
    assert {name: states[known[name]] for name in expected} == expected
    assert value(copy, "select progress from pgworker.jobs where id = %s", known["running"]) == {"half": True}

    # Queues go on: the busy one with what it ran, then what was behind; what is paused stays paused.
    claimed = claim_ids(copy, register(copy), 100)
    assert known["running, full"] in claimed
    assert known["behind the running one"] not in claimed
    assert known["in the paused queue"] not in claimed
    assert known["of the paused task"] not in claimed
    copy.execute("select pgworker.force_unlock_workers(array(select id from pgworker.worker))")
    call(copy, "resume_queue", "paused")
    call(copy, "resume_task", "paused")
    everything = assert_all_claimable(copy)
    assert {known["in the paused queue"], known["of the paused task"], known["behind the running one"]} <= set(
        everything
    )
    # The original has noticed nothing of it.
    assert value(db, "select locked_by is not null from pgworker.job where id = %s", known["running"])


@pytest.mark.parametrize("kind", ["plain", "directory"])
def test_a_dump_taken_while_workers_work_is_consistent(
    db: Conn, connect: Callable[[], Conn], restored: Restored, kind: str
) -> None:
    stop = threading.Event()
    failed: list[BaseException] = []

    def work(conn: Conn, worker: int) -> None:
        try:
            while not stop.is_set():
                conn.execute(
                    "select pgworker.add_job('t', queue_name => 'q' || mod(n, 3), job_key => 'k' || mod(n, 9))"
                    " from generate_series(1, 10) n"
                )
                claimed = claim_ids(conn, worker, 5)
                conn.execute("select pgworker.finish_jobs(%s, %s, null, %s, null)", [worker, claimed[:2], claimed[2:]])
        except BaseException as error:  # looked at below
            failed.append(error)

    db.execute("select pgworker.add_job('t') from generate_series(1, 3000)")
    sessions = [connect() for _ in range(2)]
    threads = [threading.Thread(target=work, args=(conn, register(conn)), daemon=True) for conn in sessions]
    for thread in threads:
        thread.start()
    try:
        until(lambda: value(db, "select nextval('pgworker.turn') > 20"), "some work")
        copy = restored(kind)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not failed, failed
    assert_consistent(copy)
    highest = value(
        copy, "select greatest((select max(id) from pgworker.job), (select max(id) from pgworker.finished))"
    )
    assert add(copy)["id"] > highest
    copy.execute("select pgworker.force_unlock_workers(array(select id from pgworker.worker))")
    assert_all_claimable(copy)


def test_a_restored_extension_can_be_dropped_and_leaves_nothing(
    server: EmbeddedServer, db: Conn, restored: Restored
) -> None:
    if not server.has_extension:
        pytest.skip("this server has no CREATE EXTENSION pgworker")
    _populate(db)
    copy = restored("custom")
    copy.execute("drop extension pgworker")
    assert value(copy, "select to_regnamespace('pgworker') is null")


@pytest.mark.parametrize("kind", ["inserts", "directory"])
def test_events_are_published_again_after_a_restore(
    server: EmbeddedServer, db: Conn, restored: Restored, kind: str
) -> None:
    add(db)
    value(db, "select pgworker.publish_events(true)")
    copy = restored(kind)
    call(copy, "maintain")
    with psycopg.connect(copy.info.dsn, autocommit=True) as listener:
        witness = Witness(listener)
        job = add(copy)["id"]
        assert witness.heard(copy) == [(job, None, "ready")]
    if server.has_extension:
        copy.execute("drop extension pgworker")
    else:
        copy.execute("drop schema pgworker cascade")
    assert value(copy, "select to_regnamespace('pgworker') is null")
