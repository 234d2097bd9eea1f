"""What is seen from outside: the view, its states, and when to look again."""

from __future__ import annotations

import pytest

from tests.calling import FUTURE, PAST, Conn, add, call, claim_ids, register, rows, seen, state, value
from tests.clock import move_clock
from tests.lifecycle import STATES, job_in, shown

COLUMNS = {
    "id": "bigint", "task_identifier": "text", "queue_name": "text", "state": "text", "payload": "jsonb",
    "priority": "integer", "run_at": "timestamp with time zone", "attempts": "integer", "max_attempts": "integer",
    "last_error": "text", "key": "text", "revision": "integer", "flags": "text[]", "parent_id": "bigint",
    "root_id": "bigint", "name": "text", "on_failure": "text", "progress": "jsonb", "result": "jsonb",
    "locked_at": "timestamp with time zone", "locked_by": "bigint", "created_at": "timestamp with time zone",
    "finished_at": "timestamp with time zone", "started_at": "timestamp with time zone",
}  # fmt: skip


def columns(conn: Conn, relation: str) -> dict[str, str]:
    found = rows(
        conn,
        "select attname, format_type(atttypid, atttypmod) as type from pg_attribute "
        "where attrelid = %s::regclass and attnum > 0 order by attnum",
        relation,
    )
    return {column["attname"]: column["type"] for column in found}


def test_the_columns_that_people_rely_on_keep_place_and_type(tx: Conn) -> None:
    found = columns(tx, "pgworker.jobs")
    assert list(found.items())[: len(COLUMNS)] == list(COLUMNS.items())  # new ones are appended
    claimed = [*columns(tx, "pgworker.claimed_job").items()]
    assert claimed[:14] == [
        ("id", "bigint"), ("task_identifier", "text"), ("payload", "jsonb"), ("attempts", "integer"),
        ("max_attempts", "integer"), ("queue_name", "text"), ("priority", "integer"),
        ("run_at", "timestamp with time zone"), ("key", "text"), ("flags", "text[]"), ("parent_id", "bigint"),
        ("root_id", "bigint"), ("progress", "jsonb"), ("created_at", "timestamp with time zone"),
    ]  # fmt: skip


def test_whatever_returns_jobs_returns_the_views_row(tx: Conn) -> None:
    found = rows(
        tx,
        "select distinct prorettype::regtype::text as type from pg_proc where pronamespace = 'pgworker'::regnamespace "
        "and proname in ('add_job', 'add_jobs', 'remove_job', 'complete_jobs', 'permanently_fail_jobs', "
        "'reschedule_jobs', 'retry_jobs', 'cancel_jobs', 'force_unlock_workers', 'fail_job', 'cancel_job')",
    )
    assert found == [{"type": "pgworker.jobs"}]


@pytest.mark.parametrize("state_", STATES)
def test_a_job_is_shown_once_in_its_state(tx: Conn, state_: str) -> None:
    job = job_in(tx, state_, queue_name="q", payload='{"n": 1}', job_key="k", priority=3, flags=["x"], max_attempts=4)
    found = seen(tx, job)
    assert found["state"] == shown(state_)
    assert (found["queue_name"], found["payload"], found["key"], found["priority"], found["flags"]) == (
        "q", {"n": 1}, "k", 3, ["x"],
    )  # fmt: skip
    assert (found["locked_by"] is not None) == (found["locked_at"] is not None) == (shown(state_) == "running")
    assert (found["finished_at"] is not None) == (state_ in ("completed", "failed", "cancelled"))


def test_a_scheduled_job_becomes_ready_by_time_alone(tx: Conn) -> None:
    job = add(tx, run_at="2030-01-01 00:00+00")["id"]
    move_clock(tx, "2029-12-31 23:59:59.999999+00")
    assert state(tx, job) == "scheduled"
    move_clock(tx, "2030-01-01 00:00+00")
    assert state(tx, job) == "ready"
    assert claim_ids(tx, register(tx)) == [job]


def test_nobody_moves_the_clock_unless_the_database_allows_it(tx: Conn) -> None:
    job = add(tx, run_at="2090-01-01")["id"]
    tx.execute("set local pgworker.fake_now = '2099-01-01'")
    assert state(tx, job) == "scheduled"
    assert claim_ids(tx, register(tx), 10) == []
    for setting in ("off", "ON", ""):
        tx.execute(
            "insert into pgworker.setting values ('allow_fake_now', %s) "
            "on conflict (name) do update set value = excluded.value",
            [setting],
        )
        assert state(tx, job) == "scheduled"


def test_a_blocked_job_is_waiting_whatever_its_time_and_is_not_claimed(tx: Conn) -> None:
    ids = [add(tx)["id"], add(tx, run_at=FUTURE)["id"], add(tx, queue_name="q")["id"]]
    tx.execute("update pgworker.job set waiting = true")
    assert [state(tx, job) for job in ids] == ["waiting"] * 3
    assert claim_ids(tx, register(tx), 10) == []
    assert value(tx, "select pgworker.next_run_at()") is None


@pytest.mark.parametrize("queued", [False, True])
def test_a_sleeper_is_told_when_the_next_scheduled_job_is_due(tx: Conn, queued: bool) -> None:
    queue = "q" if queued else None
    assert value(tx, "select pgworker.next_run_at()") is None
    add(tx, "due", queue_name=queue)
    add(tx, "past", run_at=PAST, queue_name=queue)
    assert value(tx, "select pgworker.next_run_at()") is None  # what is due now is claimed, not waited for
    add(tx, "a", run_at="2101-01-01 00:00+00", priority=-5, queue_name=queue)
    add(tx, "b", run_at="2102-01-01 00:00+00", priority=5, queue_name=queue)
    add(tx, "a", run_at="2103-01-01 00:00+00", queue_name=queue)

    def year(tasks: list[str] | None) -> int | None:
        found: int | None = value(tx, "select extract(year from pgworker.next_run_at(%s))::int", tasks)
        return found

    assert year(None) == 2101
    assert year(["b"]) == 2102
    assert year(["a", "b"]) == 2101
    assert year(["nothing"]) is None
    assert year([]) is None
    worker = register(tx)
    move_clock(tx, "2101-06-01 00:00+00")
    assert year(None) == 2102
    assert len(claim_ids(tx, worker, 10)) == (1 if queued else 3)
    assert year(["a"]) == 2103


def test_a_retry_that_backs_off_is_waited_for(tx: Conn) -> None:
    job = job_in(tx, "retrying")
    assert value(tx, "select pgworker.next_run_at()") == seen(tx, job)["run_at"]


def test_behind_a_thousand_foreign_jobs_the_answer_is_early_but_never_late(tx: Conn) -> None:
    tx.execute(
        "select pgworker.add_job('foreign', run_at := '2100-01-01'::timestamptz + n * interval '1 hour') "
        "from generate_series(1, 1500) n"
    )
    add(tx, "mine", run_at="2110-01-01")
    found = value(tx, "select pgworker.next_run_at(array['mine'])")
    assert found is not None
    assert value(tx, "select %s::timestamptz between '2100-01-01' and '2110-01-01'", found)


def test_what_is_asked_of_the_queue_changes_nothing(tx: Conn) -> None:
    add(tx)
    before = rows(tx, "select xmin, ctid from pgworker.job")
    call(tx, "next_run_at", ["a"])
    rows(tx, "select * from pgworker.jobs")
    call(tx, "version")
    assert rows(tx, "select xmin, ctid from pgworker.job") == before
