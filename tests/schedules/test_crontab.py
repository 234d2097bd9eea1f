"""Graphile Worker's crontab: read line by line, loaded as a whole, pruned of its own and nothing else."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.calling import Conn, Row, call, refused, values
from tests.clock import move_clock
from tests.schedules.ticking import START, maintain, schedule, shown, ticks


def load(conn: Conn, crontab: str | None, **arguments: Any) -> list[Row]:
    return call(conn, "load_crontab", crontab, **arguments)


def names(conn: Conn) -> list[str]:
    return values(conn, "select name from pgworker.schedules order by name")


def test_every_part_of_a_line(tx: Conn) -> None:
    (made,) = load(
        tx,
        "*/5 0-6 1,15 * mon  task:with-all_1"
        "  ?id=x&fill=4w3d2h1m5s&max=3&queue=q&priority=-3&jobKey=k&jobKeyMode=preserve_run_at&timezone=Europe/Berlin"
        '  {"a": "{?&=#", "b": [1, 2]}  ',
    )
    assert made == shown(tx, "x")
    assert (made["cron"], made["identifier"], made["payload"]) == (
        "*/5 0-6 1,15 * mon", "task:with-all_1", {"a": "{?&=#", "b": [1, 2]},
    )  # fmt: skip
    assert made["backfill"] == timedelta(weeks=4, days=3, hours=2, minutes=1, seconds=5)
    assert (made["max_attempts"], made["queue_name"], made["priority"]) == (3, "q", -3)
    assert (made["job_key"], made["job_key_mode"], made["timezone"]) == ("k", "preserve_run_at", "Europe/Berlin")
    assert (made["from_crontab"], made["flags"]) == (True, None)


def test_a_whole_file(tx: Conn) -> None:
    made = load(
        tx,
        "# every night\r\n"
        "0 4 * * * cleanup\r\n"
        "\r\n"
        "   \t \n"
        "  # indented\n"
        "@hourly cleanup ?id=hourly\n"
        "0 8 * * 1\treport\t?fill=3d\t{}\n"
        '* * * * * with_payload {"n": 1}\n',
    )
    assert [(one["name"], one["cron"], one["identifier"]) for one in made] == [
        ("cleanup", "0 4 * * *", "cleanup"),
        ("hourly", "@hourly", "cleanup"),
        ("report", "0 8 * * 1", "report"),
        ("with_payload", "* * * * *", "with_payload"),
    ]
    assert made[3]["payload"] == {"n": 1}
    assert made[1]["timezone"] == "UTC"


def test_values_are_written_as_in_a_url(tx: Conn) -> None:
    (made,) = load(tx, "* * * * * t ?id=a+b%20c%26&queue=%C3%BCber%2Dall&jobKey=100%")
    assert (made["name"], made["queue_name"], made["job_key"]) == ("a b c&", "über-all", "100%")


def test_loading_again_changes_nothing_and_keeps_what_is_owed(tx: Conn) -> None:
    move_clock(tx, START)
    crontab = "*/10 * * * * t ?fill=1h\n0 0 * * * other"
    first = load(tx, crontab)
    move_clock(tx, "2030-05-10 11:01:00+00")
    second = load(tx, crontab, prune=True)
    ignored = {"changed_at": None}
    assert [{**one, **ignored} for one in second] == [{**one, **ignored} for one in first]
    maintain(tx)
    assert ticks(tx) == ["10:30", "10:40", "10:50", "11:00"]


def test_prune_removes_what_a_crontab_made_and_nothing_else(tx: Conn) -> None:
    schedule(tx, name="by hand")
    load(tx, "0 4 * * * a\n0 4 * * * b\n0 4 * * * c")
    load(tx, "0 5 * * * b")
    assert names(tx) == ["a", "b", "by hand", "c"]
    assert shown(tx, "b")["cron"] == "0 5 * * *"
    schedule(tx, name="c")  # taken over
    load(tx, "0 5 * * * b\n0 5 * * * d", prune=True)
    assert names(tx) == ["b", "by hand", "c", "d"]
    assert load(tx, "", prune=None) == []
    assert names(tx) == ["b", "by hand", "c", "d"]
    assert load(tx, "# nothing left", prune=True) == []
    assert names(tx) == ["by hand", "c"]


def test_a_crontab_does_not_replace_a_schedule_that_was_made_by_hand(tx: Conn) -> None:
    schedule(tx, name="t")
    with refused(tx, "22023", "crontab line 2: schedule 't' is there already", hint="unschedule_job"):
        load(tx, "0 4 * * * a\n0 4 * * * t")
    assert names(tx) == ["t"]


@pytest.mark.parametrize(
    ("line", "says", "hint"),
    [
        ("* * * * *", "is not understood: '* * * * *'", "minute hour date month weekday task"),
        ("* * * * t", "is not understood", ""),
        ("@daily", "is not understood: '@daily'", ""),
        ("* * * * * ?id=x", "is not understood", ""),
        ("* * * * * t {} ?id=x", "invalid input syntax for type json", "The payload is JSON"),
        ("* * * * * t ?id=x trailing", "is not understood", ""),
        ("* * * * * t {a: 1}", "invalid input syntax for type json", "double quotes"),
        ("* * * * * t {", "invalid input syntax for type json", ""),
        ("61 * * * * t", "cron '61 * * * *': minute must be 0 to 59, got '61'", ""),
        ("@never t", "cron '@never': is no name", ""),
        ("0 0 30 2 * t", "date 30 never comes in month 2", ""),
        ("* * * * * t ?id=", "option 'id' must have a value of its kind, got ''", "4w3d2h1m"),
        ("* * * * * t ?max=many", "option 'max' must have a value of its kind, got 'many'", ""),
        ("* * * * * t ?max=99999", "max_attempts must be", ""),
        ("* * * * * t ?priority=1.5", "option 'priority' must have", ""),
        ("* * * * * t ?fill=4y", "option 'fill' must have a value of its kind, got '4y'", ""),
        ("* * * * * t ?fill=1000w", "backfill must be 0 to 10 years", ""),
        ("* * * * * t ?fill=" + "999999w" * 400, "option 'fill' must have a value of its kind", "4w3d2h1m"),
        ("* * * * * t " + '{"a":' * 20000, "stack depth limit exceeded", "The payload is JSON"),
        ("* * * * * t ?tz=UTC", "option 'tz' is unknown", "timezone"),
        ("* * * * * t ?timezone=CET", "timezone 'CET'", "Europe/Berlin"),
        ("* * * * * t ?jobKeyMode=x&jobKey=k", "job_key_mode must be one of", ""),
        ("* * * * * t ?queue=%FF", "invalid byte sequence", "UTF-8"),
        ("* * * * * " + "t" * 129, "name must be 1 to 128 characters long, got 129", ""),
        ("* * * * * good", "schedule 'good' is there twice", "?id=NAME"),
    ],
)
def test_a_line_that_is_wrong_is_named_and_nothing_is_loaded(tx: Conn, line: str, says: str, hint: str) -> None:
    with refused(tx, "22023", "crontab line 3: ", says, hint=hint):
        load(tx, f"0 4 * * * good\n\n{line}\n0 5 * * * good_too", prune=True)
    assert names(tx) == []


def test_no_crontab_at_all_is_refused(tx: Conn) -> None:
    with refused(tx, "22004", "crontab must not be null"):
        load(tx, None)
