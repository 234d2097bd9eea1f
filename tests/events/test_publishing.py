"""Every change of a job's state is told once, at commit, to whoever listens, and only while somebody wants it."""

from __future__ import annotations

import json
from collections.abc import Callable

import psycopg
import pytest

from tests.calling import FUTURE, PAST, Conn, add, call, claim_ids, refused, register, rows, value, values
from tests.connections import Connections
from tests.events.witness import Event, Witness, publish
from tests.plans.explained import Explained, nodes
from tests.trees.planting import node, plant

TRIGGERS = "select tgname from pg_trigger where tgname like 'publish%' order by tgname"


@pytest.fixture
def witness(db: Conn, connect: Connections) -> Witness:
    publish(db)
    return Witness(connect())


def test_an_event_is_an_object_of_four(db: Conn, witness: Witness) -> None:
    job = add(db, 'a "quoted" täsk')["id"]
    (payload,) = witness.payloads(db)
    assert json.loads(payload) == {"id": job, "task": 'a "quoted" täsk', "from": None, "to": "ready"}


def test_a_job_of_which_nothing_is_kept_is_told_to_have_failed(db: Conn, witness: Witness) -> None:
    call(db, "configure", "keep_failed", "0")
    worker = register(db)
    job = add(db, "a")["id"]
    claim_ids(db, worker)
    witness.payloads(db)
    call(db, "fail_job", worker, job, "e", permanent=True)
    assert [json.loads(payload)["to"] for payload in witness.payloads(db)] == ["failed"]
    call(db, "maintain")
    assert rows(db, "select * from pgworker.jobs") == []


def _finish(db: Conn, worker: int, job: int) -> None:
    call(db, "finish_jobs", worker, [job], None, [], [])


