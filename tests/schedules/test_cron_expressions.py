"""What an expression means, and what is refused, with field and value named."""

from __future__ import annotations

from typing import Any

import pytest

from tests.calling import Conn, call, refused, value, values
from tests.clock import move_clock


def next_tick(conn: Conn, cron: str, after: str, timezone: str = "UTC") -> str:
    """The next tick, as the wall there shows it."""
    query = "select pgworker.cron_next(%s, %s, %s) at time zone %s"
    return str(value(conn, query, cron, after, timezone, timezone))[:16]


@pytest.mark.parametrize(
    ("cron", "expected"),  # 2026-05-14 is a Thursday
    [
        ("* * * * *", "2026-05-14 12:31"),
        ("*/20 * * * *", "2026-05-14 12:40"),
        ("5-50/15 * * * *", "2026-05-14 12:35"),
        ("29,31,33 * * * *", "2026-05-14 12:31"),
        ("30 12 * * *", "2026-05-15 12:30"),
        ("07 03 * * *", "2026-05-15 03:07"),
        ("0 9-17/4 * * mon-fri", "2026-05-14 13:00"),
        ("0 0 * * 0", "2026-05-17 00:00"),
        ("0 0 * * 7", "2026-05-17 00:00"),
        ("0 0 * * Sun", "2026-05-17 00:00"),
        ("0 0 * * 5-7", "2026-05-15 00:00"),
        ("0 0 * * fri-sun", "2026-05-15 00:00"),
        ("0 0 * * SUN-TUE", "2026-05-17 00:00"),
        ("0 0 1 jan,Jul *", "2026-07-01 00:00"),
        ("0 0 1 NOV-dec *", "2026-11-01 00:00"),
        ("0 0 31 * *", "2026-05-31 00:00"),
        ("0 0 31 2-4 *", "2027-03-31 00:00"),
        ("0 0 29 2 *", "2028-02-29 00:00"),
        ("0 0 20 * fri", "2026-05-15 00:00"),  # either is enough
        ("0 0 15 * sat", "2026-05-15 00:00"),
        ("0 0 1-31 * sat", "2026-05-16 00:00"),  # every date is no restriction
        ("0 0 20 * 0-7", "2026-05-20 00:00"),
        ("0 0 */2 * sat", "2026-05-15 00:00"),
        ("0 0 30 2 mon", "2027-02-01 00:00"),
        ("@yearly", "2027-01-01 00:00"),
        ("@annually", "2027-01-01 00:00"),
        ("@monthly", "2026-06-01 00:00"),
        ("@weekly", "2026-05-17 00:00"),
        ("@daily", "2026-05-15 00:00"),
        ("@midnight", "2026-05-15 00:00"),
        (" @Hourly ", "2026-05-14 13:00"),
        ("  59\t 23  31 \n 12   * ", "2026-12-31 23:59"),
    ],
)
def test_the_next_tick(tx: Conn, cron: str, expected: str) -> None:
    assert next_tick(tx, cron, "2026-05-14 12:30:00+00") == expected


def test_29_february_over_centuries(tx: Conn) -> None:
    leap = values(tx, "select t::date::text from pgworker.cron_preview('0 0 29 2 *', 55, '1890-01-01') t")
    years = [year for year in range(1892, 2115, 4) if year not in (1900, 2100)]
    assert leap[: len(years)] == [f"{year}-02-29" for year in years]
    assert next_tick(tx, "* * 29 2 *", "2096-02-29 23:59:00+00", "UTC") == "2104-02-29 00:00"


@pytest.mark.parametrize(
    ("cron", "says", "hint"),
    [
        ("60 * * * *", "minute must be 0 to 59, got '60'", "minute, hour"),
        ("* 24 * * *", "hour must be 0 to 23, got '24'", ""),
        ("* * 0 * *", "date must be 1 to 31, got '0'", ""),
        ("* * 32 * *", "date must be 1 to 31, got '32'", ""),
        ("* * * 13 *", "month must be 1 to 12 or JAN to DEC, got '13'", ""),
        ("* * * foo *", "month must be 1 to 12 or JAN to DEC, got 'foo'", ""),
        ("* * * * 8", "weekday must be 0 to 6 or SUN to SAT, got '8'", "Sunday is 0, 7 or SUN"),
        ("* * * * 1-9", "weekday must be 0 to 6 or SUN to SAT, got '9'", ""),
        ("99999999999 * * * *", "minute must be 0 to 59, got '99999999999'", ""),
        ("-5 * * * *", "minute is not understood: '-5'", "a range a-b"),
        ("1,,2 * * * *", "minute is not understood: '1,,2'", ""),
        ("* ? * * *", "hour is not understood: '?'", ""),
        ("* * L * *", "date must be 1 to 31, got 'L'", ""),
        ("* * * * mon#2", "weekday is not understood: 'mon#2'", ""),
        ("* * * * 1.5", "weekday is not understood: '1.5'", ""),
        ("50-10 * * * *", "minute has a range that ends before it begins: '50-10'", "two ranges"),
        ("* * * * sat-mon", "weekday has a range that ends before it begins: 'sat-mon'", ""),
        ("5/15 * * * *", "minute has a step without a range: '5/15'", "Write 5-59/15."),
        ("0 0 * * 7/1", "weekday has a step without a range: '7/1'", "Write 7-7/1."),
        ("*/0 * * * *", "minute must have a step of 1 to 59, got 0", ""),
        ("*/90 * * * *", "minute must have a step of 1 to 59, got 90", "within the field"),
        ("* 1-20/24 * * *", "hour must have a step of 1 to 23, got 24", ""),
        ("0 0 30 2 *", "date 30 never comes in month 2", "never run"),
        ("0 0 31 4,jun,9,11 *", "date 31 never comes in month 4,jun,9,11", ""),
        ("* * * *", "must have five fields, got 4", "no field for seconds"),
        ("0 * * * * *", "must have five fields, got 6", ""),
        ("", "must have five fields, got 0", ""),
        ("@reboot", "cron '@reboot': is no name that is known", "@hourly"),
        ("@daily 3", "is no name that is known", ""),
    ],
)
def test_what_is_no_expression_is_refused_and_named(tx: Conn, cron: str, says: str, hint: str) -> None:
    for function, more in (("cron_next", ()), ("cron_preview", ()), ("schedule_job", ("t",))):
        with refused(tx, "22023", f"cron '{cron}'", says, hint=hint):
            call(tx, function, *(("name",) if more else ()), cron, *more)


