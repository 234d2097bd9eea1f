"""Everything at once from many sessions: no deadlock, no error outside of the contract, nothing stuck at the end."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from pgworker_client.embedded import EmbeddedServer
from tests.invariants import assert_all_claimable, assert_consistent
from tests.parallel import in_parallel
from tests.server_errors import errors, log_length
from tests.waiting import until

Conn = psycopg.Connection[Any]

SECONDS = 6
KEYS = [f"k{n}" for n in range(8)]
QUEUES = [f"q{n}" for n in range(4)]
TASKS = ["t0", "t1", "t2"]


Role = Callable[["Storm", random.Random, Conn], None]


class Storm:
    """What the sessions share: when to stop, which workers there are, and what became of things."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.workers: list[int] = []
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def over(self) -> bool:
        passed = time.monotonic() - self.begun
        return passed > 10 * SECONDS or (passed > SECONDS and self.has_seen_everything)

    @property
    def has_seen_everything(self) -> bool:
        """Whether every part of it has had its turn, on however slow a machine."""
        counts = self.counts
        return counts["finish_jobs: completed"] > 50 and counts["vanished"] > 5 and len(counts) > 20

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1


def _spec(chance: random.Random) -> dict[str, Any]:
    spec: dict[str, Any] = {"identifier": chance.choice(TASKS), "payload": [1], "priority": chance.randint(-1, 1)}
    if chance.random() < 0.4:
        spec["queue_name"] = chance.choice(QUEUES)
    if chance.random() < 0.3:
        spec["job_key"] = chance.choice(KEYS)
        spec["job_key_mode"] = chance.choice(["replace", "preserve_run_at", "unsafe_dedupe"])
    return spec


def _produce(storm: Storm, chance: random.Random, conn: Conn) -> None:
    while not storm.over:
        if conn.execute("select count(*) > 1000 from pgworker.job").fetchone() == (True,):
            time.sleep(0.01)
            continue
        specs = [_spec(chance) for _ in range(chance.choice([1, 1, 5, 30]))]
        returned = conn.execute("select id from pgworker.add_jobs(%s)", [Jsonb(specs)]).fetchall()
        assert len(returned) == len(specs)
        assert (None,) not in returned
        storm.count("add_jobs")


def _work(storm: Storm, chance: random.Random, conn: Conn) -> None:
    def register() -> int:
        row = conn.execute("select pgworker.register_worker()").fetchone()
        assert row is not None
        storm.workers.append(row[0])
        return int(row[0])

    worker_id = register()
    while not storm.over:
        got = [
            row[0]
            for row in conn.execute("select id from pgworker.get_jobs(%s, %s)", [worker_id, chance.choice([1, 4, 20])])
        ]
        chance.shuffle(got)
        choice = chance.random()
        if choice < 0.5:
            n = chance.randint(0, len(got))
            results = [Jsonb(job) for job in got[:n]] if chance.random() < 0.3 else None
            outcomes = conn.execute(
                "select outcome from pgworker.finish_jobs(%s, %s, %s, %s, %s)",
                [worker_id, got[:n], results, got[n:], ["broken"] * len(got[n:])],
            ).fetchall()
            assert len(outcomes) == len(got)
            for (outcome,) in outcomes:
                storm.count(f"finish_jobs: {outcome}")
        elif choice < 0.6:
            conn.execute("select pgworker.release_jobs(%s, %s)", [worker_id, got])
            storm.count("release_jobs")
        elif choice < 0.62:
            conn.execute("select pgworker.unregister_worker(%s)", [worker_id])
            storm.workers.remove(worker_id)
            worker_id = register()
            storm.count("unregister_worker")
        else:
            if chance.random() < 0.1:
                conn.execute("select * from pgworker.heartbeat(%s)", [worker_id])
            for job_id in got:
                how, parameters = chance.choice(
                    [
                        ("complete_job(%s, %s)", []),
                        ("complete_job(%s, %s, %s)", [Jsonb({"a": 1})]),
                        ("fail_job(%s, %s, 'broken')", []),
                        ("fail_job(%s, %s, 'broken', retry_at => now())", []),
                        ("fail_job(%s, %s, 'broken', permanent => true)", []),
                        ("set_progress(%s, %s, '1')", []),
                    ]
                )
                try:
                    conn.execute(f"select pgworker.{how}".encode(), [worker_id, job_id, *parameters])
                    storm.count(how)
                except psycopg.Error as error:
                    if error.sqlstate != "PW001":
                        raise
                    storm.count("PW001")


