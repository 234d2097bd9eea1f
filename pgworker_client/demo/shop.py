"""The shop's side of the demo: its tables, its orders, and what has become of the jobs that they queued."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import class_row

from pgworker_client import schema

FLAG = "pgworker_demo"
TASKS = ["prepare_receipt", "render", "send", "charge_card"]
_MARK = "pgworker demo: dropped and made anew by every run"
_LOCK = "select pg_try_advisory_lock(hashtext('pgworker demo'))"

_CUSTOMERS = """
insert into pgworker_demo.customers (id, name, email)
select n, given || ' ' || family, lower(given || '.' || family) || '@example.com'
from generate_series(0, 99) as n
cross join lateral (
  select (array['Ada', 'Ben', 'Cleo', 'Dan', 'Eva', 'Finn', 'Gina', 'Hugo', 'Ida', 'Jan'])[n % 10 + 1],
         (array['Abel', 'Bauer', 'Costa', 'Diaz', 'Egli', 'Fuchs', 'Grau', 'Horn', 'Ivers', 'Jung'])[n / 10 + 1]
) as p(given, family)
union all
select 100, 'Kim Noat', 'kim.noat at example.com'
"""
# One order pays by a card whose gateway is moody, one belongs to the customer whose address is wrong.
_ORDERS = """
insert into pgworker_demo.orders (id, customer_id, paid_by, ordered_at)
select n, case when n = %(misaddressed)s then 100 else (n * 37) %% 100 end,
       case when n = %(by_card)s then 'card' else 'invoice' end,
       timestamptz '2026-03-02 09:00+00' + n * interval '7 minutes'
from generate_series(1, %(orders)s) as n
"""
_ITEMS = """
insert into pgworker_demo.order_items (order_id, line, article, quantity, price_cents)
select o.id, line,
       (array['Espresso beans, 1 kg', 'Green tea, 100 g', 'Teapot', 'Cup & saucer', 'Filter paper'])[article + 1],
       (o.id + line) % 3 + 1,
       (array[2190, 890, 3450, 1275, 320])[article + 1]
from pgworker_demo.orders o
cross join lateral generate_series(1, o.id % 4 + 1) as line
cross join lateral (select (o.id * 3 + line) % 5) as a(article)
"""
_ENDED = """
select count(*) from pgworker.jobs
where %s = any (flags) and id > %s and state in ('completed', 'failed', 'cancelled')
"""
_BY_TASK = """
select task_identifier as task,
       count(*) filter (where state = 'completed')::int as done,
       count(*) filter (where state = 'failed')::int as failed,
       count(*) filter (where state not in ('completed', 'failed'))::int as other,
       sum(attempts)::int as attempts,
       sum(attempts - 1)::int as retried
from pgworker.jobs
where %s = any (flags) and id > %s
group by task_identifier
order by min(id)
"""


class ShopError(Exception):
    """The demo cannot run in this database; the text says why, and the way out."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
    """What has become of the jobs of one task."""

    task: str
    done: int
    failed: int
    other: int
    attempts: int
    retried: int


class Shop:
    """The shop in its database. ``orders``: how many orders come in."""

    def __init__(self, conn: psycopg.Connection[Any], orders: int) -> None:
        self._conn = conn
        self.orders = orders
        self.by_card = (orders + 2) // 3
        self.misaddressed = (2 * orders + 2) // 3
        self._last_id = 0

    @property
    def jobs(self) -> int:
        """How many jobs the orders bring about: three each, and the card's."""
        return 3 * self.orders + 1

    def expected(self) -> list[Tally]:
        """What has to become of them."""
        return [
            Tally("prepare_receipt", self.orders, 0, 0, self.orders, 0),
            Tally("charge_card", 1, 0, 0, 3, 2),
            Tally("render", self.orders, 0, 0, self.orders, 0),
            Tally("send", self.orders - 1, 1, 0, self.orders, 0),
        ]

    def open(self) -> bool:
        """Make the database ready, whatever an earlier demo left there; returns whether this installed pgworker."""
        installs = schema.installed_version(self._conn) is None
        if installs:
            schema.install(self._conn)
        if not self._value(_LOCK):
            raise ShopError(f"another demo is running in database {self._conn.info.dbname}: wait until it has ended")
        self.clean()
        foreign = self._value(
            "select count(*) from pgworker.jobs where task_identifier = any (%s) and finished_at is null", TASKS
        )
        if foreign:
            raise ShopError(
                f"database {self._conn.info.dbname} has {foreign} jobs of its own for tasks named like the demo's "
                f"({', '.join(TASKS)}), which the demo's worker would take: use another database"
            )
        self._conn.execute((Path(__file__).parent / "shop.sql").read_bytes())
        self._conn.execute(_CUSTOMERS)
        self._last_id = self._value("select coalesce(max(id), 0) from pgworker.jobs")
        return installs

    def clean(self) -> None:
        """Remove the shop, and end jobs of a demo that was broken off."""
        self._conn.execute(
            "select from pgworker.cancel_jobs(array(select id from pgworker.jobs "
            "where %s = any (flags) and finished_at is null), 'left by a demo that was broken off')",
            [FLAG],
        )
        if self._value("select to_regnamespace('pgworker_demo') is not null"):
            comment = self._value("select obj_description(to_regnamespace('pgworker_demo')::oid, 'pg_namespace')")
            if comment != _MARK:
                raise ShopError(
                    f"database {self._conn.info.dbname} has a schema pgworker_demo that is not the demo's: "
                    "rename it, or use another database"
                )
            self._conn.execute("drop schema pgworker_demo cascade")

    def take_orders(self) -> tuple[float, float]:
        """Insert all orders by one statement; returns the seconds it took and the database's time at the commit."""
        given = {"orders": self.orders, "by_card": self.by_card, "misaddressed": self.misaddressed}
        with self._conn.transaction():
            begun = self._value("select extract(epoch from clock_timestamp())::float8")
            self._conn.execute(_ORDERS, given)
            took = self._value("select extract(epoch from clock_timestamp())::float8 - %s", begun)
            self._conn.execute(_ITEMS)
            committed = self._value("select extract(epoch from clock_timestamp())::float8")
        return float(took), float(committed)

    def ended(self) -> int:
        """How many jobs have ended."""
        return int(self._value(_ENDED, FLAG, self._last_id))

    def tallies(self) -> list[Tally]:
        """What has become of the jobs, task by task in the order in which they came up."""
        with self._conn.cursor(row_factory=class_row(Tally)) as cur:
            return cur.execute(_BY_TASK, [FLAG, self._last_id]).fetchall()

    def seconds_since(self, committed: float) -> float:
        """How long it took from the commit of the orders until the last job had ended."""
        return float(
            self._value(
                "select extract(epoch from max(finished_at))::float8 - %s from pgworker.jobs "
                "where %s = any (flags) and id > %s",
                committed,
                FLAG,
                self._last_id,
            )
        )

    def failure(self) -> tuple[int, str, str]:
        """The job that failed for good: id, task, last_error."""
        row = self._conn.execute(
            "select id, task_identifier, last_error from pgworker.jobs "
            "where %s = any (flags) and id > %s and state = 'failed'",
            [FLAG, self._last_id],
        ).fetchone()
        if row is None:
            raise ShopError("no job has failed, though one has an address that no mail can reach")
        return row[0], row[1], row[2]

    def _value(self, query: str, *parameters: Any) -> Any:
        row = self._conn.execute(query, parameters).fetchone()
        return None if row is None else row[0]
