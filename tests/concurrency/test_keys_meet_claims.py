"""add_job on a key whose job is being claimed, finished, removed or added at that moment: no result and no payload is
lost, whoever comes first."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb

from tests.connections import Connections
from tests.invariants import assert_consistent
from tests.parallel import in_parallel
from tests.sessions import Background

Conn = psycopg.Connection[Any]

MODES = ("replace", "preserve_run_at", "unsafe_dedupe")


def _blocked(conn: Conn, watcher: Conn, query: str, *parameters: Any) -> Background:
    """Start a query that is expected to wait for another session, and return when it does."""
    waits = Background(conn, query, *parameters)
    waits.wait_until_blocked(watcher)
    return waits


def _jobs(conn: Conn) -> list[DictRow]:
    with conn.cursor(row_factory=dict_row) as cur:
        return cur.execute("select * from pgworker.jobs order by id").fetchall()


def _one(conn: Conn, query: str, *parameters: Any) -> DictRow:
    with conn.cursor(row_factory=dict_row) as cur:
        row = cur.execute(query, parameters).fetchone()
        assert row is not None
        return row


ADD = "select * from pgworker.add_job('new', '[2]', job_key => 'k', job_key_mode => %s)"


@pytest.fixture
def holder(connect: Connections) -> Iterator[Conn]:
    """A session in an open transaction."""
    conn = connect(autocommit=False)
    yield conn
    conn.rollback()


@pytest.fixture
def worker_id(db: Conn) -> int:
    row = db.execute("select pgworker.register_worker()").fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture
def keyed(db: Conn) -> int:
    return int(_one(db, "select * from pgworker.add_job('old', '[1]', job_key => 'k')")["id"])


@pytest.mark.parametrize("mode", MODES)
def test_a_job_added_while_a_claim_is_not_committed_meets_a_running_job(
    db: Conn, connect: Connections, holder: Conn, worker_id: int, keyed: int, mode: str
) -> None:
    assert _one(holder, "select * from pgworker.get_jobs(%s)", worker_id)["id"] == keyed
    adding = _blocked(connect(), db, ADD, mode)
    holder.commit()
    added = adding.result()[0]
    if mode == "unsafe_dedupe":
        assert (added["id"], added["state"], added["revision"], added["payload"]) == (keyed, "running", 1, [1])
        assert len(_jobs(db)) == 1
        return
    assert added["id"] > keyed
    assert (added["state"], added["payload"], added["key"], added["attempts"]) == ("ready", [2], "k", 0)
    old, new = _jobs(db)
    assert new == added
    assert (old["state"], old["payload"], old["key"], old["max_attempts"]) == ("running", [1], None, 1)
    # Its retries are gone: a failure is the end of it.
    failed = _one(db, "select * from pgworker.fail_job(%s, %s, 'broken')", worker_id, keyed)
    assert failed["state"] == "failed"
    assert_consistent(db)


@pytest.mark.parametrize("mode", MODES)
def test_a_job_added_while_a_claim_is_rolled_back_meets_a_pending_job(
    db: Conn, connect: Connections, holder: Conn, worker_id: int, keyed: int, mode: str
) -> None:
    _one(holder, "select * from pgworker.get_jobs(%s)", worker_id)
    adding = _blocked(connect(), db, ADD, mode)
    holder.rollback()
    added = adding.result()[0]
    assert (added["id"], added["state"], added["revision"], added["attempts"]) == (keyed, "ready", 1, 0)
    assert added["payload"] == ([1] if mode == "unsafe_dedupe" else [1, 2])
    assert _jobs(db) == [added]


@pytest.mark.parametrize("mode", MODES)
def test_a_claim_during_an_uncommitted_update_neither_waits_nor_runs_half_of_it(
    db: Conn, holder: Conn, worker_id: int, keyed: int, mode: str
) -> None:
    added = _one(holder, ADD, mode)
    assert added["id"] == keyed
    db.execute("set statement_timeout = '5s'")
    assert db.execute("select id from pgworker.get_jobs(%s)", [worker_id]).fetchall() == []
    holder.commit()
    claimed = _one(db, "select * from pgworker.get_jobs(%s)", worker_id)
    assert claimed["id"] == keyed
    assert claimed["payload"] == ([1] if mode == "unsafe_dedupe" else [1, 2])
    assert claimed["task_identifier"] == ("old" if mode == "unsafe_dedupe" else "new")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ends", ["complete_job(%s, %s)", "fail_job(%s, %s, 'broken', permanent => true)"])
def test_a_job_added_while_the_run_ends_is_a_new_job(
    db: Conn, connect: Connections, holder: Conn, worker_id: int, keyed: int, ends: str, mode: str
) -> None:
    _one(db, "select * from pgworker.get_jobs(%s)", worker_id)
    holder.execute(f"select pgworker.{ends}".encode(), [worker_id, keyed])
    adding = _blocked(connect(), db, ADD, mode)
    holder.commit()
    added = adding.result()[0]
    assert added["id"] > keyed
    assert (added["state"], added["payload"], added["key"], added["revision"]) == ("ready", [2], "k", 0)
    assert_consistent(db)


@pytest.mark.parametrize("mode", MODES)
def test_a_job_added_while_the_run_fails_and_will_retry_updates_it(
    db: Conn, connect: Connections, holder: Conn, worker_id: int, keyed: int, mode: str
) -> None:
    _one(db, "select * from pgworker.get_jobs(%s)", worker_id)
    holder.execute("select pgworker.fail_job(%s, %s, 'broken')", [worker_id, keyed])
    adding = _blocked(connect(), db, ADD, mode)
    holder.commit()
    added = adding.result()[0]
    assert (added["id"], added["revision"], added["key"]) == (keyed, 1, "k")
    if mode == "unsafe_dedupe":
        assert (added["state"], added["payload"], added["attempts"]) == ("scheduled", [1], 1)
    else:
        # In both modes run_at becomes the new one, as this job had attempts already.
        assert (added["state"], added["payload"], added["attempts"]) == ("ready", [1, 2], 0)
        assert added["last_error"] is None


@pytest.mark.parametrize("mode", MODES)
def test_a_job_added_while_its_key_is_removed_is_a_new_job(
    db: Conn, connect: Connections, holder: Conn, keyed: int, mode: str
) -> None:
    assert _one(holder, "select * from pgworker.remove_job('k')")["id"] == keyed
    adding = _blocked(connect(), db, ADD, mode)
    holder.commit()
    added = adding.result()[0]
    assert added["id"] > keyed
    assert added["payload"] == [2]
    assert _jobs(db) == [added]


@pytest.mark.parametrize("mode", MODES)
def test_two_sessions_that_add_the_same_new_key_make_one_job(
    db: Conn, connect: Connections, holder: Conn, mode: str
) -> None:
    first = _one(holder, "select * from pgworker.add_job('old', '[1]', job_key => 'k')")
    adding = _blocked(connect(), db, ADD, mode)
    holder.commit()
    added = adding.result()[0]
    assert (added["id"], added["revision"]) == (first["id"], 1)
    assert added["payload"] == ([1] if mode == "unsafe_dedupe" else [1, 2])


def test_removing_a_key_while_it_is_claimed_leaves_the_run_going(
    db: Conn, connect: Connections, holder: Conn, worker_id: int, keyed: int
) -> None:
    _one(holder, "select * from pgworker.get_jobs(%s)", worker_id)
    removing = _blocked(connect(), db, "select * from pgworker.remove_job('k')")
    holder.commit()
    removed = removing.result()[0]
    assert (removed["id"], removed["state"], removed["key"], removed["max_attempts"]) == (keyed, "running", None, 1)
    db.execute("select pgworker.complete_job(%s, %s)", [worker_id, keyed])


def test_bulk_calls_with_the_same_keys_in_opposite_order_do_not_deadlock(
    dsn: str, db: Conn, connect: Connections, holder: Conn
) -> None:
    def specs(keys: list[str], number: int) -> Jsonb:
        return Jsonb([{"identifier": "t", "job_key": key, "payload": [number]} for key in keys])

    # First in slow motion: a third session holds a key in the middle, so that both must have begun.
    keys = [f"k{n}" for n in range(5)]
    holder.execute("select pgworker.add_job('t', '[0]', job_key => 'k2')")
    bulk = "select count(*) from pgworker.add_jobs(%s)"
    forwards = _blocked(connect(), db, bulk, specs(keys, 1))
    backwards = _blocked(connect(), db, bulk, specs(keys[::-1], 2))
    holder.commit()
    assert forwards.result()[0]["count"] == 5
    assert backwards.result()[0]["count"] == 5
    assert {len(job["payload"]) for job in _jobs(db) if job["key"] != "k2"} == {2}

    # Then in haste; keys that exist, keys that do not, and keys that occur twice.
    def add(seed: int, conn: Conn) -> None:
        chance = random.Random(seed)
        for number in range(40):
            order = [f"k{n}" for n in range(12)] + ["k3", "x", f"y{seed}"]
            chance.shuffle(order)
            row = conn.execute(bulk, [specs(order, number)]).fetchone()
            assert row == (15,)
            if number % 10 == 0:
                conn.execute("select pgworker.remove_job('x')")

    in_parallel(dsn, [lambda conn, seed=seed: add(seed, conn) for seed in range(6)], options="-cdeadlock_timeout=50ms")  # type: ignore[misc]
    assert [len(job["payload"]) for job in _jobs(db) if job["key"] == "k0"] == [2 + 6 * 40]


def payloads_through(
    dsn: str, db: Conn, transact: Callable[[Conn, Callable[[], None]], None], *, adders: int, each: int
) -> None:
    """Add numbered array payloads under a few keys while others claim, fail, complete: each number must come out once.

    ``transact`` runs a unit of work on a connection, again if it may fail.
    """
    seen: list[int] = []
    done = threading.Event()
    running = threading.Semaphore(0)

    def add(seed: int, conn: Conn) -> None:
        chance = random.Random(seed)
        for number in range(seed * each, (seed + 1) * each):
            key, mode = chance.choice("abc"), chance.choice(MODES[:2])
            queue, priority = chance.choice([None, None, "q"]), chance.randint(0, 2)

            def once(
                number: int = number, key: str = key, mode: str = mode, queue: str | None = queue, prio: int = priority
            ) -> None:
                added = _one(
                    conn,
                    "select * from pgworker.add_job('t', %s, job_key => %s, queue_name => %s, priority => %s,"
                    " job_key_mode => %s)",
                    *(Jsonb([number]), key, queue, prio, mode),
                )
                assert added["id"] is not None
                assert added["payload"][-1] == number
                assert added["key"] == key

            transact(conn, once)
        running.release()

    def work(seed: int, conn: Conn) -> None:
        chance = random.Random(seed)
        worker_id = _one(conn, "select pgworker.register_worker() as id")["id"]
        while True:
            over = done.is_set()
            batch: list[DictRow] = []

            def claim(batch: list[DictRow] = batch, size: int = chance.choice([1, 5])) -> None:
                batch.clear()
                with conn.cursor(row_factory=dict_row) as cur:
                    batch.extend(cur.execute("select * from pgworker.get_jobs(%s, %s)", (worker_id, size)))

            transact(conn, claim)
            for job in batch:
                fails = chance.random() < 0.2 and job["attempts"] < job["max_attempts"]

                def end(job: DictRow = job, fails: bool = fails) -> None:
                    if not fails:
                        conn.execute("select pgworker.complete_job(%s, %s)", [worker_id, job["id"]])
                        return
                    after = _one(conn, "select * from pgworker.fail_job(%s, %s, 'again', now())", worker_id, job["id"])
                    # Its retries were taken away by an add_job that came while it ran: it has ended, failed.
                    job["ended"] = after["state"] == "failed"

                transact(conn, end)
                if not fails or job["ended"]:
                    seen.extend(job["payload"])
            if over and not batch:
                break

    def wait_for_adders(_: Conn) -> None:
        for _n in range(adders):
            assert running.acquire(timeout=60)
        done.set()

    parts: list[Callable[[Conn], None]] = [wait_for_adders]
    parts += [lambda conn, seed=seed: add(seed, conn) for seed in range(adders)]  # type: ignore[misc]
    parts += [lambda conn, seed=seed: work(seed, conn) for seed in range(4)]  # type: ignore[misc]
    try:
        in_parallel(dsn, parts, options="-cdeadlock_timeout=100ms", timeout=60)
    finally:
        done.set()
    counts = Counter(seen)
    rest = [number for job in _jobs(db) if job["state"] in ("ready", "scheduled") for number in job["payload"]]
    assert not rest, f"workers stopped when nothing was due, but {len(rest)} payloads wait"
    assert [number for number in range(adders * each) if counts[number] != 1] == []
    assert_consistent(db)


def test_no_payload_is_lost_or_doubled_when_keys_are_added_and_claimed_at_random(dsn: str, db: Conn) -> None:
    payloads_through(dsn, db, lambda _, unit: unit(), adders=6, each=150)


def test_serializable_sessions_lose_no_payload_either(dsn: str, db: Conn) -> None:
    levels = itertools.cycle(["repeatable read", "serializable"])
    chosen: dict[Conn, str] = {}

    def transact(conn: Conn, unit: Callable[[], None]) -> None:
        if conn not in chosen:
            chosen[conn] = next(levels)
        while True:
            try:
                with conn.transaction():
                    conn.execute(f"set transaction isolation level {chosen[conn]}".encode())
                    unit()
                return
            except psycopg.errors.SerializationFailure:
                continue

    payloads_through(dsn, db, transact, adders=4, each=60)
