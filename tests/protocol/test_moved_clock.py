"""pgworker.fake_now: time that a test moves, in its own session, where the database allows it."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from tests.calling import Conn, add, call, claim_ids, refused, register, row, state, value
from tests.connections import Connections

ALLOW = "insert into pgworker.setting values ('allow_fake_now', 'on')"


def test_the_clock_stands_where_it_was_put_until_it_is_set_free(tx: Conn) -> None:
    tx.execute(ALLOW)
    assert (
        str(value(tx, "select pgworker.fake_now('2030-01-31 12:00:00.123456+01')"))
        == "2030-01-31 11:00:00.123456+00:00"
    )
    assert str(value(tx, "select pgworker.clock()")) == "2030-01-31 11:00:00.123456+00:00"
    assert value(tx, "select pgworker.fake_now(null) = statement_timestamp()")
    assert value(tx, "select pgworker.clock() = statement_timestamp()")


def test_it_stands_whatever_the_session_says_of_dates_and_zones(tx: Conn) -> None:
    tx.execute(ALLOW)
    tx.execute("set local datestyle = 'SQL, DMY'")
    tx.execute("set local timezone = 'America/New_York'")
    tx.execute("select pgworker.fake_now('2030-02-01 00:00+00')")
    tx.execute("set local datestyle = 'ISO, MDY'")
    tx.execute("set local timezone = 'Asia/Tokyo'")
    assert value(tx, "select pgworker.clock() = '2030-02-01 00:00+00'")


def test_a_retry_after_three_days_takes_no_three_days(tx: Conn) -> None:
    tx.execute(ALLOW)
    tx.execute("select pgworker.fake_now('2030-01-01 08:00+00')")
    worker, job = register(tx), add(tx)["id"]
    assert claim_ids(tx, worker) == [job]
    call(tx, "fail_job", worker, job, "not yet", "2030-01-04 08:00+00")
    for moment, expected in [("2030-01-04 07:59:59+00", []), ("2030-01-04 08:00+00", [job])]:
        tx.execute("select pgworker.fake_now(%s)", [moment])
        assert claim_ids(tx, worker) == expected


def test_other_sessions_keep_their_time_and_a_rollback_gives_it_back(db: Conn, connect: Connections) -> None:
    db.execute(ALLOW)
    other = connect()
    with db.transaction(force_rollback=True):
        db.execute("select pgworker.fake_now('2100-01-01')")
        assert value(other, "select pgworker.clock() < '2100-01-01'")
    assert value(db, "select pgworker.clock() = statement_timestamp()")
    db.execute("select pgworker.fake_now('2100-01-01')")
    assert value(db, "select pgworker.clock() = '2100-01-01'")


def test_the_setting_by_which_it_is_done_works_for_sessions_that_cannot_call_it(db: Conn, connect: Connections) -> None:
    db.execute(ALLOW)
    job = add(db, run_at="2100-01-01")["id"]
    assert state(connect(options="-cpgworker.fake_now=2100-01-01"), job) == "ready"
    assert state(connect(), job) == "scheduled"


def test_it_is_refused_where_the_database_does_not_allow_it(tx: Conn) -> None:
    for setting in (None, "off", "yes"):
        if setting is not None:
            tx.execute("delete from pgworker.setting")
            tx.execute("insert into pgworker.setting values ('allow_fake_now', %s)", [setting])
        for at in ("2030-01-01", None):
            with refused(tx, "55000", "the clock of this database must not be moved", hint="allow_fake_now"):
                tx.execute("select pgworker.fake_now(%s)", [at])
    assert value(tx, "select pgworker.clock() = statement_timestamp()")


@pytest.mark.parametrize("at", ["infinity", "-infinity", "0044-03-15 BC"])
def test_times_that_are_none_are_refused(tx: Conn, at: str) -> None:
    tx.execute(ALLOW)
    with refused(tx, "22023", "at must lie between the years 1 and 9999"):
        tx.execute("select pgworker.fake_now(%s)", [at])


@pytest.mark.parametrize("grant", ["grant_producer", "grant_worker", "grant_observer"])
def test_whoever_may_use_the_queue_may_test_with_it(
    db: Conn, connect: Connections, role: Callable[..., str], grant: str
) -> None:
    call(db, grant, role("tester"))
    tester = connect(user="tester")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        tester.execute("select pgworker.fake_now('2030-01-01')")
    db.execute(ALLOW)
    assert row(tester, "select extract(year from pgworker.fake_now('2030-01-01')) as year")["year"] == 2030
