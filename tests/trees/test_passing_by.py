"""Who has counters locked waits for nobody who may come to wait for them: what another holds is passed by."""

from __future__ import annotations

import pytest

from tests.calling import Conn, call, claim_ids, state, value
from tests.connections import Connections
from tests.sessions import Background
from tests.trees.planting import complete, fail, leftovers, node, only, plant, start, states

ENDS = pytest.mark.parametrize("commits", [True, False], ids=["committed", "rolled back"])
RETRY = "select id from pgworker.retry_jobs(array[%s::bigint, %s])"


@ENDS
def test_two_who_forget_both_ends_of_a_link_do_not_deadlock(db: Conn, connect: Connections, commits: bool) -> None:
    """The second had counted on the counter that the first needed next."""
    ender = connect()
    inner = node("inner", node("first"), node("then", after=["first"], on_failure="remove"), node("later"))
    others = [node(f"o{n}", on_failure="ignore") for n in range(41)]  # o4 is counted where outer is
    ids = plant(db, node("root", node("outer", inner, node("fails"), on_failure="remove"), *others))
    complete(db, ids["first"])
    worker = start(db, ids["o4"], start(db, ids["then"]))
    db.execute("set lock_timeout = '2s'")
    with ender.transaction(force_rollback=not commits):
        call(ender, "fail_job", worker, ids["then"], "broken", permanent=True)
        fail(db, ids["fails"])
        assert only(states(db, ids), "outer", "inner", "first") == [None, None, None]
        call(ender, "fail_job", worker, ids["o4"], "broken", permanent=True)
    leftovers(db)
    if not commits:
        assert call(db, "heartbeat", worker) == [{"job_id": ids["then"], "notice": "cancel"}]
        call(db, "complete_job", worker, ids["then"])
    leftovers(db)
    assert value(db, "select count(*) from pgworker.dependency") == 0


@ENDS
def test_a_live_child_that_is_held_while_its_parent_is_retried_is_counted(
    db: Conn, connect: Connections, commits: bool
) -> None:
    """The child was counted nowhere and taken off nevertheless: its parent started too early, then pending was -1."""
    holder, other, retrier = connect(), connect(), connect()
    one = node("one", node("child"), node("fails"), on_failure="ignore")
    two = node("two", node("runs"), node("breaks"), on_failure="ignore")
    ids = plant(db, node("earlier", two))  # in the order of ids this is come to first
    ids |= plant(db, node("root", one))
    fail(db, ids["fails"])
    start(db, ids["runs"])
    fail(db, ids["breaks"])
    holder.execute("begin")
    holder.execute("select from pgworker.job where id = %s for update", [ids["runs"]])
    # Retries the first as it is now, a child of which is not live; by the time it comes to it, it is, and was counted.
    retrying = Background(retrier, RETRY, ids["one"], ids["two"])
    retrying.wait_until_blocked(db)
    call(db, "retry_jobs", [ids["one"]])
    worker = start(db, ids["child"])
    fail(db, ids["fails"])
    assert only(states(db, ids), "one", "child", "fails") == ["failed", "running", "failed"]
    other.execute("begin")
    call(other, "set_progress", worker, ids["child"], "1")
    holder.execute("commit")
    retrying.wait_until_blocked(db)
    other.execute("commit" if commits else "rollback")
    retrying.result()
    assert value(db, "select pending from pgworker.counter where job_id = %s", ids["one"]) == 2
    call(db, "complete_job", worker, ids["child"])
    assert only(states(db, ids), "one", "child", "fails") == ["waiting", "completed", "ready"]
    complete(db, ids["fails"])
    complete(db, ids["one"])


@ENDS
def test_a_phase_that_opens_does_not_wait_for_a_retry_of_what_it_waited_for(
    db: Conn, connect: Connections, commits: bool
) -> None:
    """Each held a part of the counter that the other needed."""
    holder, retrier = connect(), connect()
    before = [node(f"b{n}", on_failure="ignore") for n in range(40)]
    ids = plant(db, node("root", *before, node("next", after=[b["name"] for b in before])))
    fail(db, ids["b0"])  # counted in slot 1, and so on
    last = start(db, ids["b2"])
    call(db, "complete_jobs", [ids[f"b{n}"] for n in range(1, 40) if n != 2])
    holder.execute("begin")
    holder.execute("select from pgworker.counter where job_id = %s and slot = 2 for update", [ids["next"]])
    retrying = Background(retrier, "select id from pgworker.retry_jobs(array[%s::bigint])", ids["b0"])
    retrying.wait_until_blocked(db)
    db.execute("set lock_timeout = '2s'")
    call(db, "complete_job", last, ids["b2"])
    assert state(db, ids["next"]) == "waiting"
    if commits:
        holder.execute("commit")
        retrying.result()
        leftovers(db)
        assert state(db, ids["next"]) == "waiting"
        complete(db, ids["b0"])
    else:
        retrier.cancel()
        with pytest.raises(Exception, match="cancel"):
            retrying.result()
        holder.execute("commit")
        leftovers(db)
    complete(db, ids["next"])


def test_what_was_left_meanwhile_and_is_being_done_by_another_is_not_waited_for(db: Conn, connect: Connections) -> None:
    """Two maintain at once, each with counters that the other's next step needs."""
    holder, other, maintainer = connect(), connect(), connect()
    ids = plant(db, node("root", node("a")))
    gone = value(db, "insert into pgworker.counter values (0, false, 0, 0) returning job_id")
    db.execute("insert into pgworker.unsettled (job_id, what) values (%s, 'forget')", [gone])
    holder.execute("begin")
    holder.execute("select from pgworker.counter where job_id = %s for update", [gone])
    maintaining = Background(maintainer, "select pgworker.maintain()")
    maintaining.wait_until_blocked(db)
    # By somebody who began before it did.
    db.execute(
        "insert into pgworker.unsettled (n, job_id, what, due)"
        " values (nextval('pgworker.turn') + 1000, %s, 'release', pgworker.clock() - interval '1 hour')",
        [ids["root"]],
    )
    other.execute("begin")
    other.execute("select from pgworker.unsettled where job_id = %s for update", [ids["root"]])
    holder.execute("commit")
    maintaining.result()
    other.execute("commit")
    leftovers(db)
    assert claim_ids(db, start(db, ids["a"])) == []
