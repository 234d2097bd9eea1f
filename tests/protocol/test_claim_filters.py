"""Which jobs a claim may take: tasks, flags, how many, for whom; what is paused."""

from __future__ import annotations

import pytest

from tests.calling import Conn, add, call, claim_ids, contents, refused, register, seen
from tests.connections import Connections
from tests.sessions import Background
from tests.waiting import until

QUEUED = pytest.mark.parametrize("queued", [False, True])


def jobs(conn: Conn, queued: bool, *identifiers: str) -> list[int]:
    """Add a job per identifier, each in a queue of its own if they are to be queued."""
    return [
        add(conn, identifier, queue_name=f"q{n}" if queued else None)["id"] for n, identifier in enumerate(identifiers)
    ]


@QUEUED
def test_no_task_list_means_every_task_and_an_empty_one_none(tx: Conn, queued: bool) -> None:
    worker = register(tx)
    a, b = jobs(tx, queued, "a", "b")
    assert claim_ids(tx, worker, 10, tasks=[]) == []
    assert claim_ids(tx, worker, 10, tasks=None) == [a, b]


@QUEUED
def test_only_the_tasks_of_the_list_are_claimed(tx: Conn, queued: bool) -> None:
    worker = register(tx)
    a, b, c, a2 = jobs(tx, queued, "a", "b", "c", "a")
    assert claim_ids(tx, worker, 10, tasks=["a", "c"]) == [a, c, a2]
    assert claim_ids(tx, worker, 10, tasks=["a", "c"]) == []
    assert claim_ids(tx, worker, 10, tasks=["A", "", "nothing", None, "b"]) == [b]


@QUEUED
def test_what_was_passed_over_for_one_list_is_there_for_the_next_at_once(tx: Conn, queued: bool) -> None:
    worker = register(tx)
    a, b, c = jobs(tx, queued, "a", "b", "c")
    assert claim_ids(tx, worker, tasks=["c"]) == [c]
    assert claim_ids(tx, worker, tasks=["b"]) == [b]
    assert claim_ids(tx, worker) == [a]


@QUEUED
def test_a_job_with_any_forbidden_flag_is_passed_over_and_one_without_flags_never(tx: Conn, queued: bool) -> None:
    worker = register(tx)
    flags = [None, [], ["x"], ["y"], ["x", "y"], ["z"]]
    none, empty, x, y, xy, z = (
        add(tx, flags=given, queue_name=f"q{n}" if queued else None)["id"] for n, given in enumerate(flags)
    )
    assert claim_ids(tx, worker, 10, forbidden_flags=["x", "y", "unknown"]) == [none, empty, z]
    assert claim_ids(tx, worker, 10, forbidden_flags=["y"]) == [x]
    assert claim_ids(tx, worker, 10, forbidden_flags=[]) == [y, xy]


@QUEUED
def test_forbidden_flags_that_are_null_forbid_nothing(tx: Conn, queued: bool) -> None:
    worker = register(tx)
    ids = [add(tx, flags=["x"], queue_name="q" if queued else None)["id"], add(tx)["id"]]
    assert claim_ids(tx, worker, 10, forbidden_flags=None) == ids


def test_null_among_the_forbidden_flags_hides_no_job(tx: Conn) -> None:
    worker = register(tx)
    plain, flagged = add(tx)["id"], add(tx, flags=["x"])["id"]
    assert claim_ids(tx, worker, 10, forbidden_flags=[None, "y"]) == [plain, flagged]


@pytest.mark.parametrize("max_jobs", [0, -1, None])
def test_fewer_than_one_job_cannot_be_asked_for(tx: Conn, max_jobs: int | None) -> None:
    worker = register(tx)
    add(tx)
    shown = "null" if max_jobs is None else max_jobs
    with refused(tx, "22023", f"max_jobs must be at least 1, got {shown}"):
        call(tx, "get_jobs", worker, max_jobs)


def test_more_can_be_asked_for_than_there_are(tx: Conn) -> None:
    worker = register(tx)
    ids = jobs(tx, False, "a", "a") + jobs(tx, True, "a", "a")
    assert claim_ids(tx, worker, 2**31 - 1) == ids


@pytest.mark.parametrize("worker", [0, -1, 2**62, None])
def test_a_worker_that_nobody_registered_gets_nothing(tx: Conn, worker: int | None) -> None:
    add(tx)
    for function in ("get_jobs", "get_job"):
        with refused(tx, "PW002", f"worker {'null' if worker is None else worker} is unknown", hint="register"):
            call(tx, function, worker)


def test_nobody_gets_a_job_twice(tx: Conn) -> None:
    one, two = register(tx), register(tx)
    ids = jobs(tx, False, *"aaa") + jobs(tx, True, *"aaa")
    assert claim_ids(tx, one, 4) + claim_ids(tx, two, 9) == ids
    assert claim_ids(tx, one, 9) == claim_ids(tx, two, 9) == []


