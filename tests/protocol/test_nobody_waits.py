"""An open transaction, a stranger's lock or a huge request makes nobody wait who need not."""

from __future__ import annotations

from datetime import timedelta

from tests.calling import Conn, add, call, claim_ids, refused, register, rows, seen, state, value
from tests.clock import at, maintain
from tests.connections import Connections
from tests.protocol.test_presence import leave
from tests.sessions import Background


def hasty(connect: Connections) -> Conn:
    """A session whose statements fail rather than wait."""
    conn: Conn = connect()
    conn.execute("set lock_timeout = '2s'")
    conn.execute("set statement_timeout = '10s'")
    return conn


def test_pausing_a_new_queue_in_an_open_transaction_stops_no_claim(db: Conn, connect: Connections) -> None:
    admin, claimer = connect(), hasty(connect)
    worker = register(claimer)
    queued, other = add(db, queue_name="new")["id"], add(db)["id"]
    with admin.transaction():
        call(admin, "pause_queue", "new")
        assert claim_ids(claimer, worker, 10) == [other]
    assert claim_ids(claimer, worker, 10) == []
    call(db, "resume_queue", "new")
    assert claim_ids(claimer, worker, 10) == [queued]


def test_a_strangers_advisory_lock_does_not_stop_whoever_finds_nothing(db: Conn, connect: Connections) -> None:
    claimer = hasty(connect)
    worker = register(claimer)
    db.execute("select pg_advisory_lock(1886874483, 0)")
    assert claim_ids(claimer, worker) == []
    db.execute("select pg_advisory_unlock(1886874483, 0)")


def test_a_batch_with_failures_locks_in_the_order_of_ids(db: Conn, connect: Connections) -> None:
    claimer, admin, other = connect(), connect(), connect()
    worker = register(claimer)
    low, high = add(db)["id"], add(db)["id"]
    assert claim_ids(claimer, worker, 2) == [low, high]
    claimer.execute("set deadlock_timeout = '100ms'")
    admin.execute("set deadlock_timeout = '100ms'")
    with other.transaction():
        other.execute("select from pgworker.job where id = %s for update", [low])
        finishing = Background(
            claimer, "select * from pgworker.finish_jobs(%s, %s, null, %s, '{x}')", worker, [high], [low]
        )
        finishing.wait_until_blocked(db)
        # It waits for the lower id, and holds nothing yet that a cancel of both would wait for.
        admin.execute("set lock_timeout = '2s'")
        admin.execute("select from pgworker.job where id = %s for update", [high])
    cancelling = Background(admin, "select id from pgworker.cancel_jobs(%s)", [low, high])
    assert {row["job_id"] for row in finishing.result()} == {low, high}
    cancelling.result()


def test_a_rescue_leaves_what_somebody_holds_and_comes_back_for_it(db: Conn, connect: Connections) -> None:
    dying, admin, rescuer = connect(), connect(), hasty(connect)
    worker = register(dying)
    first, second = add(db)["id"], add(db)["id"]
    assert claim_ids(dying, worker, 2) == [first, second]
    maintain(db, 0)
    leave(db, dying)
    maintain(rescuer, 0)
    with admin.transaction():
        admin.execute("select from pgworker.job where id = %s for update", [first])
        maintain(rescuer, 6)
        assert (state(db, first), state(db, second)) == ("running", "ready")
    maintain(rescuer, 7)
    assert state(db, first) == "ready"
    with refused(db, "PW002", f"worker {worker} is unknown"):
        call(db, "heartbeat", worker)


def test_a_farewell_does_not_wait_for_a_job_that_somebody_holds(db: Conn, connect: Connections) -> None:
    leaving, admin = hasty(connect), connect()
    worker = register(leaving)
    held = add(db)["id"]
    assert claim_ids(leaving, worker) == [held]
    with admin.transaction():
        admin.execute("select from pgworker.job where id = %s for update", [held])
        call(leaving, "unregister_worker", worker)
    leave(db, leaving)
    maintain(db, 0)
    maintain(db, 6)
    assert state(db, held) == "ready"


