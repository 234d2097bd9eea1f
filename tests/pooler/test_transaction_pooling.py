"""Behind pgbouncer in transaction mode every statement may run in another session: leases and polling are enough."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from pgworker_client import Context, Fail, Retry, Worker
from pgworker_client.embedded import EmbeddedServer
from tests.calling import Conn, claim_ids, register, value
from tests.invariants import assert_all_claimable, assert_consistent
from tests.pooler.bouncer import PROGRAM, Bouncer
from tests.waiting import until

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed here: apt-get install pgbouncer")

POOL = 3


@pytest.fixture
def bouncer(server: EmbeddedServer, db: Conn) -> Iterator[Bouncer]:
    with Bouncer(server, POOL) as running:
        yield running


@contextlib.contextmanager
def _working(*workers: Worker) -> Iterator[Callable[[], None]]:
    """Run workers in threads; yields a check that none has ended. They are stopped, in good order, at the end."""
    errors: list[BaseException] = []

    def run(worker: Worker) -> None:
        try:
            worker.run()
        except BaseException as error:  # looked at by the check
            errors.append(error)

    threads = [threading.Thread(target=run, args=(worker,), daemon=True) for worker in workers]

    def check() -> None:
        if errors:
            raise errors[0]
        assert all(thread.is_alive() for thread in threads), "a worker has ended"

    for thread in threads:
        thread.start()
    try:
        yield check
        check()
    finally:
        for worker in workers:
            worker.stop()
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a worker does not stop"
    if errors:
        raise errors[0]


def _worker(bouncer: Bouncer, db: Conn, runs: list[tuple[int, int]]) -> Worker:
    worker = Worker(bouncer.dsn(db.info.dbname), concurrency=5, lease=2, poll_interval=0.05, grace=5)

    @worker.task
    async def number(payload: int, ctx: Context) -> None:
        runs.append((payload, ctx.job.attempts))
        if payload % 77 == 0:
            raise Fail("a multiple of 77")
        if payload % 50 == 0 and ctx.job.attempts == 1:
            raise Retry(in_=0.1)
        if payload % 33 == 0 and ctx.job.attempts == 1:
            raise ValueError("once")
        if payload % 100 == 1:
            async with ctx.connection() as conn:
                await conn.execute("select 1")

    return worker


_ADD = """
select count(*) from pgworker.add_jobs((
  select jsonb_agg(jsonb_build_object('identifier', 'number', 'payload', n, 'priority', mod(n, 2),
                                      'queue_name', case when mod(n, 20) = 3 then 'q' || mod(n / 20, 5) end))
  from generate_series(1, %s) n))
