"""why(): each cause is named, and it is the real one."""

from __future__ import annotations

import re

import pytest

from tests.calling import FUTURE, Conn, add, call, claim_ids, register, value
from tests.clock import move_clock
from tests.connections import Connections
from tests.lifecycle import job_in
from tests.trees.planting import leftovers, node, plant
from tests.waiting import until_gone

NOON = "2031-05-17 12:00:00+00"


def why(conn: Conn, job: int | None) -> str:
    """Return what ``why`` says."""
    said: str = value(conn, "select pgworker.why(%s)", job)
    return said


@pytest.fixture
def worker(tx: Conn) -> int:
    """A live worker that takes everything."""
    move_clock(tx, NOON)
    worker = register(tx, "w")
    claim_ids(tx, worker)
    return worker


def test_a_job_that_nothing_holds_back_is_ready(tx: Conn, worker: int) -> None:
    job = add(tx)["id"]
    ready = "ready, due since 2031-05-17 12:00:00+00: nothing holds it back, and 1 live worker takes it"
    assert why(tx, job) == f"{ready} when its turn comes"
    claim_ids(tx, register(tx), tasks=["a"])
    assert why(tx, add(tx)["id"]).endswith("and 2 live workers take it when its turn comes")


def test_a_job_of_the_future_says_when(tx: Conn, worker: int) -> None:
    assert why(tx, add(tx, run_at=FUTURE)["id"]) == "due at 2100-01-01 00:00:00+00"
    retried = add(tx, max_attempts=3)["id"]
    claim_ids(tx, worker)
    call(tx, "fail_job", worker, retried, "it broke", retry_at=FUTURE)
    assert why(tx, retried) == "due at 2100-01-01 00:00:00+00 for attempt 2 of 3, after: it broke"


def test_paused_tasks_and_queues_are_named_and_all_causes_are_said(tx: Conn, worker: int) -> None:
    job = add(tx, queue_name="q", run_at=FUTURE)["id"]
    call(tx, "pause_task", "a")
    call(tx, "pause_queue", "q")
    assert why(tx, job) == "due at 2100-01-01 00:00:00+00; task a is paused; queue q is paused"
    call(tx, "resume_task", "a")
    call(tx, "reschedule_jobs", [job], run_at=NOON)
    assert why(tx, job) == "queue q is paused"


def test_a_job_behind_another_in_its_queue(tx: Conn, worker: int) -> None:
    first, second = (add(tx, queue_name="q")["id"] for _ in range(2))
    assert why(tx, first).startswith("ready")
    assert why(tx, second) == f"behind job {first}, which comes before it in queue q"
    assert claim_ids(tx, worker, 10) == [first]
    assert why(tx, second) == f"behind job {first}, which runs in queue q"


def test_a_job_is_not_behind_one_that_some_worker_passes_over(tx: Conn, worker: int) -> None:
    first, second = add(tx, "slow", queue_name="q")["id"], add(tx, queue_name="q")["id"]
    other = register(tx)
    assert claim_ids(tx, other, tasks=["a"], max_jobs=1) == [second]
    call(tx, "release_jobs", other, [second])
    assert why(tx, first).startswith("ready")
    assert why(tx, second).startswith("ready")
    call(tx, "unregister_worker", other)
    assert why(tx, second) == f"behind job {first}, which comes before it in queue q"


def test_flags_that_all_live_workers_forbid(tx: Conn, worker: int) -> None:
    job = add(tx, flags=["slow", "big"])["id"]
    other = register(tx)
    assert claim_ids(tx, worker, forbidden_flags=["slow"]) == []
    assert claim_ids(tx, other, tasks=["b"]) == []  # it takes the flags, but does not know the task
    assert why(tx, job) == "flag slow is forbidden by all live workers that know the task"
    assert claim_ids(tx, other, tasks=["a", "b"], forbidden_flags=["big"]) == []
    assert why(tx, job) == "flags slow and big are forbidden by all live workers that know the task"
    assert claim_ids(tx, other, tasks=["a", "b"], forbidden_flags=["other"]) == [job]


def test_flags_that_the_database_forbids(tx: Conn, worker: int) -> None:
    first = add(tx, flags=["slow"], queue_name="q")["id"]
    second = add(tx, queue_name="q")["id"]
    call(tx, "forbid_flag", "slow")
    assert why(tx, first) == "flag slow is forbidden (forbid_flag)"
    assert why(tx, second).startswith("ready")
    call(tx, "allow_flag", "slow")
    assert why(tx, second) == f"behind job {first}, which comes before it in queue q"