def test_a_rescue_does_not_wait_for_whoever_holds_a_queue(db: Conn, connect: Connections) -> None:
    dying, leaving, admin, rescuer = connect(), connect(), connect(), hasty(connect)
    worker, other = register(dying), register(leaving)
    queued, overdue, plain = add(db, queue_name="q")["id"], add(db, "b", queue_name="r")["id"], add(db)["id"]
    call(db, "configure_task", "b", timeout="1 minute")
    at(leaving, 0)
    assert claim_ids(dying, worker, 10, tasks=["a"]) == [queued, plain]
    assert claim_ids(leaving, other, tasks=["b"]) == [overdue]
    maintain(db, 0)
    leave(db, dying)
    maintain(rescuer, 0)
    with admin.transaction():
        call(admin, "pause_queue", "q")
        call(admin, "pause_queue", "r")
        maintain(rescuer, 6)
        maintain(rescuer, 71)
        assert [state(db, job) for job in (queued, overdue, plain)] == ["running", "running", "ready"]
    maintain(rescuer, 73)
    maintain(rescuer, 73)
    assert [state(db, job) for job in (queued, overdue)] == ["ready", "scheduled"]
    with refused(db, "PW002", f"worker {worker} is unknown"):
        call(db, "heartbeat", worker)


def test_nobody_waits_for_the_rescue_of_a_job_that_ran_in_his_queue_before(db: Conn, connect: Connections) -> None:
    """What maintain() has found overdue may be given back, and its queue taken by the next, before it locks them."""
    reporter, rescuer = hasty(connect), connect()
    worker = register(reporter)
    before, now = add(db, queue_name="q")["id"], add(db, queue_name="q")["id"]
    assert claim_ids(reporter, worker) == [before]
    call(reporter, "fail_job", worker, before, "x")
    assert claim_ids(reporter, worker) == [now]
    with rescuer.transaction():
        assert value(rescuer, "select pgworker.lock_free_queues(%s)", [before]) == [before]
        call(reporter, "complete_job", worker, now)
    assert state(db, now) is None


def test_a_farewell_does_not_wait_for_whoever_holds_a_queue(db: Conn, connect: Connections) -> None:
    leaving, admin = hasty(connect), connect()
    worker = register(leaving)
    queued, plain = add(db, queue_name="q")["id"], add(db)["id"]
    assert claim_ids(leaving, worker, 2) == [queued, plain]
    with admin.transaction():
        call(admin, "pause_queue", "q")
        call(leaving, "unregister_worker", worker)
        assert (state(db, queued), state(db, plain)) == ("running", "ready")
    leave(db, leaving)
    maintain(db, 0)
    maintain(db, 6)
    assert state(db, queued) == "ready"


def test_a_rescue_does_not_wait_for_a_claim_that_found_nothing(db: Conn, connect: Connections) -> None:
    claiming, rescuer = connect(), hasty(connect)
    worker = register(db, lease="1 minute")
    job = add(db)["id"]
    assert claim_ids(claiming, worker, tasks=["a"]) == [job]
    db.execute("update pgworker.worker set lease_until = '-infinity'")
    with claiming.transaction():
        assert claim_ids(claiming, worker, tasks=["b"]) == []
        maintain(rescuer, 0)
        maintain(rescuer, 6)
        assert state(db, job) == "ready"
    maintain(rescuer, 7)
    for table in ("worker", "interest"):
        assert value(db, f"select count(*) from pgworker.{table}") == 0


def test_a_rescue_does_not_wait_for_a_farewell(db: Conn, connect: Connections) -> None:
    dying, leaving, other, rescuer = connect(), connect(), connect(), hasty(connect)
    worker, second = register(dying), register(other)
    job = add(db)["id"]
    assert claim_ids(other, second) == [job]
    leave(db, dying)
    leave(db, other)
    with leaving.transaction():
        call(leaving, "unregister_worker", worker)
        maintain(rescuer, 0)
        maintain(rescuer, 6)
        assert state(db, job) == "ready"


