"""Ticks as others find them: croniter, cronsim, and the rule itself, minute by minute.

The others differ around changes of clocks, among themselves and from the rule here, so each is asked where it has the
same rule. croniter: UTC. cronsim, which has Debian's: all zones but one, where clocks were put back over midnight and
it searches for ever; but a minute field with a star does not make it go by the clock here; and a step over all dates or
weekdays is a restriction here, as for croniter. The rule, minute by minute: everything, around changes of clocks.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from croniter import croniter
from cronsim import CronSim

from tests.calling import Conn, values
from tests.schedules.expressions import (
    ANY_DATE,
    ANY_MONTH,
    ZONES,
    Expression,
    clock_changes,
    random_expression,
    random_moment,
)

_TICKS = 40


def previewed(conn: Conn, expression: Expression, ticks: int, after: datetime, zone: str) -> list[datetime]:
    return [
        tick.astimezone(UTC)
        for tick in values(
            conn,
            "select pgworker.cron_preview(%s, %s::int, %s::timestamptz, %s)",
            expression.text,
            ticks,
            after,
            zone,
        )
    ]


@pytest.mark.parametrize("seed", range(4))
def test_every_tick_is_croniters(tx: Conn, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(150):
        expression, after = random_expression(rng), random_moment(rng, "UTC")
        theirs = croniter(expression.text, after, day_or=True, max_years_between_matches=60)
        expected = [theirs.get_next(datetime) for _ in range(_TICKS)]
        assert previewed(tx, expression, _TICKS, after, "UTC") == expected, (expression.text, after)


@pytest.mark.parametrize("zone", [zone for zone in ZONES if zone != "America/St_Johns"])
def test_every_tick_is_cronsims(tx: Conn, zone: str) -> None:
    rng, compared = random.Random(zone), 0
    while compared < 100:
        expression, after = random_expression(rng), random_moment(rng, zone)
        steps = [one for one in (expression.date, expression.weekday) if one.text.startswith("*/")]
        either = expression.date.text != "*" and expression.weekday.text != "*"
        if (steps and either) or (expression.minute.text.startswith("*") and not expression.every_hour):
            continue
        if "*" not in (expression.date.text, expression.weekday.text) and not (
            expression.date.restricted and expression.weekday.restricted
        ):
            continue  # every date, written as a range: no restriction here, one to cronsim
        compared += 1
        theirs = CronSim(expression.text, after.astimezone(ZoneInfo(zone)))
        # What it names twice is one tick: several times of a gap are all meant at its end.
        distinct = (tick for tick, _ in itertools.groupby(one.astimezone(UTC) for one in theirs))
        expected = list(itertools.islice((tick for tick in distinct if tick > after), _TICKS))
        assert previewed(tx, expression, _TICKS, after, zone) == expected, (expression.text, zone, after)


@pytest.mark.parametrize("zone", [zone for zone in ZONES if clock_changes(zone)])
def test_every_tick_around_a_change_of_clocks_is_the_rules(tx: Conn, zone: str) -> None:
    rng = random.Random(zone)
    for _ in range(30):
        change = rng.choice(clock_changes(zone))
        first, last = change - timedelta(hours=rng.randint(1, 30)), change + timedelta(hours=30)
        expression = dataclasses.replace(random_expression(rng), date=ANY_DATE, month=ANY_MONTH)
        expected = list(ticks_by_the_rule(expression, ZoneInfo(zone), first, last))
        found = previewed(tx, expression, len(expected) + 1, first, zone)
        assert [tick for tick in found if tick <= last] == expected, (expression.text, zone, first)


def ticks_by_the_rule(expression: Expression, zone: ZoneInfo, after: datetime, last: datetime) -> Iterator[datetime]:
    minute = timedelta(minutes=1)
    found: set[datetime] = set()
    at = (after - timedelta(days=2)).replace(second=0, microsecond=0)
    while at <= last:
        wall = at.astimezone(zone)
        if expression.every_hour:
            if expression.means(wall):
                found.add(at)
        else:
            before = (at - minute).astimezone(zone)
            if expression.means(wall) and wall.fold == 0:
                found.add(at)
            # What the clock jumps over is meant now.
            missed = before.replace(tzinfo=None, fold=0) + minute
            while missed < wall.replace(tzinfo=None, fold=0):
                if expression.means(missed):
                    found.add(at)
                missed += minute
        at += minute
    yield from sorted(tick for tick in found if after < tick <= last)