def test_a_task_that_no_live_worker_knows(tx: Conn, worker: int) -> None:
    job = add(tx)["id"]
    claim_ids(tx, worker, tasks=["b"])
    assert why(tx, job) == "no live worker knows task a"
    claim_ids(tx, worker, tasks=["b", "a"], forbidden_flags=["x"])
    call(tx, "release_jobs", worker, [job])
    assert why(tx, job).startswith("ready")
    call(tx, "unregister_worker", worker)
    assert why(tx, job) == "no worker is live"
    register(tx)
    assert why(tx, job) == "no live worker knows task a"  # it has asked for nothing yet


def test_workers_whose_session_or_lease_is_over_do_not_count(db: Conn, connect: Connections) -> None:
    move_clock(db, NOON)
    job, taken = add(db, "b")["id"], add(db, "c")["id"]
    session = connect()
    move_clock(session, NOON)
    leased, present = register(db, lease="30 seconds"), register(session)
    claim_ids(db, leased, tasks=["b", "z"], forbidden_flags=["z"])
    call(db, "release_jobs", leased, [job])
    assert claim_ids(session, present, tasks=["c"]) == [taken]
    assert why(db, job).startswith("ready")
    move_clock(db, "2031-05-17 12:00:31+00")
    assert why(db, job) == "no live worker knows task b"
    pid = session.info.backend_pid
    session.close()
    until_gone(db, pid)
    assert why(db, taken).endswith("which is gone: maintain() gives it back after the grace")
    assert why(db, job) == "no worker is live"


def test_limits_of_concurrency(tx: Conn, worker: int) -> None:
    call(tx, "configure_task", "a", max_concurrency=2, max_concurrency_per_key=1)
    first, second, third, fourth = (add(tx, limit_key=key)["id"] for key in ("k", "k", "l", "m"))
    assert all(why(tx, job).startswith("ready") for job in (first, second, third, fourth))
    assert claim_ids(tx, worker) == [first]
    key = "limit key k of task a is at its limit of 1 at once"
    assert why(tx, second) == key
    assert why(tx, third).startswith("ready")
    assert claim_ids(tx, worker) == [third]
    assert why(tx, fourth) == "task a is at its limit of 2 at once"
    assert why(tx, second) == f"task a is at its limit of 2 at once; {key}"
    call(tx, "complete_job", worker, first)
    assert why(tx, second).startswith("ready")


def test_limits_of_rates(tx: Conn, worker: int) -> None:
    call(tx, "configure_task", "a", rate_limit=1, rate_interval="1 minute")
    first, second = (add(tx)["id"] for _ in range(2))
    assert claim_ids(tx, worker) == [first]
    limit = "task a is at its limit of 1 in 00:01:00, and the next may run at 2031-05-17 12:01:00+00"
    assert why(tx, second) == limit
    move_clock(tx, "2031-05-17 12:01:00+00")
    assert why(tx, second).startswith("ready")


def test_jobs_of_a_limited_task_in_a_queue(tx: Conn, worker: int) -> None:
    call(tx, "configure_task", "a", max_concurrency=5)
    other, first, second = (add(tx, task, queue_name="q")["id"] for task in ("b", "a", "a"))
    assert why(tx, second) == f"behind job {first}, which comes before it in queue q"
    assert why(tx, first).startswith("ready")
    assert why(tx, other).startswith("ready")
    assert claim_ids(tx, worker) == [other]
    assert why(tx, first) == f"behind job {other}, which runs in queue q"


def test_a_job_that_was_added_while_limits_were_being_set(db: Conn, connect: Connections) -> None:
    move_clock(db, NOON)
    claim_ids(db, register(db))
    adder = connect(autocommit=False)
    job = add(adder)["id"]
    call(db, "configure_task", "a", max_concurrency=5)
    adder.commit()
    line = "added while the limits of its task were being changed: maintain() puts it in line"
    assert why(db, job).endswith(line)
    move_clock(db, "2031-05-17 12:00:30+00")
    call(db, "maintain")
    call(db, "reschedule_jobs", [job], run_at=NOON)
    assert why(db, job).startswith("ready")