"""


_SESSIONS = "select count(*) from pg_stat_activity where datname = current_database()"
_HERE = "(select oid from pg_database where datname = current_database())"


def _all_over(check: Callable[[], None], db: Conn) -> bool:
    """Whether nothing is live any more; ``check`` says when that will never be."""
    check()
    # Without the pauses before retries.
    db.execute(
        "select count(*) from pgworker.reschedule_jobs("
        "array(select id from pgworker.jobs where state = 'scheduled' and last_error like '%once%'), now())"
    )
    return bool(value(db, "select not exists (select from pgworker.job)"))


def test_workers_with_a_lease_run_every_job_once_through_a_pooler(bouncer: Bouncer, db: Conn) -> None:
    jobs = 2_000
    before = value(db, _SESSIONS)
    db.execute(_ADD, [jobs])
    runs: list[tuple[int, int]] = []
    with _working(_worker(bouncer, db, runs), _worker(bouncer, db, runs)) as check:
        until(lambda: _all_over(check, db), "the end of all jobs", timeout=40)
        assert value(db, _SESSIONS) - before <= POOL  # it really is the pooler that was talked to
        # Longer than the lease: whoever does not renew it is given up meanwhile.
        worker_ids = value(db, "select array_agg(id order by id) from pgworker.worker")
        assert len(worker_ids) == 2
        moments = [value(db, "select max(lease_until) from pgworker.worker")]
        until(lambda: value(db, "select min(lease_until) from pgworker.worker") > moments[0], "both leases renewed")
        assert value(db, "select array_agg(id order by id) from pgworker.worker") == worker_ids
    expected = Counter(
        (n, attempt) for n in range(1, jobs + 1) for attempt in ([1] if n % 77 == 0 or (n % 50 and n % 33) else [1, 2])
    )
    assert Counter(runs) == expected
    assert value(db, "select count(*) from pgworker.jobs where state = 'failed'") == jobs // 77
    assert value(db, "select count(*) from pgworker.jobs") == jobs // 77
    assert value(db, "select count(*) from pgworker.worker") == 0
    assert value(db, "select count(*) from pg_locks where locktype = 'advisory' and database = " + _HERE) == 0
    assert_consistent(db)


def test_a_session_that_goes_from_hand_to_hand_mixes_up_nobodys_cursor(server: EmbeddedServer, db: Conn) -> None:
    with Bouncer(server, 1) as bouncer, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(bouncer.connect(db.info.dbname)) for _ in range(3)]
        assert len({value(client, "select pg_backend_pid()") for client in clients}) == 1
        workers = [register(client, lease="1 minute") for client in clients]
        wants: list[dict[str, Any]] = [{}, {"tasks": ["a"]}, {"forbidden_flags": ["slow"]}]
        ids: dict[int, tuple[str, bool]] = {}
        for n in range(120):
            task, slow = "ab"[n % 2], n % 3 == 0
            job = value(db, "select (pgworker.add_job(%s, flags => %s)).id", task, ["slow"] if slow else None)
            ids[job] = (task, slow)
        left = sorted(ids)
        for turn in range(70):
            who = turn % 3
            claimed = claim_ids(clients[who], workers[who], 2, **wants[who])
            fits = [job for job in left if (who != 1 or ids[job][0] == "a") and (who != 2 or not ids[job][1])]
            assert claimed == fits[:2]
            left = [job for job in left if job not in claimed]
            clients[who].execute(
                "select pgworker.finish_jobs(%s, %s::bigint[], null, null, null)", [workers[who], claimed]
            )
        assert left == []
        # A garbled note left in the session, or one in somebody else's transaction that was rolled back.
        db.execute("select pgworker.add_job('a') from generate_series(1, 4)")
        for garbage in ("x", "1 2 3", "9" * 30, "", "1 2 3 4 5 6 7 8 9 10"):
            clients[0].execute("select set_config('pgworker.cursor', %s, false)", [garbage])
            with contextlib.suppress(ZeroDivisionError), clients[1].transaction():
                assert claim_ids(clients[1], workers[1], 1)
                raise ZeroDivisionError
            assert len(claim_ids(clients[0], workers[0], 4)) == 4
            clients[0].execute("select pgworker.force_unlock_workers(%s)", [workers])
        assert_consistent(db)
        assert len(assert_all_claimable(db)) == 4


def test_workers_go_on_after_the_pooler_was_killed_and_started_again(bouncer: Bouncer, db: Conn) -> None:
    jobs = 1_500
    db.execute(_ADD, [jobs])
    runs: list[tuple[int, int]] = []
    workers = [_worker(bouncer, db, runs), _worker(bouncer, db, runs)]
    with _working(*workers) as check:
        for wanted in (jobs // 4, jobs // 2):
            until(lambda wanted=wanted: len(runs) > wanted, "some runs", timeout=40)  # type: ignore[misc]
            bouncer.kill()
            with pytest.raises(psycopg.OperationalError):
                bouncer.connect(db.info.dbname)
            check()
            bouncer.start()
        until(lambda: _all_over(check, db), "the end of all jobs", timeout=40)
    assert {n for n, _ in runs} == set(range(1, jobs + 1))
    # Twice only what was running, or finished and not yet reported, when the pooler went away.
    again = sum(times - 1 for times in Counter(runs).values())
    assert again < jobs / 2
    assert value(db, "select count(*) from pgworker.jobs where state <> 'failed'") == 0
    assert_consistent(db)
