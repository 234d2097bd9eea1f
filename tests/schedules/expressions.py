"""Random cron expressions, each with what it means, and the moments at which zones change their clocks."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

ZONES = (
    "UTC",
    "Europe/Berlin",
    "Europe/Dublin",  # its winter is what the database calls summer
    "America/New_York",
    "America/St_Johns",  # at one minute past midnight, for a while
    "America/Havana",  # at midnight
    "Australia/Lord_Howe",  # by half an hour
    "Antarctica/Troll",  # by two hours
    "Pacific/Apia",  # has left out a day
    "Asia/Kolkata",
)

_MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
_WEEKDAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]


@dataclass(frozen=True)
class Field:
    """A field as written, and the values that are meant."""

    text: str
    values: frozenset[int]
    restricted: bool


ANY_DATE = Field("*", frozenset(range(1, 32)), restricted=False)
ANY_MONTH = Field("*", frozenset(range(1, 13)), restricted=False)


@dataclass(frozen=True)
class Expression:
    """Five fields."""

    minute: Field
    hour: Field
    date: Field
    month: Field
    weekday: Field

    @property
    def text(self) -> str:
        """The expression as it is written."""
        return " ".join(one.text for one in (self.minute, self.hour, self.date, self.month, self.weekday))

    @property
    def every_hour(self) -> bool:
        """Whether it goes by the clock as it runs."""
        return self.hour.text.startswith("*")

    def means(self, local: datetime) -> bool:
        """Whether a time on the wall is one of its."""
        dated, named = local.day in self.date.values, local.isoweekday() % 7 in self.weekday.values
        day = (dated or named) if self.date.restricted and self.weekday.restricted else (dated and named)
        return (
            day
            and local.month in self.month.values
            and local.hour in self.hour.values
            and local.minute in self.minute.values
        )


def random_expression(rng: random.Random) -> Expression:
    """Any expression that has a tick at all."""
    while True:
        made = Expression(
            _field(rng, 0, 59),
            _field(rng, 0, 23),
            _field(rng, 1, 31, plain=0.6),
            _field(rng, 1, 12, _MONTHS, plain=0.6),
            _field(rng, 0, 6, _WEEKDAYS, plain=0.6),
        )
        longest = max([31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month - 1] for month in made.month.values)
        if made.weekday.restricted or min(made.date.values) <= longest:
            return made


def _field(rng: random.Random, low: int, high: int, names: list[str] | None = None, plain: float = 0.25) -> Field:
    if rng.random() < plain:
        return Field("*", frozenset(range(low, high + 1)), restricted=False)
    if rng.random() < 0.2:
        step = rng.randint(2, high)
        return Field(f"*/{step}", frozenset(range(low, high + 1, step)), restricted=True)
    items = [_item(rng, low, high, names) for _ in range(rng.choice([1, 1, 2, 3]))]
    values = frozenset(value for _, some in items for value in some)
    return Field(",".join(text for text, _ in items), values, restricted=len(values) < high - low + 1)


def _item(rng: random.Random, low: int, high: int, names: list[str] | None) -> tuple[str, list[int]]:
    def written(value: int) -> str:
        return rng.choice([names[value - low], names[value - low].lower(), str(value)]) if names else str(value)

    first = rng.randint(low, high)
    last = rng.randint(first, high)
    kind = rng.choice(["one", "one", "range", "step"])
    if kind == "one" or first == last:
        return written(first), [first]
    if kind == "range":
        return f"{written(first)}-{written(last)}", list(range(first, last + 1))
    step = rng.randint(1, high)
    return f"{written(first)}-{written(last)}/{step}", list(range(first, last + 1, step))


@functools.cache
def clock_changes(zone: str, first: int = 1995, last: int = 2036) -> list[datetime]:
    """When the clocks of a zone are changed, to the hour before."""
    there, hour = ZoneInfo(zone), timedelta(hours=1)
    found: list[datetime] = []
    at = datetime(first, 1, 1, tzinfo=UTC)
    offset = at.astimezone(there).utcoffset()
    while at.year <= last:
        after = at + timedelta(days=1)
        if after.astimezone(there).utcoffset() != offset:
            while (at + hour).astimezone(there).utcoffset() == offset:
                at += hour
            found.append(at)
            after = at + hour
            offset = after.astimezone(there).utcoffset()
        at = after
    return found


def random_moment(rng: random.Random, zone: str) -> datetime:
    """A moment in forty years: half of them shortly before the clocks are changed."""
    changes = clock_changes(zone)
    if changes and rng.random() < 0.5:
        at = rng.choice(changes) + timedelta(seconds=rng.uniform(-30 * 3600, 5 * 3600))
    else:
        at = datetime(1995, 1, 1, tzinfo=UTC) + timedelta(seconds=rng.uniform(0, 41 * 365.25 * 86400))
    return rng.choice([at, at.replace(second=0, microsecond=0)])
