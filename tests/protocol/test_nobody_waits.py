"""An open transaction, a stranger's lock or a huge request makes nobody wait who need not."""

from __future__ import annotations

from tests.calling import Conn, add, call, claim_ids, refused, register, rows, seen, state, value
from tests.clock import maintain
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
