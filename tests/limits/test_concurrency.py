"""At most so many at once, over all workers, of a task and of each limit key; and nobody else waits for that."""

from __future__ import annotations

import contextlib
import random

import psycopg
import pytest

from tests.calling import FUTURE, Conn, add, call, claim, claim_ids, register, rows, seen, value, values
from tests.connections import Connections
from tests.invariants import assert_all_claimable, assert_consistent
from tests.parallel import in_parallel
from tests.protocol.test_serial_queues import ENDINGS


def many(conn: Conn, count: int, task: str = "a", **arguments: object) -> list[int]:
    return [add(conn, task, **arguments)["id"] for _ in range(count)]


def test_no_more_than_that_run_at_once_whoever_claims(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=3)
    one, two = register(tx), register(tx)
    ids = many(tx, 8)
    assert claim_ids(tx, one, 2) == ids[:2]
    assert claim_ids(tx, two, 10) == ids[2:3]
    assert claim_ids(tx, one, 10) == []
    call(tx, "complete_job", one, ids[0])
    call(tx, "complete_job", one, ids[1])
    assert claim_ids(tx, two, 10) == ids[3:5]
    assert_consistent(tx)


def test_each_key_has_a_limit_of_its_own_and_none_has_none(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency_per_key=2)
    worker = register(tx)
    ada, bob, none = (many(tx, 4, limit_key=key) for key in ("ada", "bob", None))
    assert claim_ids(tx, worker, 100) == [*ada[:2], *bob[:2], *none]
    call(tx, "complete_job", worker, bob[0])
    assert claim_ids(tx, worker, 100) == [bob[2]]
    assert_consistent(tx)


def test_a_task_and_its_keys_are_limited_together(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=3, max_concurrency_per_key=2)
    worker = register(tx)
    ada, bob = (many(tx, 4, limit_key=key) for key in ("ada", "bob"))
    assert claim_ids(tx, worker, 100) == [*ada[:2], bob[0]]
    call(tx, "complete_job", worker, bob[0])
    assert claim_ids(tx, worker, 100) == [bob[1]]
    call(tx, "complete_job", worker, ada[0])
    assert claim_ids(tx, worker, 100) == [ada[2]]
    assert_consistent(tx)


def test_keys_of_any_length_and_alphabet_stay_apart(tx: Conn) -> None:
    call(tx, "configure_task", "a" * 128, max_concurrency_per_key=1, rate_limit_per_key=9, rate_interval_per_key="1 h")
    keys = ["é" * 512, "é" * 511 + "e", "1:x", "x", "x|q", "|", "-", "x ", "X", "\U0001f40d" * 512]
    ids = [add(tx, "a" * 128, limit_key=key, queue_name=f"\U0001f40d{n}" * 30)["id"] for n, key in enumerate(keys)]
    again = [add(tx, "a" * 128, limit_key=key)["id"] for key in keys]
    worker = register(tx)
    assert sorted(claim_ids(tx, worker, 100)) == ids
    call(tx, "finish_jobs", worker, ids, None, None, None)
    assert sorted(claim_ids(tx, worker, 100)) == again


@pytest.mark.parametrize("ending", list(ENDINGS))
@pytest.mark.parametrize("key", [None, "ada"])
def test_however_a_run_ends_the_next_may_start_at_once(tx: Conn, ending: str, key: str | None) -> None:
    call(tx, "configure_task", "a", max_concurrency=1, max_concurrency_per_key=1)
    worker, other = register(tx), register(tx)
    first, second = many(tx, 2, limit_key=key)
    assert claim_ids(tx, worker, 5) == [first]
    assert claim_ids(tx, other, 5) == []
    tx.execute(ENDINGS[ending], {"worker": worker, "job": first})
    back_in_front = ending in ("release_jobs", "unregister_worker", "force_unlock_workers")
    assert claim_ids(tx, other, 5) == [first if back_in_front else second]
    assert_consistent(tx)


def test_a_run_that_the_owner_deleted_does_not_keep_its_place_for_ever(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=2, max_concurrency_per_key=2)
    worker = register(tx)
    first, second, third = many(tx, 3, limit_key="k")
    assert claim_ids(tx, worker, 5) == [first, second]
    tx.execute("delete from pgworker.job where id = %s", [first])
    call(tx, "maintain")
    assert claim_ids(tx, worker, 5) == [third]
    assert_consistent(tx)