def test_what_a_node_of_a_tree_waits_for(tx: Conn, worker: int) -> None:
    tree = node("root", node("load"), node("rates"), node("page", node("draw"), after=["load", "rates"]))
    ids = plant(tx, tree)
    load, rates, page = ids["load"], ids["rates"], ids["page"]
    assert why(tx, ids["root"]) == f"waiting for children {load} (load), {rates} (rates) and {page} (page)"
    assert why(tx, page) == f"waiting for its siblings {load} (load) and {rates} (rates), which it comes after"
    call(tx, "complete_jobs", [rates])
    sibling = f"waiting for its sibling {load} (load), which it comes after"
    assert (why(tx, page), why(tx, ids["draw"])) == (sibling, f"below job {page}, which is {sibling}")
    call(tx, "complete_jobs", [load])
    assert why(tx, page) == f"waiting for child {ids['draw']} (draw)"
    assert why(tx, ids["draw"]).startswith("ready")


def test_what_somebody_held_when_it_was_to_start_is_left_to_maintain(db: Conn, connect: Connections) -> None:
    ids = plant(db, node("root", node("first"), node("second", after=["first"])))
    holder = connect(autocommit=False)
    holder.execute("select from pgworker.job where id = any(%s) for update", [[ids["second"], ids["root"]]])
    call(db, "complete_jobs", [ids["first"]])
    opens = "about to start: the siblings that it came after have ended, and maintain() opens it"
    assert why(db, ids["second"]) == opens
    holder.rollback()
    leftovers(db)
    assert why(db, ids["second"]) == "no worker is live"
    holder.execute("select from pgworker.job where id = %s for update", [ids["root"]])
    call(db, "complete_jobs", [ids["second"]])
    assert why(db, ids["root"]) == "about to go on: its children have ended, and maintain() releases it"
    holder.rollback()
    leftovers(db)
    assert why(db, ids["root"]) == "no worker is live"


def test_of_many_children_a_few_are_named(tx: Conn, worker: int) -> None:
    children = ",".join(['{"identifier": "c"}'] * 100)
    root = value(tx, "select id from pgworker.add_job_tree(%s)", f'{{"identifier": "r", "children": [{children}]}}')
    names = ", ".join(f"{root + n} (c)" for n in (1, 2, 3))
    assert why(tx, root) == f"waiting for children {names} and 97 more"


def test_a_running_job_says_who_runs_it_and_whether_it_is_to_stop(tx: Conn, worker: int) -> None:
    job = add(tx)["id"]
    assert claim_ids(tx, worker) == [job]
    running = f"claimed by worker {worker} (w) since 2031-05-17 12:00:00+00"
    assert why(tx, job) == running
    call(tx, "cancel_jobs", [job], reason="no need")
    assert why(tx, job) == f"{running}, asked to stop (it will end as cancelled): no need"
    tx.execute("delete from pgworker.worker")
    assert why(tx, job).endswith(", which is not registered any more: force_unlock_workers() takes it back")


def test_what_has_ended_says_how(tx: Conn) -> None:
    at = r" at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+00"
    assert re.fullmatch("completed" + at, why(tx, job_in(tx, "completed")))
    assert re.fullmatch("failed" + at + " after 1 attempt: it broke", why(tx, job_in(tx, "failed")))
    assert re.fullmatch("cancelled" + at + ": no need", why(tx, job_in(tx, "cancelled")))
    job = add(tx)["id"]
    call(tx, "permanently_fail_jobs", [job], "by hand")
    assert re.fullmatch("failed" + at + " after 0 attempts: by hand", why(tx, job))


def test_a_job_that_somebody_has_locked(db: Conn, connect: Connections) -> None:
    """An idle transaction, or a claim whose client does not read the answer: claims pass over it."""
    claim_ids(db, register(db), tasks=["b"])
    other, held = connect(), connect(autocommit=False)
    worker = register(other)
    claim_ids(other, worker)
    job, queued = add(db)["id"], add(db, queue_name="q")["id"]
    locked = f"is locked by session {held.info.backend_pid}, whose transaction has not ended: claims pass over it"
    held.execute("select from pgworker.job where id = %s for update", [job])
    assert why(db, job) == f"it {locked}"
    assert why(held, job).startswith("ready")  # whoever asks is not in his own way
    assert why(db, queued).startswith("ready")
    held.rollback()
    assert why(db, job).startswith("ready")
    claim_ids(held, worker, 2)
    assert why(db, job) == f"it {locked}"
    held.rollback()
    call(db, "resume_queue", "q")
    assert claim_ids(other, worker, 2) == [job, queued]
    call(other, "release_jobs", worker, [queued])
    call(held, "pause_queue", "q")
    assert why(db, queued) == f"queue q {locked}"
    held.rollback()
    assert why(db, queued).startswith("ready")


def test_unknown_and_null(tx: Conn) -> None:
    assert why(tx, 12345678) == "no job 12345678: there never was one, or it has ended and is not kept"
    assert why(tx, None) is None
