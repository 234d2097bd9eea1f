"""Claims walk their index in its order and touch a handful of pages, whatever there is and whatever statistics say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.calling import add, claim_ids, register, value
from tests.connections import Connections
from tests.cursors import sweeps_cost
from tests.plans.explained import Explained, buffers, cte, nodes, scans

Conn = psycopg.Connection[Any]

_INSERT = """
insert into pgworker.job (run_at, created_at, priority, task_identifier, payload, queue_name, key)
select now() + %(hours)s * interval '1 hour' + n * interval '1 microsecond', now(), %(priority)s, %(task)s, '{}',
       %(queue)s, null
from generate_series(1, %(jobs)s) n
"""


def _fill(
    conn: Conn, jobs: int, *, task: str = "t", queue: str | None = None, priority: int = 0, hours: int = -1
) -> None:
    conn.execute(_INSERT, {"jobs": jobs, "task": task, "queue": queue, "priority": priority, "hours": hours})


def _nothing(conn: Conn) -> None:
    pass


def _analysed_empty(conn: Conn) -> None:
    conn.execute("vacuum analyze pgworker.job, pgworker.queue, pgworker.worker")


def _large(conn: Conn) -> None:
    _fill(conn, 30_000)
    _fill(conn, 5_000, task="other", priority=1)
    for queue in ("p", "q"):
        _fill(conn, 5_000, queue=queue)
    conn.execute("insert into pgworker.queue (name) select 'empty' || n from generate_series(1, 5000) n")
    conn.execute("analyze pgworker.job, pgworker.queue, pgworker.worker")


def _large_not_analysed(conn: Conn) -> None:
    _fill(conn, 20_000)
    _fill(conn, 5_000, queue="q")


@pytest.fixture(params=[_nothing, _analysed_empty, _large, _large_not_analysed])
def filled(db: Conn, request: pytest.FixtureRequest) -> Conn:
    request.param(db)
    return db


def test_a_claim_reads_its_index_in_order_and_sorts_nothing(filled: Conn, connect: Connections) -> None:
    conn = connect()
    worker = register(conn)
    explained = Explained(conn)
    for _ in range(8):  # beyond the fifth, a plan could be a generic one
        add(conn, "t")
        add(conn, "t", queue_name="q")
        add(conn, "other", priority=1)
        explained.forget()
        claimed = claim_ids(conn, worker, 3)
        assert claimed
        picking = cte(explained.of("with picked as"), "picked")
        assert [node["Node Type"] for node in nodes(picking)] == ["Limit", "LockRows", "Index Scan"]
        assert scans(picking, "job") == {("Index Scan", "job_claim")}
        for query, plan in explained.plans:
            for table in ("job", "queue"):
                wrong = [scan for scan in scans(plan, table) if scan[0] not in _BY_INDEX]
                assert not wrong, f"{table} is read by {wrong} in: {query}"
            # That index begins with the queue's name: by anything else it would be read from end to end.
            for node in nodes(plan):
                if node.get("Index Name") == "job_queue" and "Index Cond" in node:
                    assert "queue_name" in node["Index Cond"], f"{node['Index Cond']} in: {query}"
    # Of the looks that a claim takes at queues one must be by queue, and one by the jobs' order.
    explained.forget()
    value(conn, "select set_config('pgworker.cursor', '', false)")
    claim_ids(conn, worker, 3)
    used = {index for _, plan in explained.plans for _, index in scans(plan, "job")}
    assert {"job_claim", "job_queue"} <= used
    explained.forget()
    conn.execute("select pgworker.finish_jobs(%s, %s, null, null, null)", [worker, claimed])
    conn.execute("select pgworker.next_run_at()")
    conn.execute("select pgworker.add_job('t', job_key => 'k')")
    conn.execute("select pgworker.add_job('t', job_key => 'k')")
    for query, plan in explained.plans:
        wrong = [scan for scan in scans(plan, "job") if scan[0] not in _BY_INDEX]
        assert not wrong, f"job is read by {wrong} in: {query}"


_BY_INDEX = {"Index Scan", "Index Only Scan", "Tid Scan"}


def _cost(conn: Conn, worker: int, tasks: list[str] | None = None, claims: int = 12) -> int:
    """Return the pages that a claim of one job touches, the cheapest of some: the others swept, or met new pages."""
    seen = []
    for _ in range(claims):
        add(conn, "mine")
        seen.append(buffers(conn, "select * from pgworker.get_jobs(%s, 1, %s)", worker, tasks))
    return min(seen)


def test_claims_leap_over_many_jobs_of_the_future(db: Conn) -> None:
    """A brief claim looks at all of them: there is none where a sweep, however cheap, has seen that there are many."""

    def dear(worker: int) -> list[int]:
        seen = []
        for n in range(12):
            if n % 3 == 2:
                sweeps_cost(db, 1000, ago=10_000_000)  # time for the next
            add(db, "mine")
            seen.append(buffers(db, "select * from pgworker.get_jobs(%s, 1)", worker))
        return [pages for pages in seen if pages > 500]

    worker = register(db)
    assert claim_ids(db, worker) == []
    _fill(db, 50_000, hours=24)
    _fill(db, 50_000, priority=1, hours=24)
    assert len(dear(worker)) <= 1  # the one that meets them
    assert dear(register(db)) == []


def test_a_claim_of_more_than_is_due_ends_where_the_future_begins(db: Conn) -> None:
    worker = register(db)
    for priority in (0, 1):
        _fill(db, 50_000, priority=priority, hours=24)
        add(db, "mine", priority=priority)
    seen = []
    for _ in range(6):
        seen.append(buffers(db, "select * from pgworker.get_jobs(%s, 10)", worker))
        for priority in (0, 1):
            add(db, "mine", priority=priority)
    assert min(seen) < 150, seen


def test_claims_leap_over_the_remains_of_many_jobs_of_the_future(db: Conn, connect: Connections) -> None:
    """There are no jobs among them, but to look for these takes as long as a brief claim: that counts."""
    old, conn = connect(), connect()
    _fill(db, 100_000, hours=24)
    worker = register(conn)
    for _ in range(2):  # the first sweep of a session makes plans
        assert claim_ids(conn, worker) == []
    with old.transaction():
        old.execute("set transaction isolation level repeatable read")
        old.execute("select from pgworker.job limit 1")
        db.execute("delete from pgworker.job")
        seen = []
        for _ in range(3):
            sweeps_cost(conn, 1000, ago=10_000_000)
            conn.execute("select pgworker.get_jobs(%s)", [worker])  # sweeps
            add(db, "mine", priority=1)
            seen.append(buffers(conn, "select pgworker.get_jobs(%s)", worker))
        assert min(seen) < 150, seen


def _dead_entries(conn: Conn) -> None:
    _fill(conn, 100_000)
    conn.execute("delete from pgworker.job")


def _of_another_task(conn: Conn) -> None:
    _fill(conn, 100_000, task="foreign")


def _behind_a_busy_queue(conn: Conn) -> None:
    _fill(conn, 100_000, task="mine", queue="busy")
    worker = register(conn)
    assert len(claim_ids(conn, worker, 10)) == 1


def _in_many_queues(conn: Conn) -> None:
    conn.execute(
        _INSERT.replace("%(queue)s", "'q' || n"), {"jobs": 10_000, "task": "foreign", "priority": 0, "hours": -1}
    )


def _behind_many_busy_queues(conn: Conn) -> None:
    conn.execute(
        _INSERT.replace("%(queue)s", "'q' || mod(n, 2000)"),
        {"jobs": 20_000, "task": "mine", "priority": 0, "hours": -1},
    )
    worker = register(conn)
    while claim_ids(conn, worker, 1_000):
        pass
    assert value(conn, "select count(*) from pgworker.queue where job_id is not null") == 2_000


def _behind_a_limit(conn: Conn) -> None:
    conn.execute("select pgworker.configure_task('limited', max_concurrency => 1)")
    _fill_limited(conn, 100_000, keys=1, running=1)


def _behind_limits_of_many_keys(conn: Conn) -> None:
    conn.execute("select pgworker.configure_task('limited', max_concurrency_per_key => 1)")
    _fill_limited(conn, 20_000, keys=2_000, running=2_000)


def _behind_a_rate(conn: Conn) -> None:
    conn.execute("select pgworker.configure_task('limited', rate_limit => 1000, rate_interval => '1 day')")
    _fill_limited(conn, 20_000, keys=1, running=1_000)


def _fill_limited(conn: Conn, jobs: int, *, keys: int, running: int) -> None:
    conn.execute(  # due for long: what became due in the last second is looked at with every claim
        "select count(*) from pgworker.add_jobs((select jsonb_agg(jsonb_build_object('identifier', 'limited', "
        "'limit_key', mod(n, %s)::text, 'run_at', now() - interval '1 hour')) from generate_series(1, %s) n))",
        [keys, jobs],
    )
    worker = register(conn)
    claimed = 0
    while got := claim_ids(conn, worker, 1_000):
        claimed += len(got)
    assert claimed == running


def test_a_claim_within_a_wide_rate_does_not_count_what_the_rate_has_let_through(db: Conn) -> None:
    db.execute("select pgworker.configure_task('limited', rate_limit => 100000, rate_interval => '1 day')")
    db.execute("select count(pgworker.add_job('limited')) from generate_series(1, 10000)")
    worker = register(db)
    while ids := claim_ids(db, worker, 1_000):
        db.execute("select pgworker.finish_jobs(%s, %s, null, null, null)", [worker, ids])
    db.execute("vacuum pgworker.job, pgworker.permit")
    db.execute("analyze pgworker.job, pgworker.permit")
    read = (
        "select coalesce(sum(pg_stat_get_xact_tuples_returned(i.indexrelid)), 0) from pg_index i "
        "where i.indrelid = 'pgworker.permit'::regclass"
    )
    claim_ids(db, worker)  # which makes the plans
    job = add(db, "limited")["id"]
    with db.transaction():
        before = value(db, read)  # of transactions that have just ended
        assert claim_ids(db, worker) == [job]
        looked_at = value(db, read) - before
    assert looked_at < 1_000, f"{looked_at} permits were looked at"


def test_what_is_asked_of_every_job_is_no_call(tx: Conn) -> None:
    query = "select pgworker.lane(true, limit_key, queue_name) from pgworker.job"
    plan = str(value(tx, f"explain (verbose, format json) {query}"))
    assert "lane(" not in plan
    assert "lane_key(" not in plan


@pytest.mark.parametrize(
    "obstacle",
    [
        _dead_entries, _of_another_task, _behind_a_busy_queue, _in_many_queues, _behind_many_busy_queues,
        _behind_a_limit, _behind_limits_of_many_keys, _behind_a_rate,
    ],
)  # fmt: skip
def test_a_claim_costs_no_more_pages_for_what_lies_behind(
    db: Conn, connect: Connections, obstacle: Callable[[Conn], None]
) -> None:
    conn = connect()
    worker = register(conn)
    tasks = None if "limit" in obstacle.__name__ or "rate" in obstacle.__name__ else ["mine"]
    clean = _cost(conn, worker, tasks)
    conn.execute("delete from pgworker.job")
    holder = connect(autocommit=False)
    holder.execute("set transaction isolation level repeatable read")
    holder.execute("select count(*) from pgworker.jobs")  # nothing that is deleted from now on can be vacuumed
    obstacle(db)
    burdened = _cost(conn, worker, tasks)
    assert clean < 150
    # An empty table costs so few pages that the ways through the indexes themselves show.
    assert burdened <= max(2 * clean, 60), f"{burdened} pages instead of {clean}"
    holder.rollback()