def test_a_run_that_waits_for_its_children_gives_its_place_up(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=1)
    worker = register(tx)
    parent, other = many(tx, 2)
    assert claim_ids(tx, worker, 5) == [parent]
    (child,) = call(tx, "add_children", worker, parent, '[{"identifier": "a"}]')
    assert value(tx, "select pgworker.wait_for_children(%s, %s)", worker, parent) is True
    ran = []
    while jobs := claim_ids(tx, worker, 5):
        assert len(jobs) == 1
        ran += jobs
        call(tx, "complete_job", worker, jobs[0])
        assert_consistent(tx)
    assert sorted(ran) == sorted([parent, other, child["id"]])


def test_dead_workers_do_not_block_the_gate(db: Conn, connect: Connections) -> None:
    db.execute("insert into pgworker.setting values ('rescue_grace', '0')")
    call(db, "configure_task", "a", max_concurrency=2, max_concurrency_per_key=2)
    ids = many(db, 4, limit_key="k")
    with connect() as doomed:
        assert claim_ids(doomed, register(doomed), 10) == ids[:2]
    worker = register(db)
    assert claim_ids(db, worker, 10) == []
    for _ in range(3):
        call(db, "maintain")
    assert claim_ids(db, worker, 10) == ids[:2]
    assert_consistent(db)


def test_cancelling_a_run_counts_until_it_has_ended(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=1)
    worker = register(tx)
    first, second, third = many(tx, 3)
    claim_ids(tx, worker)
    call(tx, "cancel_jobs", [first, second])
    assert claim_ids(tx, worker, 5) == []
    call(tx, "complete_job", worker, first)
    assert claim_ids(tx, worker, 5) == [third]


def test_order_within_a_limit_is_priority_run_at_id(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=2, max_concurrency_per_key=1)
    worker, chosen = register(tx), random.Random(3)
    for n in range(40):
        add(tx, "a", priority=chosen.choice([-1, 0, 1]), run_at=f"20{chosen.randint(10, 24)}-01-01", limit_key=f"k{n}")
    add(tx, "a", priority=-9, run_at=FUTURE)
    expected = values(tx, "select id from pgworker.jobs where run_at < now() order by priority, run_at, id")
    ran = []
    while jobs := claim_ids(tx, worker, chosen.choice([1, 5])):
        ran += jobs
        call(tx, "finish_jobs", worker, jobs, None, None, None)
    assert ran == expected


def test_limited_queued_and_other_jobs_are_claimed_in_one_order(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=1000)
    worker, chosen = register(tx), random.Random(5)
    for _ in range(60):
        kind = chosen.choice(["plain", "limited", "queued"])
        add(
            tx, "a" if kind == "limited" else "b", priority=chosen.choice([0, 1]),
            run_at=f"20{chosen.randint(10, 24)}-01-01",
            queue_name=f"q{chosen.random()}" if kind == "queued" else None,
        )  # fmt: skip
    expected = values(tx, "select id from pgworker.jobs order by priority, run_at, id")
    ran = []
    while jobs := claim_ids(tx, worker, chosen.choice([1, 2, 7])):
        ran += jobs
    assert ran == expected


def test_a_queue_and_a_limit_both_hold(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=2)
    worker, other = register(tx), register(tx)
    q = many(tx, 3, queue_name="q")
    r = many(tx, 2, queue_name="r")
    plain = add(tx, "b", queue_name="q")["id"]
    free = many(tx, 1)
    assert claim_ids(tx, worker, 10) == [q[0], r[0]]
    call(tx, "complete_job", worker, r[0])
    assert claim_ids(tx, other, 10) == [r[1]]  # q is busy, and so is the limit then
    call(tx, "complete_job", other, r[1])
    assert claim_ids(tx, other, 10) == free
    call(tx, "complete_job", worker, q[0])
    assert claim_ids(tx, other, 10) == [q[1]]
    call(tx, "complete_job", other, q[1])
    call(tx, "complete_job", other, free[0])
    call(tx, "pause_queue", "q")
    assert claim_ids(tx, other, 10) == []
    call(tx, "resume_queue", "q")
    assert len(claim_ids(tx, other, 10)) == 1
    assert claim_ids(tx, other, 10) == []
    running = value(tx, "select id from pgworker.jobs where state = 'running'")
    call(tx, "complete_job", other, running)
    assert {running, *claim_ids(tx, other, 10)} == {q[2], plain}
    assert_consistent(tx)