def test_a_rescue_that_somebody_puts_off_keeps_nothing_else_from_being_done(db: Conn, connect: Connections) -> None:
    dying, hung, admin = connect(), connect(), connect()
    call(db, "configure_task", "b", timeout="1 minute")
    for conn in (db, dying, hung):
        at(conn, 0)
    call(db, "schedule_job", "s", "@hourly", "from the schedule")
    worker, other = register(dying), register(hung)
    held, overdue = add(db)["id"], add(db, "b")["id"]
    assert claim_ids(dying, worker, tasks=["a"]) == [held]
    assert claim_ids(hung, other, tasks=["b"]) == [overdue]
    leave(db, dying)
    maintain(db, 0)
    with admin.transaction():
        admin.execute("select from pgworker.job where id = %s for update", [held])
        maintain(db, 3601)
        assert (state(db, held), state(db, overdue)) == ("running", "scheduled")
        assert maintain(db, 3601) > timedelta(seconds=0.5)  # and nobody asks again and again meanwhile
        assert value(db, "select count(*) from pgworker.jobs where task_identifier = 'from the schedule'") == 1
    maintain(db, 3602)
    assert state(db, held) == "ready"


def test_of_a_worker_that_vanished_in_a_claim_the_other_jobs_go_back(db: Conn, connect: Connections) -> None:
    """Its client stands still, with the answer unread."""
    frozen = connect()
    at(frozen, 0)
    at(db, 0)
    worker = register(frozen, lease="30 seconds")
    before, meanwhile = add(db)["id"], add(db)["id"]
    assert claim_ids(frozen, worker) == [before]
    with frozen.transaction():
        assert claim_ids(frozen, worker) == [meanwhile]
        for seconds in (31, 37):
            maintain(db, seconds)
        assert state(db, before) == "ready"
    assert state(db, meanwhile) == "running"
    maintain(db, 38)
    assert state(db, meanwhile) == "ready"
    with refused(db, "PW002", f"worker {worker} is unknown"):
        call(db, "heartbeat", worker)


def test_a_release_of_an_older_attempt_changes_nothing(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx)["id"]
    assert claim_ids(tx, worker) == [job]
    call(tx, "release_jobs", worker, [job], attempts=[2])
    assert state(tx, job) == "running"
    call(tx, "release_jobs", worker, [job], attempts=[1])
    assert (seen(tx, job)["state"], seen(tx, job)["attempts"]) == ("ready", 0)
    with refused(tx, "22023", "attempts must name one attempt per job: 2 for 1 jobs"):
        call(tx, "release_jobs", worker, [job], attempts=[1, 1])


def test_a_job_taken_away_and_claimed_again_is_not_said_to_be_lost(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx)["id"]
    assert claim_ids(tx, worker) == [job]
    call(tx, "force_unlock_workers", [worker])
    assert claim_ids(tx, worker) == [job]
    assert rows(tx, "select * from pgworker.heartbeat(%s)", worker) == []
    assert value(tx, "select count(*) from pgworker.notice") == 0


def test_asking_for_everything_is_no_error(tx: Conn) -> None:
    worker = register(tx)
    ids = [add(tx, queue_name="q")["id"], add(tx)["id"]]
    assert claim_ids(tx, worker, 2147483647) == ids


def test_one_prune_too_few_is_followed_at_once(tx: Conn) -> None:
    tx.execute("select count(*) from pgworker.add_jobs((select jsonb_agg('{\"identifier\": \"a\"}'::jsonb) "
               "from generate_series(1, 1001)))")  # fmt: skip
    tx.execute("select count(*) from pgworker.cancel_jobs(array(select id from pgworker.jobs))")
    tx.execute("update pgworker.finished set keep_until = '2000-01-01'")
    assert value(tx, "select pgworker.maintain() < interval '1 second'")
    assert value(tx, "select count(*) from pgworker.jobs") == 1
    assert value(tx, "select pgworker.maintain() = interval '1 second'")
    assert value(tx, "select count(*) from pgworker.jobs") == 0