@pytest.mark.parametrize(
    "zone", ["Mars/Base", "", "CEST", "CET", "Foo/Bar5", "+02", "UTC+2", "Europe/Berlin2", "right/UTC"]
)
def test_what_is_no_zone_is_refused(tx: Conn, zone: str) -> None:
    with refused(tx, "22023", f"timezone '{zone}'", hint="Europe/Berlin"):
        call(tx, "cron_next", "@daily", timezone=zone)
    with refused(tx, "22023", f"timezone '{zone}'", hint="Europe/Berlin"):
        call(tx, "schedule_job", "name", "@daily", "t", timezone=zone)


def test_zones_of_the_database_are_taken_by_any_case(tx: Conn) -> None:
    at = "2026-07-01 00:00:00+00"
    for zone, expected in [
        ("Europe/Berlin", "2026-07-01 06:00"), ("europe/berlin", "2026-07-01 06:00"), ("Etc/GMT+5", "2026-07-01 13:00"),
        ("EST5EDT", "2026-07-01 12:00"), ("utc", "2026-07-01 08:00"), ("GMT", "2026-07-01 08:00"),
        (None, "2026-07-01 08:00"), ("Asia/Kathmandu", "2026-07-01 02:15"),
    ]:  # fmt: skip
        found = value(tx, "select pgworker.cron_next('0 8 * * *', %s, %s) at time zone 'UTC'", at, zone)
        assert str(found)[:16] == expected, zone


def test_names_are_read_alike_in_every_language(tx: Conn) -> None:
    """In a Turkish database the capital of i is not I, and there are digits that are no numbers to PostgreSQL."""
    if not value(tx, "select exists (select from pg_collation where collname = 'tr-x-icu')"):
        pytest.skip("this PostgreSQL is built without ICU")
    turkish = """select pgworker.cron_next(%s collate "tr-x-icu", '2026-05-14 12:30+00', %s collate "tr-x-icu")"""
    assert str(value(tx, turkish, "0 0 * * fri", "UTC")) == "2026-05-15 00:00:00+00:00"
    assert str(value(tx, turkish, "@MIDNIGHT", "europe/istanbul")) == "2026-05-14 21:00:00+00:00"
    with refused(tx, "22023", "timezone 'ist'"):
        value(tx, turkish, "@daily", "ist")
    for cron in ("\u0663 * * * *", "*/\u0663 * * * *"):
        with refused(tx, "22023", f"cron '{cron}': minute"):
            value(tx, turkish, cron, "UTC")


def test_nulls_and_what_is_left_out_mean_the_defaults(tx: Conn) -> None:
    move_clock(tx, "2030-05-10 10:20:30+00")
    nulls: list[dict[str, Any]] = [{}, {"after": None}, {"timezone": None}]
    for arguments in nulls:
        (found,) = call(tx, "cron_next", "0 0 * * *", **arguments)
        assert str(found["cron_next"]) == "2030-05-11 00:00:00+00:00"
        ticks = call(tx, "cron_preview", "0 0 * * *", **arguments)
        assert [tick["cron_preview"].day for tick in ticks] == list(range(11, 21))
    assert len(call(tx, "cron_preview", "0 0 * * *", None)) == 10
    assert len(call(tx, "cron_preview", "0 0 * * *", 3)) == 3
    assert call(tx, "cron_preview", "0 0 * * *", 0) == []
    for function in ("cron_next", "cron_preview"):
        with refused(tx, "22004", "cron must not be null"):
            call(tx, function, None)


def test_arguments_out_of_their_limits_are_refused(tx: Conn) -> None:
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("cron_next", "after must lie between", {"after": "infinity"}),
        ("cron_next", "after must lie between", {"after": "0100-01-01 BC"}),
        ("cron_preview", "after must lie between", {"after": "-infinity"}),
        ("cron_preview", "ticks must be a whole number from 0 to 10000, got -1", {"ticks": -1}),
        ("cron_preview", "ticks must be a whole number from 0 to 10000, got 10001", {"ticks": 10001}),
    ]
    for function, says, arguments in cases:
        with refused(tx, "22023", says):
            call(tx, function, "@daily", **arguments)


def test_a_tick_is_after_the_moment_given_to_the_microsecond(tx: Conn) -> None:
    for after, expected in [
        ("2026-05-14 11:59:59.999999", "2026-05-14 12:00"),
        ("2026-05-14 12:00:00", "2026-05-14 12:01"),
        ("2026-05-14 12:00:00.000001", "2026-05-14 12:01"),
    ]:
        assert next_tick(tx, "* * * * *", after) == expected
        assert next_tick(tx, "* 0-23 * * *", after) == expected