def test_flags_task_lists_and_pauses_apply_to_limited_jobs(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency=2)
    call(tx, "configure_task", "b", max_concurrency=2)
    worker = register(tx)
    flagged, a, b = add(tx, "a", flags=["x"])["id"], add(tx, "a")["id"], add(tx, "b")["id"]
    assert claim_ids(tx, worker, 10, tasks=[]) == []
    assert claim_ids(tx, worker, 10, tasks=["b"]) == [b]
    assert claim_ids(tx, worker, 10, forbidden_flags=["x"]) == [a]
    call(tx, "pause_task", "a")
    assert claim_ids(tx, worker, 10) == []
    call(tx, "resume_task", "a")
    assert claim_ids(tx, worker, 10) == [flagged]


def test_a_key_that_moves_a_pending_job_moves_it_between_lines(tx: Conn) -> None:
    call(tx, "configure_task", "a", max_concurrency_per_key=1)
    worker = register(tx)
    running = add(tx, "a", limit_key="ada")["id"]
    assert claim_ids(tx, worker, 5) == [running]
    moved = add(tx, "b", job_key="k")["id"]
    assert add(tx, "a", job_key="k", limit_key="ada")["id"] == moved
    assert claim_ids(tx, worker, 5) == []
    assert add(tx, "a", job_key="k", limit_key="bob")["id"] == moved
    assert claim_ids(tx, worker, 5) == [moved]
    limited, other = '{"identifier": "a", "job_key": "l", "limit_key": "ada"}', '{"identifier": "b", "job_key": "l"}'
    for specs in (f"[{other}, {limited}]", f"[{limited}, {other}]"):
        call(tx, "add_jobs", specs)
        assert_consistent(tx)
    assert len(claim_ids(tx, worker, 5)) == 1


def test_a_retried_job_of_the_past_stands_in_line_again(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx, "a", max_attempts=1)["id"]
    claim_ids(tx, worker)
    call(tx, "fail_job", worker, job, "no")
    call(tx, "configure_task", "a", max_concurrency=1)
    other = add(tx, "a")["id"]
    call(tx, "retry_jobs", [job])
    assert len(claim_ids(tx, worker, 5)) == 1
    assert claim_ids(tx, worker, 5) == []
    assert {seen(tx, job)["state"], seen(tx, other)["state"]} == {"running", "ready"}
    assert_consistent(tx)


def test_an_open_claim_holds_up_no_other_claim_and_no_end(db: Conn, connect: Connections) -> None:
    call(db, "configure_task", "a", max_concurrency=3, max_concurrency_per_key=2)
    ids = many(db, 6, limit_key="k")
    other = many(db, 3, limit_key="l")
    plain = add(db, "b")["id"]
    first, second = connect(), connect()
    one, two = register(first), register(second)
    second.execute("set lock_timeout = '2s'")
    assert claim_ids(first, one) == ids[:1]
    call(first, "release_jobs", one, ids[:1], columns="1")
    with first.transaction(force_rollback=True):
        assert claim_ids(first, one) == ids[:1]
        assert claim_ids(second, two, 10) == [ids[1], other[0], plain]
        assert claim_ids(second, two, 10) == []  # not even before the claim is committed
        call(second, "complete_job", two, ids[1])
        assert claim_ids(second, two, 10) == [ids[2]]
    assert claim_ids(second, two, 10) == ids[:1]  # which the other claim did not keep
    assert_consistent(db)


def test_an_open_end_holds_up_no_other_claim_and_no_end(db: Conn, connect: Connections) -> None:
    call(db, "configure_task", "a", max_concurrency=2)
    ids = many(db, 4)
    first, second = connect(), connect()
    one, two = register(first), register(second)
    assert claim_ids(first, one) == ids[:1]
    assert claim_ids(second, two) == ids[1:2]
    second.execute("set lock_timeout = '2s'")
    with first.transaction():
        call(first, "complete_job", one, ids[0])
        call(second, "complete_job", two, ids[1])
        assert claim_ids(second, two, 10) == ids[2:3]
    assert claim_ids(second, two, 10) == ids[3:]