ACTS: dict[str, tuple[str, Callable[[Conn, int, int], object], list[tuple[str | None, str | None]]]] = {
    "claim": ("ready", lambda db, worker, job: claim_ids(db, worker), [("ready", "running")]),
    "due meanwhile": ("due", lambda db, worker, job: claim_ids(db, worker), [("ready", "running")]),
    "complete_job": (
        "running", lambda db, worker, job: call(db, "complete_job", worker, job), [("running", "completed")],
    ),
    "with a result": (
        "running", lambda db, worker, job: call(db, "complete_job", worker, job, "1"), [("running", "completed")],
    ),
    "finish_jobs": ("running", _finish, [("running", "completed")]),
    "finish_jobs, failed": (
        "running",
        lambda db, worker, job: call(db, "finish_jobs", worker, [], None, [job], ["it broke"]),
        [("running", "scheduled")],
    ),
    "fail_job": ("running", lambda db, worker, job: call(db, "fail_job", worker, job, "e"), [("running", "scheduled")]),
    "retry at once": (
        "running",
        lambda db, worker, job: call(db, "fail_job", worker, job, "e", retry_at=PAST),
        [("running", "ready")],
    ),
    "failed for good": (
        "running",
        lambda db, worker, job: call(db, "fail_job", worker, job, "e", permanent=True),
        [("running", "failed")],
    ),
    "cancel_job": ("running", lambda db, worker, job: call(db, "cancel_job", worker, job), [("running", "cancelled")]),
    "release_jobs": (
        "running", lambda db, worker, job: call(db, "release_jobs", worker, [job]), [("running", "ready")],
    ),
    "force_unlock_workers": (
        "running", lambda db, worker, job: call(db, "force_unlock_workers", [worker]), [("running", "ready")],
    ),
    "unregister_worker": (
        "running", lambda db, worker, job: call(db, "unregister_worker", worker), [("running", "ready")],
    ),
    "set_progress": ("running", lambda db, worker, job: call(db, "set_progress", worker, job, "1"), []),
    "asked to stop": ("running", lambda db, worker, job: call(db, "cancel_jobs", [job]), []),
    "cancel_jobs": ("ready", lambda db, worker, job: call(db, "cancel_jobs", [job]), [("ready", "cancelled")]),
    "complete_jobs": ("ready", lambda db, worker, job: call(db, "complete_jobs", [job]), [("ready", "completed")]),
    "complete_jobs, failed": (
        "failed", lambda db, worker, job: call(db, "complete_jobs", [job]), [("failed", "completed")],
    ),
    "permanently_fail_jobs": (
        "ready", lambda db, worker, job: call(db, "permanently_fail_jobs", [job]), [("ready", "failed")],
    ),
    "retry_jobs": ("failed", lambda db, worker, job: call(db, "retry_jobs", [job]), [("failed", "ready")]),
    "reschedule_jobs": (
        "ready",
        lambda db, worker, job: call(db, "reschedule_jobs", [job], run_at=FUTURE),
        [("ready", "scheduled")],
    ),
    "priority only": ("ready", lambda db, worker, job: call(db, "reschedule_jobs", [job], priority=1), []),
    "failed, rescheduled": (
        "failed",
        lambda db, worker, job: call(db, "reschedule_jobs", [job], run_at=FUTURE, attempts=0),
        [("failed", "scheduled")],
    ),
    "replaced by its key": (
        "ready", lambda db, worker, job: add(db, "a", job_key="k", run_at=FUTURE), [("ready", "scheduled")],
    ),
    "remove_job": ("ready", lambda db, worker, job: call(db, "remove_job", "k"), [("ready", None)]),
    "a plain delete": (
        "running", lambda db, worker, job: db.execute("delete from pgworker.job"), [("running", None)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("act", list(ACTS))
def test_each_function_tells_what_it_changes_and_nothing_else(db: Conn, witness: Witness, act: str) -> None:
    begin, do, expected = ACTS[act]
    worker = register(db)
    job = add(db, "a", job_key="k", **({"run_at": "now"} if begin == "due" else {}))["id"]
    if begin in ("running", "failed"):
        assert claim_ids(db, worker) == [job]
    if begin == "failed":
        call(db, "fail_job", worker, job, "it broke", permanent=True)
    witness.heard(db)
    do(db, worker, job)
    assert witness.heard(db) == [(job, *change) for change in expected]


def test_many_changes_of_one_statement_are_told_one_by_one(db: Conn, witness: Witness) -> None:
    ids = values(db, """select id from pgworker.add_jobs((select jsonb_agg('{"identifier": "a"}'::jsonb)
                                                          from generate_series(1, 3000)))""")  # fmt: skip
    assert witness.heard(db) == [(id, None, "ready") for id in ids]
    worker = register(db)
    assert claim_ids(db, worker, 3000) == ids
    assert witness.heard(db) == [(id, "ready", "running") for id in ids]
    call(db, "finish_jobs", worker, ids[:2000], None, ids[2000:], None)
    told = witness.heard(db)
    assert sorted(told) == [(id, "running", "completed" if id <= ids[1999] else "scheduled") for id in ids]


def test_old_and_new_rows_of_a_big_statement_do_not_meet_in_a_square(db: Conn, witness: Witness) -> None:
    worker = register(db)
    values(db, "select (pgworker.add_job('a')).id from generate_series(1, 300)")
    explained = Explained(db)
    ids = claim_ids(db, worker, 300)
    assert len(ids) == 300
    claimed = explained.of("from was w join became b")
    explained.forget()
    call(db, "finish_jobs", worker, [], None, ids, None)
    for plan in (claimed, explained.of("from was w join became b")):
        joins = [
            node["Node Type"] for node in nodes(plan) if "Join" in node["Node Type"] or "Loop" in node["Node Type"]
        ]
        assert joins == ["Hash Join"]
    assert len(witness.heard(db)) == 900


def test_a_job_that_goes_the_same_way_twice_in_a_transaction_is_told_twice(db: Conn, witness: Witness) -> None:
    worker, job = register(db), add(db)["id"]
    witness.heard(db)
    with db.transaction():
        for _ in range(20):
            assert claim_ids(db, worker) == [job]
            call(db, "release_jobs", worker, [job])
    there_and_back: list[Event] = [(job, "ready", "running"), (job, "running", "ready")]
    assert witness.heard(db) == there_and_back * 20


def test_what_is_rolled_back_is_not_told(db: Conn, witness: Witness) -> None:
    with db.transaction() as outer:
        kept = add(db)["id"]
        with db.transaction(force_rollback=True):
            add(db)
        also = add(db)["id"]
        assert outer is not None
    assert witness.heard(db) == [(kept, None, "ready"), (also, None, "ready")]


def test_what_follows_from_an_end_is_told_after_it(db: Conn, witness: Witness) -> None:
    ids = plant(db, node("root", node("one"), node("two", on_failure="remove")))
    assert sorted(witness.heard(db)) == [(ids["root"], None, "waiting"), (ids["one"], None, "ready"),
                                         (ids["two"], None, "ready")]  # fmt: skip
    worker = register(db)
    for name, end in (("one", "complete_job"), ("two", "fail_job")):
        assert claim_ids(db, worker, tasks=[name]) == [ids[name]]
        witness.heard(db)
        call(db, end, worker, ids[name], *([] if name == "one" else ["e", None, True]))
    assert witness.heard(db) == [(ids["two"], "running", "failed"), (ids["root"], "waiting", "ready")]
    call(db, "cancel_jobs", [ids["root"]])
    assert witness.heard(db) == [(ids["root"], "ready", "cancelled")]


def test_rescued_jobs_are_told(db: Conn, witness: Witness) -> None:
    worker = register(db, lease="1 hour")
    jobs = [add(db)["id"], add(db, max_attempts=1)["id"]]
    claim_ids(db, worker, 2)
    db.execute("update pgworker.worker set lease_until = '-infinity'")
    witness.heard(db)
    call(db, "maintain")
    assert sorted(witness.heard(db)) == [(jobs[0], "running", "ready"), (jobs[1], "running", "failed")]


def test_what_is_forgotten_when_its_time_is_over_is_not_told(db: Conn, witness: Witness) -> None:
    call(db, "complete_jobs", [add(db)["id"]])
    db.execute("update pgworker.finished set keep_until = '2000-01-01'")
    witness.heard(db)
    call(db, "maintain")
    assert rows(db, "select * from pgworker.jobs") == []
    assert witness.heard(db) == []


def test_a_producer_and_a_worker_without_other_rights_are_told_of_too(
    db: Conn, witness: Witness, connect: Connections, role: Callable[..., str]
) -> None:
    call(db, "grant_worker", role("shop"))
    shop = connect(user="shop")
    worker, job = register(shop), add(shop)["id"]
    assert claim_ids(shop, worker) == [job]
    call(shop, "fail_job", worker, job, "it broke", permanent=True)
    assert witness.heard(db) == [(job, None, "ready"), (job, "ready", "running"), (job, "running", "failed")]


def test_as_long_as_nobody_wants_events_there_is_not_even_a_trigger(db: Conn, connect: Connections) -> None:
    witness = Witness(connect())
    add(db)
    assert values(db, TRIGGERS) == []
    for _ in range(2):
        publish(db)
    assert len(values(db, TRIGGERS)) == 4
    assert value(db, "select value from pgworker.setting where name = 'publish_events'") == "on"
    for _ in range(2):
        publish(db, enabled=False)
    add(db)
    assert values(db, TRIGGERS) == []
    assert witness.heard(db) == []


def test_events_are_switched_within_a_transaction_that_adds_jobs(db: Conn, connect: Connections) -> None:
    witness = Witness(connect())
    with db.transaction():
        add(db)
        publish(db)
        second = add(db)["id"]
    assert witness.heard(db) == [(second, None, "ready")]


def test_neither_on_nor_off_is_refused(db: Conn) -> None:
    with refused(db, "22004", "enabled"):
        publish(db, enabled=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_producer_in_an_open_transaction_is_not_waited_for_for_ever(
    db: Conn, connect: Connections, enabled: bool
) -> None:
    publish(db, enabled=not enabled)
    with connect(autocommit=False) as producer:
        add(producer)
        with refused(db, "55P03", "could not be switched", hint="open"):
            publish(db, enabled=enabled)
        producer.commit()
    publish(db, enabled=enabled)
    assert bool(values(db, TRIGGERS)) is enabled


def test_only_the_owner_switches_events(db: Conn, connect: Connections, role: Callable[..., str]) -> None:
    name = role("shop")
    for grant in ("grant_worker", "grant_observer"):
        call(db, grant, name)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        publish(connect(user=name))


def test_the_triggers_follow_the_setting_as_soon_as_nobody_holds_the_jobs(db: Conn, connect: Connections) -> None:
    witness = Witness(connect())
    db.execute("insert into pgworker.setting values ('publish_events', 'on')")  # as a restore does
    with connect(autocommit=False) as producer:
        add(producer)
        call(db, "maintain")
        assert values(db, TRIGGERS) == []
        producer.commit()
    call(db, "maintain")
    job = add(db)["id"]
    assert witness.heard(db) == [(job, None, "ready")]
    db.execute("delete from pgworker.setting where name = 'publish_events'")
    call(db, "maintain")
    assert values(db, TRIGGERS) == []
