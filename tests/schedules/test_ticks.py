"""One job for each tick: when maintain() is late, dies, is called by everybody, or the clock is set."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from pgworker_client.embedded import EmbeddedServer
from tests.calling import Conn, call, claim, refused, register, rows, value, values
from tests.clock import move_clock
from tests.connections import Connections
from tests.parallel import in_parallel
from tests.schedules.ticking import START, at, maintain, schedule, shown, ticks


@pytest.fixture
def clocked(tx: Conn) -> Conn:
    """A transaction in which it is the start of everything."""
    move_clock(tx, START)
    return tx


def test_a_job_is_added_at_each_tick_and_not_before(clocked: Conn) -> None:
    schedule(clocked, "*/15 * * * *")
    for moment, expected in [
        ("10:29:59.999", []),
        ("10:30:00", ["10:30"]),
        ("10:30:00", ["10:30"]),
        ("10:44:59", ["10:30"]),
        ("10:45:02", ["10:30", "10:45"]),
    ]:
        at(clocked, moment)
        maintain(clocked)
        assert ticks(clocked) == expected, moment


def test_the_job_is_as_was_asked_for_and_says_its_tick(clocked: Conn) -> None:
    schedule(clocked, "21 * * * *", payload='{"n": 1, "_cron": "mine"}', queue_name="q", max_attempts=7, job_key="k",
             priority=-3, flags=["slow"], job_key_mode="preserve_run_at")  # fmt: skip
    at(clocked, "10:21:03")
    maintain(clocked)
    (job,) = rows(clocked, "select * from pgworker.jobs")
    assert job["payload"] == {"n": 1, "_cron": {"ts": "2030-05-10T10:21:00Z", "backfilled": False}}
    assert (job["task_identifier"], job["queue_name"], job["max_attempts"]) == ("t", "q", 7)
    assert (job["key"], job["priority"], job["flags"], job["state"]) == ("k", -3, ["slow"], "ready")
    assert str(job["run_at"]) == "2030-05-10 10:21:00+00:00"
    assert str(shown(clocked)["last_tick"]) == "2030-05-10 10:21:00+00:00"
    assert str(shown(clocked)["next_tick"]) == "2030-05-10 11:21:00+00:00"


def test_the_job_of_a_tick_is_claimed_by_a_session_whose_cursor_is_ahead(clocked: Conn) -> None:
    worker = register(clocked)
    schedule(clocked, "21 * * * *")
    at(clocked, "10:21:04")
    call(clocked, "add_job", "t")
    assert len(claim(clocked, worker, 10)) == 1
    at(clocked, "10:21:05")
    maintain(clocked)
    (job,) = claim(clocked, worker, 10)
    assert job["payload"]["_cron"]["ts"] == "2030-05-10T10:21:00Z"


def test_years_of_ticks_are_all_run_once_and_nothing_else(tx: Conn) -> None:
    move_clock(tx, "2027-12-31 12:00+00")
    schedule(tx, "30 2 * * mon", "weekly", "weekly", timezone="Europe/Berlin")
    schedule(tx, "0 0 29 2 *", "leap", "leap")
    schedule(tx, "0 8 1 * *", "monthly", "monthly", timezone="America/New_York")
    moment = value(tx, "select pgworker.clock()")
    while moment.year < 2033:
        maintain(tx)
        moment = value(tx, "select min(next_tick) from pgworker.schedules")
        move_clock(tx, str(moment))
    for name in ("weekly", "leap", "monthly"):
        run = values(tx, "select run_at from pgworker.jobs where task_identifier = %s order by run_at", name)
        expected = values(
            tx,
            "select t from pgworker.schedules s"
            " cross join pgworker.cron_preview(s.cron, 1000, '2027-12-31 12:00+00', s.timezone) t"
            " where s.name = %s and t < s.next_tick order by t",
            name,
        )
        assert run == expected
    assert ticks(tx, "leap") == ["00:00", "00:00"]
    assert len(ticks(tx, "monthly")) == 60


def test_a_new_schedule_does_not_run_for_the_past(clocked: Conn) -> None:
    schedule(clocked, "0 * * * *", backfill="3 days")
    maintain(clocked)
    assert ticks(clocked) == []
    assert shown(clocked)["last_tick"] is None
    at(clocked, "10:21:00")
    schedule(clocked, "21 10 * * *", "made at its tick", backfill="3 days")
    maintain(clocked)
    assert ticks(clocked) == []


def test_a_tick_missed_in_a_short_restart_is_not_lost(clocked: Conn) -> None:
    schedule(clocked)
    at(clocked, "10:25:59")
    maintain(clocked)
    assert ticks(clocked) == ["10:21", "10:22", "10:23", "10:24", "10:25"]
    assert not any(values(clocked, "select (payload->'_cron'->'backfilled')::boolean from pgworker.jobs"))


def test_without_backfill_older_ticks_are_not_run(clocked: Conn) -> None:
    schedule(clocked, "*/2 * * * *")
    schedule(clocked, "0 11 * * *", "daily", "daily")
    at(clocked, "14:05:10")
    maintain(clocked)
    assert ticks(clocked) == ["14:02", "14:04"]
    assert ticks(clocked, "daily") == []
    assert str(shown(clocked, "daily")["next_tick"]) == "2030-05-11 11:00:00+00:00"


def test_backfill_makes_up_for_missed_ticks_in_order_and_no_further_back(clocked: Conn) -> None:
    schedule(clocked, "0 * * * *", backfill="3 hours", job_key_mode="replace")
    schedule(clocked, "0 * * * *", "all", "all", backfill="10 years")
    at(clocked, "15:02:00")
    maintain(clocked)
    assert ticks(clocked) == ["13:00", "14:00", "15:00"]
    assert ticks(clocked, "all") == ["11:00", "12:00", "13:00", "14:00", "15:00"]  # since it is known
    late = values(
        clocked, "select payload->'_cron'->'backfilled' from pgworker.jobs where task_identifier = 't' order by id"
    )
    assert late == [True, True, False]


def test_backfill_reaches_to_the_second_and_its_months_have_thirty_days(tx: Conn) -> None:
    move_clock(tx, "2030-01-01 00:00:01+00")
    schedule(tx, "0 0 * * *", backfill="1 month")
    move_clock(tx, "2030-03-03 00:00:00+00")
    maintain(tx)
    assert len(ticks(tx)) == 31


def test_a_long_backfill_is_run_in_portions_that_do_not_keep_others_waiting(clocked: Conn) -> None:
    schedule(clocked, backfill="1 day")
    at(clocked, "14:20:30")
    schedule(clocked, "0 * * * *", "other", "other", backfill="1 day")
    at(clocked, "15:00:10")
    assert maintain(clocked) == pytest.approx(0.01)
    assert ticks(clocked, "other") == ["15:00"]
    assert len(ticks(clocked)) == 100
    at(clocked, "15:00:11")
    assert maintain(clocked) == pytest.approx(0.01)
    at(clocked, "15:00:12")
    assert maintain(clocked) == pytest.approx(1)
    preview = "select to_char(t at time zone 'UTC', 'HH24:MI') from pgworker.cron_preview('* * * * *', 280, %s) t"
    expected = values(clocked, preview, START)
    assert ticks(clocked) == expected


def test_many_long_backfills_do_not_keep_a_new_tick_waiting(clocked: Conn) -> None:
    for n in range(12):
        schedule(clocked, name=f"s{n}", identifier="late", backfill="1 day")
    at(clocked, "17:59:30")
    schedule(clocked, "0 * * * *")
    at(clocked, "18:00:00")
    maintain(clocked)
    at(clocked, "18:00:01")
    maintain(clocked)
    assert ticks(clocked) == ["18:00"], values(clocked, "select last_error from pgworker.schedules")


def test_a_thousand_schedules_due_at_once_are_all_run(clocked: Conn) -> None:
    clocked.execute("select pgworker.schedule_job('s' || n, '30 10 * * *', 't') from generate_series(1, 2500) n")
    at(clocked, "10:30")
    assert maintain(clocked) == pytest.approx(0.01)
    assert maintain(clocked) == pytest.approx(0.01)
    assert len(ticks(clocked)) == 2000
    assert maintain(clocked) == pytest.approx(1)
    assert len(ticks(clocked)) == 2500


def test_a_clock_that_goes_back_runs_nothing_twice(clocked: Conn) -> None:
    schedule(clocked, "*/10 * * * *", backfill="1 day")
    at(clocked, "11:00:00")
    maintain(clocked)
    before = ticks(clocked)
    assert before == ["10:30", "10:40", "10:50", "11:00"]
    for moment in ("10:20:00", "10:30:00", "10:59:59"):
        at(clocked, moment)
        maintain(clocked)
        call(clocked, "pause_schedule", "s")
        call(clocked, "resume_schedule", "s")
        schedule(clocked, "*/5 * * * *", backfill="1 day")
        schedule(clocked, "*/10 * * * *", backfill="1 day")
        maintain(clocked)
        assert ticks(clocked) == before
    at(clocked, "11:10:00")
    maintain(clocked)
    assert ticks(clocked) == [*before, "11:10"]


def test_changed_settings_keep_the_ticks_that_are_owed(clocked: Conn) -> None:
    schedule(clocked, "*/10 * * * *", backfill="1 hour")
    at(clocked, "10:51:00")
    changed = schedule(clocked, "0,10,20,30,40,50 * * * *", identifier="new", backfill="1 hour")
    assert (changed["identifier"], changed["cron"]) == ("new", "0,10,20,30,40,50 * * * *")
    maintain(clocked)
    assert ticks(clocked, "new") == ["10:30", "10:40", "10:50"]


@pytest.mark.parametrize("new", [("*/5 * * * *", "UTC"), ("*/10 * * * *", "Europe/Berlin")])
def test_a_schedule_that_is_changed_in_its_timing_begins_anew(clocked: Conn, new: tuple[str, str]) -> None:
    schedule(clocked, "*/10 * * * *", backfill="1 hour")
    at(clocked, "10:30:00")
    maintain(clocked)
    at(clocked, "10:56:00")
    changed = schedule(clocked, new[0], timezone=new[1], backfill="1 hour")
    assert str(changed["last_tick"]) == "2030-05-10 10:30:00+00:00"
    at(clocked, "11:00:00")
    maintain(clocked)
    assert ticks(clocked) == ["10:30", "11:00"]


def test_ticks_of_a_paused_schedule_are_not_made_up_for(clocked: Conn) -> None:
    schedule(clocked, "*/10 * * * *", backfill="1 day")
    at(clocked, "10:30:00")
    maintain(clocked)
    (paused,) = call(clocked, "pause_schedule", "s")
    assert (paused["paused"], paused["next_tick"]) == (True, None)
    at(clocked, "10:55:00")
    assert maintain(clocked) == pytest.approx(1)
    schedule(clocked, "*/10 * * * *", backfill="1 day", priority=3)  # does not wake it up
    maintain(clocked)
    (resumed,) = call(clocked, "resume_schedule", "s")
    assert (resumed["paused"], str(resumed["next_tick"])) == (False, "2030-05-10 11:00:00+00:00")
    maintain(clocked)
    assert ticks(clocked) == ["10:30"]
    at(clocked, "11:00:00")
    call(clocked, "resume_schedule", "s")  # it is not paused: what it owes stays
    maintain(clocked)
    assert ticks(clocked) == ["10:30", "11:00"]


def test_an_unscheduled_job_is_not_run_and_what_was_added_stays(clocked: Conn) -> None:
    schedule(clocked, "*/10 * * * *")
    at(clocked, "10:30:00")
    maintain(clocked)
    (gone,) = call(clocked, "unschedule_job", "s")
    assert gone["name"] == "s"
    assert str(gone["last_tick"]) == "2030-05-10 10:30:00+00:00"
    at(clocked, "10:40:00")
    maintain(clocked)
    assert ticks(clocked) == ["10:30"]
    for unknown in ("s", None):
        assert call(clocked, "unschedule_job", unknown, columns="name") == [{"name": None}]


def test_runs_with_a_key_do_not_pile_up(clocked: Conn) -> None:
    schedule(clocked, job_key="k", job_key_mode="unsafe_dedupe")
    at(clocked, "10:23:10")
    maintain(clocked)
    (job,) = rows(clocked, "select * from pgworker.jobs")
    assert (job["revision"], job["payload"]["_cron"]["ts"]) == (2, "2030-05-10T10:21:00Z")
    call(clocked, "get_jobs", register(clocked))
    at(clocked, "10:24:00")
    maintain(clocked)
    assert value(clocked, "select count(*) from pgworker.jobs") == 1
    assert len(ticks(clocked)) == 1


def test_maintain_wants_to_be_called_when_the_next_tick_is_due(clocked: Conn) -> None:
    assert maintain(clocked) == pytest.approx(1)
    schedule(clocked, "21 10 * * *")
    assert maintain(clocked) == pytest.approx(1)
    at(clocked, "10:20:59.700")
    assert maintain(clocked) == pytest.approx(0.3)
    call(clocked, "pause_schedule", "s")
    assert maintain(clocked) == pytest.approx(1)


def test_what_a_rolled_back_transaction_scheduled_is_not_run(db: Conn) -> None:
    move_clock(db, START)
    with db.transaction(force_rollback=True):
        schedule(db)
    at(db, "10:21:00")
    maintain(db)
    assert ticks(db) == []


def test_a_crash_in_the_middle_of_a_tick_loses_and_doubles_nothing(own_server: EmbeddedServer) -> None:
    with psycopg.connect(own_server.dsn(), autocommit=True) as conn:
        move_clock(conn, START)
        schedule(conn)
        at(conn, "10:21:00")
        maintain(conn)
    dying = psycopg.connect(own_server.dsn())
    dying.execute("select pgworker.fake_now('2030-05-10 10:22:00+00')")
    dying.execute("select pgworker.maintain()")
    assert ticks(dying) == ["10:21", "10:22"]
    own_server.restart("immediate")
    dying.close()
    with psycopg.connect(own_server.dsn(), autocommit=True) as conn:
        assert ticks(conn) == ["10:21"]
        for moment in ("10:22:00", "10:22:30", "10:23:00"):
            at(conn, moment)
            maintain(conn)
        assert ticks(conn) == ["10:21", "10:22", "10:23"]


def test_any_number_of_sessions_add_one_job_a_tick(dsn: str, db: Conn) -> None:
    move_clock(db, START)
    for n in range(5):
        schedule(db, name=f"s{n}", identifier=f"t{n}", backfill="1 day")
    moments = [f"2030-05-10 {10 + n // 60}:{n % 60:02}:00+00" for n in range(21, 81)]

    def work(conn: Conn) -> None:
        for moment in moments:
            conn.execute("select pgworker.fake_now(%s)", [moment])
            conn.execute("select pgworker.maintain()")

    in_parallel(dsn, [work] * 8)
    move_clock(db, moments[-1])
    maintain(db)
    expected = [moment[11:16] for moment in moments]
    assert [ticks(db, f"t{n}") for n in range(5)] == [expected] * 5


def test_a_schedule_that_somebody_is_changing_does_not_keep_the_others_waiting(db: Conn, connect: Connections) -> None:
    move_clock(db, START)
    schedule(db, name="held", identifier="held")
    schedule(db)
    other = connect(autocommit=False)
    schedule(other, name="held", identifier="new")
    at(db, "10:21:00")
    assert maintain(db) == pytest.approx(1)  # not at once: there is nothing to do but wait
    assert (ticks(db), ticks(db, "held")) == (["10:21"], [])
    other.commit()
    maintain(db)
    assert (ticks(db), ticks(db, "new")) == (["10:21"], ["10:21"])


def test_two_that_change_many_schedules_in_any_order_do_not_deadlock(dsn: str, db: Conn) -> None:
    def change(names: str) -> Any:
        def work(conn: Conn) -> None:
            for _ in range(20):
                with conn.transaction():
                    for name in names:
                        schedule(conn, name=name)
                    call(conn, "pause_schedule", names[0])
                    call(conn, "load_crontab", "0 4 * * * x\n0 5 * * * y", prune=True)
                    call(conn, "unschedule_job", names[-1])

        return work

    def run(conn: Conn) -> None:
        conn.execute("select pgworker.fake_now('2030-05-10 10:21:00+00')")
        for _ in range(50):
            conn.execute("select pgworker.maintain()")

    move_clock(db, "")
    in_parallel(dsn, [change("abc"), change("cba"), change("bca"), run])
    assert len(values(db, "select name from pgworker.schedules where from_crontab")) == 2


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_strict_isolation_runs_a_tick_once_too(db: Conn, connect: Connections, level: str) -> None:
    move_clock(db, START)
    schedule(db)
    strict = connect(autocommit=False, options="-cdefault_transaction_isolation=" + level.replace(" ", "\\ "))
    strict.execute("select pgworker.fake_now('2030-05-10 10:21:00+00')")
    at(db, "10:21:00")
    maintain(db)
    with pytest.raises(psycopg.errors.SerializationFailure):  # its snapshot is older
        strict.execute("select pgworker.maintain()")
    strict.rollback()
    strict.execute("select pgworker.fake_now('2030-05-10 10:22:00+00')")
    strict.execute("select pgworker.maintain()")
    strict.commit()
    assert ticks(db) == ["10:21", "10:22"]


def test_a_job_with_the_key_that_somebody_holds_does_not_stop_maintain(db: Conn, connect: Connections) -> None:
    move_clock(db, START)
    schedule(db, name="blocked", identifier="blocked", job_key="k")
    schedule(db)
    other = connect(autocommit=False)
    call(other, "add_job", "other", job_key="k")
    at(db, "10:21:00")
    maintain(db)
    assert (ticks(db), ticks(db, "blocked")) == (["10:21"], [])
    assert "lock timeout" in shown(db, "blocked")["last_error"]
    assert str(shown(db, "blocked")["next_tick"]) == "2030-05-10 10:21:00+00:00"
    other.rollback()
    at(db, "10:21:04")
    maintain(db)
    assert ticks(db, "blocked") == []  # put off for a few seconds
    at(db, "10:21:05")
    maintain(db)
    assert ticks(db, "blocked") == ["10:21"]
    assert shown(db, "blocked")["last_error"] is None


def test_schedules_that_cannot_be_run_do_not_stop_the_others(db: Conn) -> None:
    move_clock(db, START)
    for n in range(25):
        schedule(db, name=f"broken {n}", identifier="broken")
    at(db, "10:20:31")
    schedule(db)
    # What no call can bring about: a row that the rules of adding refuse.
    db.execute("update pgworker.schedule set priority = null, flags = '{{a},{b}}' where name like 'broken%%'")
    at(db, "10:21:00")
    assert [maintain(db) for _ in range(3)] == [pytest.approx(0.01), pytest.approx(0.01), pytest.approx(1)]
    assert (ticks(db), ticks(db, "broken")) == (["10:21"], [])
    assert value(db, "select count(*) from pgworker.schedules where last_error like 'flags must be%%'") == 25
    schedule(db, name="broken 3", identifier="mended")
    maintain(db)
    assert ticks(db, "mended") == ["10:21"]


def test_pausing_what_is_not_there_is_refused(tx: Conn) -> None:
    for function in ("pause_schedule", "resume_schedule"):
        with refused(tx, "22023", "there is no schedule 'no'", hint="pgworker.schedules"):
            call(tx, function, "no")
        with refused(tx, "22004", "name must not be null"):
            call(tx, function, None)


def test_maintain_finds_what_is_due_by_index_however_many_schedules_there_are(clocked: Conn) -> None:
    clocked.execute("select pgworker.schedule_job('s' || n, '30 11 * * *', 't') from generate_series(1, 3000) n")
    clocked.execute("analyze pgworker.schedule")
    for query in (
        "select s.name from pgworker.schedule s where s.due_at <= '2030-05-10 10:21+00' and not s.paused"
        " order by s.due_at limit 1000 for update skip locked",
        "select min(s.due_at) from pgworker.schedule s where s.due_at > '2030-05-10 10:21+00' and not s.paused",
    ):
        plan = json.dumps(value(clocked, f"explain (format json) {query}"))
        assert "schedule_due" in plan
        assert '"Seq Scan"' not in plan
        assert '"Sort"' not in plan
