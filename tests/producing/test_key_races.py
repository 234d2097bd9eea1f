"""add_job meeting a claim, a finish or another add_job on the same key: both orders end in a row of the table."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.calling import Conn, add, call, claim_ids, job_row, register, rows, seen, value
from tests.connections import Connections
from tests.sessions import Background

ADD = "select * from pgworker.add_job('new', '[2]', job_key := 'k', job_key_mode := %s)"
REPLACING = ["replace", "preserve_run_at"]


@pytest.mark.parametrize("mode", [*REPLACING, "unsafe_dedupe"])
def test_adding_while_the_job_is_being_claimed_meets_a_running_job(db: Conn, connect: Connections, mode: str) -> None:
    claimer, adder = connect(), connect()
    worker = register(claimer)
    old = add(db, "old", payload="[1]", job_key="k")["id"]
    claimer.execute("begin")
    (claimed,) = call(claimer, "get_jobs", worker)
    assert (claimed["id"], claimed["payload"]) == (old, [1])
    adding = Background(adder, ADD, mode)
    adding.wait_until_blocked(db)
    claimer.execute("commit")
    (job,) = adding.result()
    if mode == "unsafe_dedupe":
        assert (job["id"], job["state"], job["payload"], job["revision"]) == (old, "running", [1], 1)
    else:
        assert job["id"] > old
        assert (job["state"], job["payload"], job["key"]) == ("ready", [2], "k")  # nothing that was added is lost
        assert seen(db, old)["key"] is None


@pytest.mark.parametrize("mode", REPLACING)
def test_adding_while_a_claim_is_rolled_back_meets_a_pending_job(db: Conn, connect: Connections, mode: str) -> None:
    claimer, adder = connect(), connect()
    worker = register(claimer)
    old = add(db, "old", payload="[1]", job_key="k")["id"]
    claimer.execute("begin")
    assert claim_ids(claimer, worker) == [old]
    adding = Background(adder, ADD, mode)
    adding.wait_until_blocked(db)
    claimer.execute("rollback")
    (job,) = adding.result()
    assert (job["id"], job["payload"], job["attempts"], job["revision"]) == (old, [1, 2], 0, 1)
    assert [claimed["payload"] for claimed in call(claimer, "get_jobs", worker, 10)] == [[1, 2]]


@pytest.mark.parametrize("mode", REPLACING)
def test_a_claim_never_gets_a_job_that_is_being_replaced(db: Conn, connect: Connections, mode: str) -> None:
    claimer = connect()
    worker = register(claimer)
    old = add(db, "old", payload="[1]", job_key="k")["id"]
    with db.transaction():
        (job,) = rows(db, ADD, mode)
        assert job["id"] == old
        assert call(claimer, "get_jobs", worker, 10) == []  # neither the old payload, nor a wait
    (claimed,) = call(claimer, "get_jobs", worker, 10)
    assert (claimed["id"], claimed["payload"], claimed["task_identifier"]) == (old, [1, 2], "new")


@pytest.mark.parametrize("outcome", ["complete", "retry", "fail"])
@pytest.mark.parametrize("mode", [*REPLACING, "unsafe_dedupe"])
def test_adding_while_the_job_is_being_finished_sees_what_it_became(
    db: Conn, connect: Connections, mode: str, outcome: str
) -> None:
    finisher, adder = connect(), connect()
    worker = register(finisher)
    old = add(db, "old", payload="[1]", job_key="k")["id"]
    assert claim_ids(finisher, worker) == [old]
    finisher.execute("begin")
    if outcome == "complete":
        value(finisher, "select pgworker.complete_job(%s, %s)", worker, old)
    else:
        call(finisher, "fail_job", worker, old, "it broke", permanent=outcome == "fail")
    adding = Background(adder, ADD, mode)
    adding.wait_until_blocked(db)
    finisher.execute("commit")
    (job,) = adding.result()
    assert job["key"] == "k"
    if outcome == "retry":
        assert (job["id"], job["revision"]) == (old, 1)
        assert job["payload"] == ([1] if mode == "unsafe_dedupe" else [1, 2])
    else:
        assert (job["id"] > old, job["revision"], job["payload"]) == (True, 0, [2])


@pytest.mark.parametrize("commits", [True, False])
def test_two_that_add_the_same_new_key_end_in_one_job(db: Conn, connect: Connections, commits: bool) -> None:
    first, second = connect(), connect()
    first.execute("begin")
    one = add(first, "old", payload="[1]", job_key="k")
    adding = Background(second, ADD, "replace")
    adding.wait_until_blocked(db)
    first.execute("commit" if commits else "rollback")
    (job,) = adding.result()
    assert (job["id"] == one["id"]) is commits
    assert job["payload"] == ([1, 2] if commits else [2])
    assert rows(db, "select id from pgworker.jobs") == [{"id": job["id"]}]


def test_adding_while_the_job_is_being_removed_inserts_anew(db: Conn, connect: Connections) -> None:
    remover, adder = connect(), connect()
    old = add(db, "old", job_key="k")["id"]
    remover.execute("begin")
    call(remover, "remove_job", "k")
    adding = Background(adder, ADD, "replace")
    adding.wait_until_blocked(db)
    remover.execute("commit")
    (job,) = adding.result()
    assert job["id"] > old
    assert job_row(db, old) is None


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
@pytest.mark.parametrize("mode", [*REPLACING, "unsafe_dedupe"])
def test_a_key_that_the_snapshot_cannot_see_is_an_error_and_not_an_endless_loop(
    db: Conn, connect: Connections, mode: str, level: str
) -> None:
    adder = connect()
    adder.execute("set statement_timeout = '20s'")
    adder.execute(f"begin isolation level {level}")
    assert rows(adder, "select from pgworker.job") == []  # takes the snapshot
    old = add(db, "old", job_key="k")["id"]
    with pytest.raises(psycopg.errors.SerializationFailure):
        rows(adder, ADD, mode)
    adder.execute("rollback")
    assert rows(db, "select id, revision from pgworker.jobs") == [{"id": old, "revision": 0}]


def test_two_bulk_calls_with_the_same_keys_in_opposite_order_do_not_deadlock(db: Conn, connect: Connections) -> None:
    def specs(keys: list[str], task: str) -> str:
        return "[" + ",".join(f'{{"identifier": "{task}", "job_key": "{key}"}}' for key in keys) + "]"

    first, second = connect(), connect()
    for taken in (False, True):  # the second round meets live jobs, which are folded by other statements
        keys = [f"{taken}-{n}" for n in range(200)]
        if taken:
            call(db, "add_jobs", specs(keys, "old"))
        runs = [
            Background(first, "select id from pgworker.add_jobs(%s)", specs(keys, "one")),
            Background(second, "select id from pgworker.add_jobs(%s)", specs(keys[::-1], "two")),
        ]
        ids: list[list[Any]] = [[job["id"] for job in run.result()] for run in runs]
        assert sorted(ids[0]) == sorted(ids[1])
    assert value(db, "select count(*) from pgworker.jobs") == 400


def test_a_producer_does_not_wait_for_another_that_adds_to_the_same_queue(db: Conn, connect: Connections) -> None:
    other = connect()
    other.execute("begin")
    add(other, queue_name="q")
    db.execute("set lock_timeout = '2s'")
    add(db, queue_name="q")
    call(db, "add_jobs", '[{"identifier": "a", "queue_name": "q"}]')
    other.execute("rollback")