def test_two_hundred_sessions_never_overlap_more_than_the_limits(db: Conn, dsn: str) -> None:
    call(db, "configure_task", "a", max_concurrency=7, max_concurrency_per_key=2)
    db.execute("create table ran (job bigint, limit_key text, since timestamptz, until timestamptz)")
    db.execute("select pgworker.add_job('a', limit_key => 'k' || n % 5) from generate_series(1, 500) n")
    db.execute("select pgworker.add_job('b') from generate_series(1, 200) n")

    def work(conn: Conn) -> None:
        worker = register(conn)
        for _ in range(4):
            for job in claim_ids(conn, worker, random.choice([1, 3])):
                since = value(conn, "select clock_timestamp()")
                conn.execute(
                    "insert into ran select id, limit_key, %s, clock_timestamp() from pgworker.jobs where id = %s",
                    [since, job],
                )
                ending = random.choice(["complete_job", "complete_job", "release_jobs"])
                call(conn, ending, worker, [job] if ending == "release_jobs" else job, columns="1")

    in_parallel(dsn, [work] * 200, timeout=100)
    assert value(db, "select count(*) from ran") > 100
    overlaps = """
        select max(n) from (select count(*) as n from ran a join ran b on b.since <= a.since and b.until > a.since
                            where a.limit_key like 'k%%' and b.limit_key like 'k%%' {} group by a.ctid) as o"""
    assert value(db, overlaps.format("")) <= 7
    assert value(db, overlaps.format("and a.limit_key = b.limit_key")) <= 2
    assert_consistent(db)
    assert_all_claimable(db)


def test_random_claims_and_ends_fill_the_limits_exactly(db: Conn, connect: Connections) -> None:
    call(db, "configure_task", "a", max_concurrency=4, max_concurrency_per_key=2)
    sessions = [connect() for _ in range(5)]
    workers = [register(session) for session in sessions]
    db.execute("select pgworker.add_job('a', limit_key => 'k' || n % 4) from generate_series(1, 200) n")
    chosen = random.Random(11)
    running: dict[int, tuple[int, str]] = {}
    ended = 0
    while ended < 200:
        which = chosen.randrange(5)
        if running and chosen.random() < 0.5:
            job = chosen.choice(list(running))
            holder, _ = running.pop(job)
            call(sessions[holder], "complete_job", workers[holder], job)
            ended += 1
        else:
            wanted = chosen.choice([1, 3, 10])
            keys = values(db, "select distinct limit_key from pgworker.jobs where state = 'ready'")
            taken = [key for _, key in running.values()]
            room = min(wanted, 4 - len(taken), sum(2 - taken.count(key) for key in keys))
            jobs = claim(sessions[which], workers[which], wanted)
            ready = value(db, "select count(*) from pgworker.jobs where state = 'ready'")
            assert len(jobs) == room or ready < 12, "room and work, and a worker gets less"
            for claimed in jobs:
                running[claimed["id"]] = (which, seen(db, claimed["id"])["limit_key"])
            per_key = [key for _, key in running.values()]
            assert len(running) <= 4
            assert all(per_key.count(key) <= 2 for key in per_key)
    assert rows(db, "select from pgworker.jobs") == []
    assert_consistent(db)


def test_serializable_and_repeatable_read_claims_do_not_get_past_a_limit(db: Conn, connect: Connections) -> None:
    call(db, "configure_task", "a", max_concurrency=1)
    many(db, 3)
    for level in (psycopg.IsolationLevel.REPEATABLE_READ, psycopg.IsolationLevel.SERIALIZABLE):
        session = connect()
        worker = register(session)
        session.autocommit = False
        session.isolation_level = level
        value(session, "select count(*) from pgworker.jobs")  # its snapshot is older than the claim of another
        taken = claim_ids(db, register(db))
        with contextlib.suppress(psycopg.errors.SerializationFailure):
            assert claim_ids(session, worker, 5) == []
        session.rollback()
        assert len(taken) == 1
        holder = value(db, "select locked_by from pgworker.jobs where id = %s", taken[0])
        call(db, "release_jobs", holder, taken, columns="1")


def test_workers_are_woken_when_a_limited_run_ends_and_another_waits(db: Conn, connect: Connections) -> None:
    call(db, "configure_task", "a", max_concurrency=1)
    first, _ = many(db, 2)
    worker = register(db)
    assert claim_ids(db, worker, 5) == [first]
    sleeper = connect()
    sleeper.execute("listen pgworker")
    asleep = register(sleeper)
    assert claim_ids(sleeper, asleep) == []
    assert claim_ids(sleeper, asleep) == []
    call(db, "complete_job", worker, first)
    assert [note.channel for note in sleeper.notifies(timeout=10, stop_after=1)] == ["pgworker"]