@QUEUED
def test_a_claim_never_waits_for_another_and_gets_the_next_jobs(db: Conn, connect: Connections, queued: bool) -> None:
    other = connect()
    one, two = register(db), register(other)
    ids = jobs(db, queued, *"aaaaaa")
    other.execute("set lock_timeout = '2s'")
    with db.transaction():
        assert claim_ids(db, one, 2) == ids[:2]
        assert claim_ids(other, two, 2) == ids[2:4]
    assert claim_ids(other, two, 9) == ids[4:]


def test_a_claim_never_waits_for_whoever_changes_a_job(db: Conn, connect: Connections) -> None:
    other = connect()
    worker = register(other)
    locked, free = add(db)["id"], add(db)["id"]
    other.execute("set lock_timeout = '2s'")
    with db.transaction(force_rollback=True):
        call(db, "cancel_jobs", [locked])
        assert claim_ids(other, worker, 9) == [free]
    assert claim_ids(other, worker, 9) == [locked]  # at once: there was nothing else to claim


@QUEUED
def test_a_paused_task_loses_nothing_and_hides_nothing(tx: Conn, queued: bool) -> None:
    worker = register(tx)
    a, b, a2 = jobs(tx, queued, "a", "b", "a")
    call(tx, "pause_task", "a")
    assert claim_ids(tx, worker, 10) == [b]
    assert claim_ids(tx, worker, 10) == []
    assert [seen(tx, job)["state"] for job in (a, a2)] == ["ready", "ready"]
    a3 = add(tx, "a")["id"]
    assert claim_ids(tx, worker, 10) == []
    call(tx, "resume_task", "a")
    claimed: list[int] = []

    def all_claimed() -> bool:
        claimed.extend(claim_ids(tx, worker, 10))
        return len(claimed) == 3

    until(all_claimed, "the resumed jobs")
    assert sorted(claimed) == [a, a2, a3]


def test_a_paused_queue_loses_nothing_and_hides_nothing(tx: Conn) -> None:
    worker = register(tx)
    call(tx, "pause_queue", "q")  # before it has run anything
    first, second = (add(tx, queue_name="q")["id"] for _ in range(2))
    other, plain = add(tx, queue_name="r")["id"], add(tx)["id"]
    assert claim_ids(tx, worker, 10) == [other, plain]
    assert claim_ids(tx, worker, 10) == []
    call(tx, "resume_queue", "q")
    assert claim_ids(tx, worker, 10) == [first]
    call(tx, "pause_queue", "q")
    assert seen(tx, first)["state"] == "running"  # what runs goes on
    call(tx, "complete_job", worker, first)
    assert claim_ids(tx, worker, 10) == []
    call(tx, "resume_queue", "q")
    assert claim_ids(tx, worker, 10) == [second]


def test_pausing_twice_is_undone_by_resuming_once(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx, "a", queue_name="q")["id"]
    for _ in range(2):
        call(tx, "pause_task", "a")
        call(tx, "pause_queue", "q")
    call(tx, "resume_task", "a")
    assert claim_ids(tx, worker) == []
    call(tx, "resume_queue", "q")
    assert claim_ids(tx, worker) == [job]


def test_resuming_what_is_not_paused_changes_nothing(tx: Conn) -> None:
    before = contents(tx)
    call(tx, "resume_queue", "q")
    call(tx, "resume_task", "a")
    assert contents(tx) == before


@pytest.mark.parametrize("function", ["pause_queue", "resume_queue", "pause_task", "resume_task"])
def test_names_that_no_job_can_have_are_refused(tx: Conn, function: str) -> None:
    argument = "name" if function.endswith("queue") else "identifier"
    with refused(tx, "22004", f"{argument} must not be null"):
        call(tx, function, None)
    for name in ("", "x" * 129):
        with refused(tx, "22023", f"{argument} must be 1 to 128 characters long, got {len(name)}"):
            call(tx, function, name)


def test_pausing_a_queue_waits_for_the_claim_that_takes_it(db: Conn, connect: Connections) -> None:
    claimer, other = connect(), connect()
    worker = register(claimer)
    first, second = (add(db, queue_name="q")["id"] for _ in range(2))
    assert claim_ids(claimer, worker) == [first]
    call(claimer, "complete_job", worker, first)
    claimer.execute("begin")
    assert claim_ids(claimer, worker) == [second]
    pausing = Background(other, "select pgworker.pause_queue('q')")
    pausing.wait_until_blocked(db)
    claimer.execute("commit")
    pausing.result()
    assert seen(db, second)["state"] == "running"
