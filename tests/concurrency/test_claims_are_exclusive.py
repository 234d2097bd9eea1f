"""Two sessions never run the same job, nor two jobs of one serial queue; and nothing is left lying."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import psycopg

from tests.invariants import assert_consistent
from tests.parallel import in_parallel

Conn = psycopg.Connection[Any]

SESSIONS = 200


def _value(conn: Conn, query: str, *parameters: Any) -> Any:
    row = conn.execute(query, parameters).fetchone()
    assert row is not None
    return row[0]


def test_two_hundred_sessions_never_claim_the_same_job_and_leave_none(dsn: str, db: Conn) -> None:
    jobs = 3_000
    db.execute(
        "select count(*) from pgworker.add_jobs((select jsonb_agg(jsonb_build_object("
        " 'identifier', 't' || mod(n, 3), 'priority', mod(n, 5) - 2,"
        " 'flags', case when mod(n, 7) = 0 then jsonb_build_array('slow') end))"
        " from generate_series(1, %s) n))",
        [jobs],
    )
    claimed: list[int] = []

    def claim(seed: int, conn: Conn) -> None:
        chance = random.Random(seed)
        worker_id = _value(conn, "select pgworker.register_worker()")
        mine: list[int] = []
        while True:
            # Some ask for one task or pass over a flag, now and then: their cursors are thrown away and made anew.
            tasks = chance.choice([None, None, None, ["t1"], ["t2", "t0"]])
            flags = chance.choice([None, None, ["slow"]])
            got = [
                row[0]
                for row in conn.execute(
                    "select id from pgworker.get_jobs(%s, %s, %s, %s)",
                    [worker_id, chance.choice([1, 2, 5, 20]), tasks, flags],
                )
            ]
            mine += got
            if not got and tasks is None and flags is None:
                break
        claimed.extend(mine)

    in_parallel(dsn, [lambda conn, seed=seed: claim(seed, conn) for seed in range(SESSIONS)])  # type: ignore[misc]
    twice = [job for job, times in Counter(claimed).items() if times > 1]
    assert not twice, f"claimed more than once: {twice[:20]}"
    # Each stopped only when it saw nothing left.
    assert len(claimed) == jobs
    assert _value(db, "select count(*) from pgworker.job where attempts <> 1 or locked_by is null") == 0
    assert_consistent(db)


def test_a_serial_queue_never_runs_two_jobs_at_once_and_keeps_others_going(dsn: str, db: Conn) -> None:
    sessions, queues, jobs = 16, 8, 450
    db.execute("create table public.run (queue text, job_id bigint, began bigint, ended bigint)")
    db.execute("create sequence public.moment")
    # Every third job has no queue; the queues are of very different lengths; one in twenty fails once and goes behind.
    db.execute(
        "select count(*) from pgworker.add_jobs((select jsonb_agg(jsonb_build_object("
        " 'identifier', 't', 'priority', mod(n, 3), 'payload', n,"
        " 'queue_name', case when mod(n, 3) > 0 then 'q' || floor(sqrt(mod(n, 81)))::int end))"
        " from generate_series(1, %s) n))",
        [jobs],
    )
    assert _value(db, "select count(distinct queue_name) from pgworker.job") == queues
    failed_once: set[int] = set()
    lock = threading.Lock()

    def work(seed: int, conn: Conn) -> None:
        chance = random.Random(seed)
        worker_id = _value(conn, "select pgworker.register_worker()")
        while _value(conn, "select exists (select from pgworker.job)"):
            batch = conn.execute(
                "select id, queue_name, nextval('public.moment') from pgworker.get_jobs(%s, %s)",
                [worker_id, chance.choice([1, 3, 10])],
            ).fetchall()
            assert max(Counter(queue for _, queue, _ in batch if queue).values(), default=1) == 1
            chance.shuffle(batch)
            for job_id, queue, began in batch:
                with lock:
                    fails = job_id % 20 == 0 and job_id not in failed_once
                    failed_once.add(job_id)
                with conn.transaction():
                    conn.execute(
                        "insert into public.run values (%s, %s, %s, nextval('public.moment'))", [queue, job_id, began]
                    )
                    if fails:
                        conn.execute("select pgworker.fail_job(%s, %s, 'once', now())", [worker_id, job_id])
                    else:
                        conn.execute("select pgworker.complete_job(%s, %s)", [worker_id, job_id])

    in_parallel(dsn, [lambda conn, seed=seed: work(seed, conn) for seed in range(sessions)], timeout=45)  # type: ignore[misc]
    overlaps = db.execute(
        "select a.queue, a.job_id, b.job_id from public.run a join public.run b"
        " on a.queue = b.queue and a.began < b.began and b.began < a.ended"
    ).fetchall()
    assert not overlaps, f"ran at the same time: {overlaps[:10]}"
    assert _value(db, "select count(*) from public.run") == jobs + jobs // 20
    assert _value(db, "select count(distinct job_id) from public.run") == jobs
    assert_consistent(db)
