"""Days on which clocks are changed: no time of the calendar is lost, and nothing runs twice but by the clock."""

from __future__ import annotations

from zoneinfo import ZoneInfo

import pytest

from tests.calling import Conn, values
from tests.clock import move_clock
from tests.schedules.ticking import maintain, schedule, ticks


@pytest.mark.parametrize(
    ("zone", "cron", "after", "expected"),
    [
        # 2026-03-29, 02:00 becomes 03:00: a time that does not exist runs right after the gap, however many there are.
        ("Europe/Berlin", "30 2 * * *", "2026-03-28 12:00", ["29 03:00", "30 02:30"]),
        ("Europe/Berlin", "*/20 2 * * *", "2026-03-29 00:00", ["29 03:00", "30 02:00", "30 02:20"]),
        ("Europe/Berlin", "0 2,3 * * *", "2026-03-29 00:00", ["29 03:00", "30 02:00"]),
        ("Europe/Berlin", "30 1-4 * * *", "2026-03-29 00:00", ["29 01:30", "29 03:00", "29 03:30", "29 04:30"]),
        # With a wildcard the clock just goes on.
        ("Europe/Berlin", "30 * * * *", "2026-03-29 00:31", ["29 01:30", "29 03:30", "29 04:30"]),
        ("Europe/Berlin", "0 */2 * * *", "2026-03-28 23:00", ["29 00:00", "29 04:00"]),
        # 2026-10-25, 03:00 becomes 02:00: a time that comes twice runs the first time.
        ("Europe/Berlin", "30 2 * * *", "2026-10-25 00:00", ["25 02:30+02", "26 02:30"]),
        ("Europe/Berlin", "*/30 2 * * *", "2026-10-25 00:00", ["25 02:00+02", "25 02:30+02", "26 02:00"]),
        ("Europe/Berlin", "0 1-3 * * *", "2026-10-25 00:00", ["25 01:00", "25 02:00+02", "25 03:00"]),
        ("Europe/Berlin", "15 * * * *", "2026-10-25 01:00", ["25 01:15", "25 02:15+02", "25 02:15+01", "25 03:15"]),
        ("Europe/Berlin", "0 */2 * * *", "2026-10-25 00:00", ["25 02:00+02", "25 02:00+01", "25 04:00"]),
        # By half an hour, at midnight, and a whole day.
        ("Australia/Lord_Howe", "15 2 * * *", "2026-10-04 00:00", ["04 02:30", "05 02:15"]),
        ("Australia/Lord_Howe", "15 * * * *", "2026-10-04 00:30", ["04 01:15", "04 03:15"]),
        ("Australia/Lord_Howe", "45 1 * * *", "2026-04-05 00:00", ["05 01:45+11", "06 01:45"]),
        ("America/Havana", "0 0 * * *", "2026-03-07 12:00", ["08 01:00", "09 00:00"]),
        ("America/Havana", "0 0 * * *", "2026-10-31 12:00", ["01 00:00-04", "02 00:00"]),
        ("Pacific/Apia", "0 12 * * *", "2011-12-29 00:00", ["29 12:00", "31 00:00", "31 12:00"]),
        ("Pacific/Apia", "0 */12 * * *", "2011-12-29 00:00", ["29 12:00", "31 00:00", "31 12:00"]),
    ],
)
def test_the_rule(tx: Conn, zone: str, cron: str, after: str, expected: list[str]) -> None:
    found = values(
        tx, "select pgworker.cron_preview(%s, %s::int, %s::timestamp at time zone %s, %s)",
        cron, len(expected), after, zone, zone,
    )  # fmt: skip
    there = [tick.astimezone(ZoneInfo(zone)).strftime("%d %H:%M%z") for tick in found]
    assert [tick[: len(wanted)] for tick, wanted in zip(there, expected, strict=True)] == expected


def test_a_schedule_runs_once_on_the_day_with_two_such_times_and_on_the_day_with_none(tx: Conn) -> None:
    for day, expected in [("2026-10-25", ["00:30"]), ("2026-03-29", ["01:00"])]:
        move_clock(tx, f"{day} 00:00 Europe/Berlin")
        schedule(tx, "30 2 * * *", day, day, timezone="Europe/Berlin")
        for minutes in range(0, 300, 5):
            move_clock(tx, f"{day} {minutes // 60:02}:{minutes % 60:02}+00")
            maintain(tx)
        assert ticks(tx, day) == expected
