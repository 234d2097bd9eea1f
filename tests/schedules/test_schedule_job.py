"""Settings of schedules: seen, changed, kept, refused."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from tests.calling import Conn, call, refused, rows
from tests.clock import move_clock
from tests.schedules.ticking import START, schedule, shown

EVERYTHING: dict[str, Any] = {
    "payload": '{"n": [1, null]}', "timezone": "America/New_York", "backfill": "2 days 3 hours", "queue_name": "q",
    "max_attempts": 3, "job_key": "k", "job_key_mode": "preserve_run_at", "priority": -7, "flags": ["a", "b"],
}  # fmt: skip


@pytest.fixture
def clocked(tx: Conn) -> Conn:
    move_clock(tx, START)
    return tx


def test_everything_that_was_set_is_seen(clocked: Conn) -> None:
    made = schedule(clocked, " 0 8 * * MON-fri", "nightly report", "report", **EVERYTHING)
    assert made == shown(clocked, "nightly report")
    times = {"created_at", "changed_at", "next_tick"}
    assert {name: setting for name, setting in made.items() if name not in times} == {
        **EVERYTHING, "payload": json.loads(EVERYTHING["payload"]), "backfill": timedelta(days=2, hours=3),
        "name": "nightly report", "cron": " 0 8 * * MON-fri", "identifier": "report", "paused": False,
        "last_tick": None, "last_error": None, "from_crontab": False,
    }  # fmt: skip
    assert [str(made[name]) for name in ("created_at", "changed_at", "next_tick")] == [
        "2030-05-10 10:20:30+00:00", "2030-05-10 10:20:30+00:00", "2030-05-10 12:00:00+00:00",
    ]  # fmt: skip


@pytest.mark.parametrize("nulls", [{}, dict.fromkeys(EVERYTHING)])
def test_what_is_left_out_or_null_is_the_default(clocked: Conn, nulls: dict[str, Any]) -> None:
    made = schedule(clocked, **nulls)
    assert {name: made[name] for name in EVERYTHING} == {
        "payload": {}, "timezone": "UTC", "backfill": timedelta(0), "queue_name": None, "max_attempts": None,
        "job_key": None, "job_key_mode": "replace", "priority": None, "flags": None,
    }  # fmt: skip


def test_scheduling_again_changes_every_setting_and_keeps_what_it_is(clocked: Conn) -> None:
    first = schedule(clocked, **EVERYTHING)
    call(clocked, "pause_schedule", "s")
    move_clock(clocked, "2030-05-11 00:00+00")
    second = schedule(clocked, "@daily", identifier="other")
    assert (second["payload"], second["queue_name"], second["flags"], second["priority"]) == ({}, None, None, None)
    assert (second["identifier"], second["cron"], second["timezone"]) == ("other", "@daily", "UTC")
    assert (second["created_at"], second["paused"]) == (first["created_at"], True)
    assert str(second["changed_at"]) == "2030-05-11 00:00:00+00:00"
    assert len(rows(clocked, "select from pgworker.schedules")) == 1


@pytest.mark.parametrize(
    ("arguments", "sqlstate", "says"),
    [
        ((None, "@daily", "t"), "22004", "name must not be null"),
        (("s", None, "t"), "22004", "cron must not be null"),
        (("s", "@daily", None), "22004", "identifier must not be null"),
        (("", "@daily", "t"), "22023", "name must be 1 to 128 characters long, got 0"),
        (("x" * 129, "@daily", "t"), "22023", "name must be 1 to 128 characters long, got 129"),
        (("s", "@daily", ""), "22023", "identifier must be 1 to 128"),
        (("s", "@daily", "x" * 129), "22023", "identifier must be 1 to 128"),
    ],
)
def test_names_that_are_none_are_refused(tx: Conn, arguments: tuple[Any, ...], sqlstate: str, says: str) -> None:
    with refused(tx, sqlstate, says):
        call(tx, "schedule_job", *arguments)


@pytest.mark.parametrize(
    ("argument", "given", "says"),
    [
        ("payload", "[1]", "payload must be an object, got array"),
        ("payload", "3", "payload must be an object, got number"),
        ("backfill", "-1 second", "backfill must be 0 to 10 years, got -00:00:01"),
        ("backfill", "11 years", "backfill must be 0 to 10 years"),
        ("queue_name", "", "queue_name must be"),
        ("max_attempts", 0, "max_attempts must be"),
        ("max_attempts", 32768, "max_attempts must be"),
        ("job_key", "x" * 513, "job_key must be"),
        ("job_key_mode", "append", "job_key_mode must be one of"),
        ("priority", 32768, "priority must be"),
        ("flags", ["a", None], "flags must be"),
    ],
)
def test_settings_out_of_add_jobs_limits_are_refused_when_they_are_made(
    tx: Conn, argument: str, given: Any, says: str
) -> None:
    with refused(tx, "22023", says):
        schedule(tx, **{argument: given})
    schedule(tx)
    with refused(tx, "22023", says):
        schedule(tx, **{argument: given})


def test_a_payload_of_jsons_null_is_the_empty_object(tx: Conn) -> None:
    assert schedule(tx, payload="null")["payload"] == {}


def test_a_longest_name_and_identifier_will_do(tx: Conn) -> None:
    assert schedule(tx, "@daily", "ü" * 128, "ü" * 128)["name"] == "ü" * 128