def _administrate(storm: Storm, chance: random.Random, conn: Conn) -> None:
    while not storm.over:
        rows = conn.execute(
            "select id from pgworker.jobs where state = any (%s) order by random() limit 20",
            [
                chance.choice(
                    [["ready", "scheduled"], ["running"], ["failed", "cancelled"], ["ready", "running", "failed"]]
                )
            ],
        ).fetchall()
        ids = [row[0] for row in rows]
        calls: list[tuple[str, list[Any]]] = [
            ("cancel_jobs(%s)", [ids]),
            ("complete_jobs(%s)", [ids[:3]]),
            ("permanently_fail_jobs(%s)", [ids[:5]]),
            ("reschedule_jobs(%s, now())", [ids]),
            ("reschedule_jobs(%s, now() + interval '20 ms', %s)", [ids, chance.randint(-2, 2)]),
            ("retry_jobs(%s)", [ids]),
            ("remove_job(%s)", [chance.choice(KEYS)]),
            ("force_unlock_workers(%s)", [chance.sample(storm.workers, min(3, len(storm.workers)))]),
            ("pause_queue(%s)", [chance.choice(QUEUES)]),
            ("resume_queue(%s)", [chance.choice(QUEUES)]),
            ("pause_task(%s)", [chance.choice(TASKS)]),
            ("resume_task(%s)", [chance.choice(TASKS)]),
            ("maintain()", []),
            ("cleanup()", []),
            ("next_run_at()", []),
        ]
        what, parameters = chance.choice(calls)
        conn.execute(f"select pgworker.{what}".encode(), parameters)
        storm.count(what)
        time.sleep(chance.random() * 0.01)


def _come_and_vanish(storm: Storm, dsn: str, chance: random.Random, conn: Conn) -> None:
    """Workers that claim and then lose their session."""
    while not storm.over:
        with psycopg.connect(dsn, autocommit=True) as victim:
            row = victim.execute("select pgworker.register_worker('victim')").fetchone()
            assert row is not None
            victim.execute("select pgworker.get_jobs(%s, %s)", [row[0], chance.choice([1, 10])])
            conn.execute("select pg_terminate_backend(%s)", [victim.info.backend_pid])
        storm.count("vanished")
        time.sleep(0.05)


def test_a_storm_of_everything_ends_with_every_job_finished_or_claimable(
    dsn: str, db: Conn, server: EmbeddedServer
) -> None:
    db.execute("insert into pgworker.setting values ('rescue_grace', '100 ms')")
    storm = Storm()
    roles: list[Role] = [*[_produce] * 4, *[_work] * 8, *[_administrate] * 5]
    parts: list[Callable[[Conn], None]] = [
        functools.partial(role, storm, random.Random(n)) for n, role in enumerate(roles)
    ]
    parts.append(functools.partial(_come_and_vanish, storm, dsn, random.Random(99)))
    since = log_length(server)
    try:
        in_parallel(dsn, parts, options="-cdeadlock_timeout=100ms -clog_lock_waits=on", timeout=10 * SECONDS + 40)
    except psycopg.errors.DeadlockDetected as error:
        raise AssertionError("\n\n".join(errors(server, since)[:3])) from error

    assert storm.has_seen_everything, storm.counts

    # The workers, whose sessions are gone, are found dead.
    def rescued() -> bool:
        db.execute("select pgworker.maintain()")
        return db.execute("select from pgworker.worker").fetchone() is None

    until(rescued, "the end of all workers")
    assert_consistent(db)
    assert db.execute("select count(*) from pgworker.notice").fetchone() == (0,)
    for name in QUEUES:
        db.execute("select pgworker.resume_queue(%s)", [name])
    for name in TASKS:
        db.execute("select pgworker.resume_task(%s)", [name])
    assert_all_claimable(db)
    deadlocks = db.execute("select deadlocks from pg_stat_database where datname = current_database()").fetchone()
    assert deadlocks == (0,)
