"""retry_jobs, cancel_jobs, force_unlock_workers: running again, stopping, taking away."""

from __future__ import annotations

import pytest

from tests.calling import PAST, Conn, add, call, claim, claim_ids, register, seen, state, value
from tests.connections import Connections
from tests.lifecycle import bring, job_in
from tests.sessions import Background


@pytest.mark.parametrize("ended", ["failed", "cancelled"])
def test_a_retried_job_runs_now_with_fresh_attempts(tx: Conn, ended: str) -> None:
    worker = register(tx)
    job = add(tx, run_at=PAST, max_attempts=2, queue_name="q", job_key="k", flags=["x"], payload="[1]")["id"]
    bring(tx, job, ended, worker)
    before = seen(tx, job)
    (after,) = call(tx, "retry_jobs", [job])
    changing = ("state", "attempts", "started_at", "finished_at", "run_at", "result")
    same = {name: before[name] for name in before if name not in changing}
    assert {name: after[name] for name in same} == same
    assert (after["state"], after["attempts"], after["finished_at"]) == ("ready", 0, None)
    assert value(tx, "select %s = now()", after["run_at"])
    for attempt in (1, 2):
        assert [claimed["attempts"] for claimed in claim(tx, worker)] == [attempt]
        call(tx, "fail_job", worker, job, "again", retry_at=PAST)
    assert state(tx, job) == "failed"
    assert len(call(tx, "retry_jobs", [job])) == 1


def test_the_next_attempt_of_a_retried_job_gets_what_the_last_one_left(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx)["id"]
    assert claim_ids(tx, worker) == [job]
    call(tx, "set_progress", worker, job, '{"page": 3}')
    call(tx, "fail_job", worker, job, "it broke", permanent=True)
    call(tx, "retry_jobs", [job])
    assert [claimed["progress"] for claimed in claim(tx, worker)] == [{"page": 3}]


def test_a_key_that_a_live_job_has_taken_stays_with_that_one(tx: Conn) -> None:
    old = add(tx, job_key="k")["id"]
    bring(tx, old, "failed")
    new = add(tx, job_key="k")["id"]
    (after,) = call(tx, "retry_jobs", [old])
    assert (after["key"], after["state"]) == (None, "ready")
    assert seen(tx, new)["key"] == "k"
    assert sorted(claim_ids(tx, register(tx), 10)) == [old, new]


def test_of_several_that_had_the_key_one_gets_it_back(tx: Conn) -> None:
    ids = []
    for _ in range(3):
        ids.append(add(tx, job_key="k")["id"])
        bring(tx, ids[-1], "cancelled")
    changed = call(tx, "retry_jobs", ids)
    assert [job["id"] for job in changed] == ids
    assert sorted(str(job["key"]) for job in changed) == ["None", "None", "k"]
    assert [job["state"] for job in changed] == ["ready"] * 3


def test_a_key_that_is_being_taken_does_not_break_the_retry(db: Conn, connect: Connections) -> None:
    adder, other = connect(), connect()
    old = add(db, job_key="k")["id"]
    bring(db, old, "cancelled")
    adder.execute("begin")
    new = add(adder, job_key="k")["id"]
    retrying = Background(other, "select * from pgworker.retry_jobs(array[%s::bigint])", old)
    retrying.wait_until_blocked(db)
    adder.execute("commit")
    (after,) = retrying.result()
    assert (after["id"], after["key"], after["state"]) == (old, None, "ready")
    assert seen(db, new)["key"] == "k"


def test_a_cancelled_run_is_cancelled_whatever_it_reports(tx: Conn) -> None:
    worker = register(tx)

    def stopping() -> int:
        return job_in(tx, "stopping", worker)

    value(tx, """select pgworker.complete_job(%s, %s, '{"done": 1}')""", worker, completed := stopping())
    (failed,) = call(tx, "fail_job", worker, stopping(), "it broke")
    (permanently,) = call(tx, "fail_job", worker, stopping(), "it broke", permanent=True)
    (cancelled,) = call(tx, "cancel_job", worker, stopping(), "I gave up")
    call(tx, "release_jobs", worker, [released := stopping()])
    jobs = [seen(tx, job) for job in (completed, failed["id"], permanently["id"], cancelled["id"], released)]
    assert [(job["state"], job["last_error"]) for job in jobs] == [("cancelled", "no need")] * 5
    assert claim_ids(tx, worker, 10) == []


@pytest.mark.parametrize(("reason", "shown"), [("too late", "too late"), (None, "cancelled")])
@pytest.mark.parametrize("running", [False, True])
def test_the_reason_is_kept(tx: Conn, running: bool, reason: str | None, shown: str) -> None:
    worker = register(tx)
    job = job_in(tx, "running" if running else "ready", worker)
    (changed,) = call(tx, "cancel_jobs", [job], reason)
    if running:
        assert changed["state"] == "running"
        call(tx, "complete_job", worker, job)
    assert (state(tx, job), seen(tx, job)["last_error"]) == ("cancelled", shown)


def test_the_first_reason_stays(tx: Conn) -> None:
    worker = register(tx)
    job = job_in(tx, "stopping", worker)
    assert call(tx, "cancel_jobs", [job], reason="another") == []
    call(tx, "complete_job", worker, job)
    assert seen(tx, job)["last_error"] == "no need"


def test_cancelling_the_head_lets_its_queue_go_on(tx: Conn) -> None:
    worker = register(tx)
    head, following = (add(tx, queue_name="q")["id"] for _ in range(2))
    call(tx, "cancel_jobs", [head])
    assert claim_ids(tx, worker, 10) == [following]


def test_a_running_job_that_is_to_stop_keeps_its_queue_until_it_has_stopped(tx: Conn) -> None:
    worker = register(tx)
    head, following = (add(tx, queue_name="q")["id"] for _ in range(2))
    assert claim_ids(tx, worker) == [head]
    call(tx, "cancel_jobs", [head])
    assert claim_ids(tx, worker, 10) == []
    call(tx, "complete_job", worker, head)
    assert claim_ids(tx, worker, 10) == [following]


@pytest.mark.parametrize("commits", [True, False])
def test_a_cancellation_that_meets_a_claim_asks_the_run_to_stop(db: Conn, connect: Connections, commits: bool) -> None:
    claimer, other = connect(), connect()
    worker = register(claimer)
    job = add(db)["id"]
    claimer.execute("begin")
    assert claim_ids(claimer, worker) == [job]
    cancelling = Background(other, "select * from pgworker.cancel_jobs(array[%s::bigint])", job)
    cancelling.wait_until_blocked(db)
    claimer.execute("commit" if commits else "rollback")
    (changed,) = cancelling.result()
    assert (changed["id"], changed["state"]) == (job, "running" if commits else "cancelled")
    assert call(claimer, "heartbeat", worker) == ([{"job_id": job, "notice": "cancel"}] if commits else [])


def test_forced_to_give_up_a_worker_loses_jobs_and_queues_and_attempts_stay_counted(tx: Conn) -> None:
    forced, other = register(tx), register(tx)
    plain, queued, last = add(tx)["id"], add(tx, queue_name="q")["id"], add(tx, max_attempts=1)["id"]
    following = add(tx, queue_name="q")["id"]
    to_be_cancelled = add(tx)["id"]
    assert claim_ids(tx, forced, 4) == [plain, queued, last, to_be_cancelled]
    call(tx, "cancel_jobs", [to_be_cancelled], reason="no need")
    theirs = job_in(tx, "running", other)
    before = seen(tx, theirs)

    changed = {job["id"]: job for job in call(tx, "force_unlock_workers", [forced, forced, None])}

    assert set(changed) == {plain, queued, last, to_be_cancelled}
    assert all(job == seen(tx, job["id"]) for job in changed.values())
    assert (changed[plain]["state"], changed[plain]["attempts"]) == ("ready", 1)
    assert (changed[last]["state"], changed[last]["attempts"]) == ("failed", 1)
    assert f"worker {forced} was forced" in changed[last]["last_error"]
    assert (changed[to_be_cancelled]["state"], changed[to_be_cancelled]["last_error"]) == ("cancelled", "no need")
    assert seen(tx, theirs) == before
    assert claim_ids(tx, other, 10) == [plain, queued]
    assert state(tx, following) == "ready"


def test_a_forced_worker_can_go_on_working(tx: Conn) -> None:
    worker = register(tx)
    job = job_in(tx, "running", worker)
    call(tx, "force_unlock_workers", [worker])
    assert claim_ids(tx, worker) == [job]
    call(tx, "complete_job", worker, job)


def test_forcing_several_workers_takes_all_of_theirs(tx: Conn) -> None:
    workers = [register(tx) for _ in range(3)]
    ids = [job_in(tx, "running", worker) for worker in workers]
    changed = call(tx, "force_unlock_workers", workers[:2])
    assert sorted(job["id"] for job in changed) == ids[:2]
    assert state(tx, ids[2]) == "running"
