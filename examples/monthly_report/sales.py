"""The table of sales, and what the report asks of it."""

from __future__ import annotations

from datetime import date
from typing import Any

import psycopg

_TABLE = """
create schema if not exists monthly_report;
create table if not exists monthly_report.sales (
  id       bigint generated always as identity primary key,
  sold_at  timestamptz    not null,
  category text           not null,
  amount   numeric(10, 2) not null
);
create index if not exists sales_sold_at on monthly_report.sales (category, sold_at)
"""

# Looks like chance and is the same every time: hashes of the hour and the number of the sale.
_MAKE_UP = """
insert into monthly_report.sales (sold_at, category, amount)
select t + n * interval '97 seconds',
       (array['books', 'games', 'music', 'garden'])[1 + mod(abs(hashint8(h * 31 + n)), 4)],
       5 + mod(abs(hashint8(h * 7 + n)), 9000) / 100.0
from (select t, extract(epoch from t)::bigint / 3600 as h
      from generate_series(%(month)s::timestamptz, %(month)s::timestamptz + interval '1 month - 1 hour',
                           interval '1 hour') t) hours
cross join lateral generate_series(1, 1 + mod(abs(hashint8(h)), 30)) n
where not exists (select from monthly_report.sales
                  where sold_at >= %(month)s and sold_at < %(month)s::timestamptz + interval '1 month')
"""

_CATEGORIES = """
select distinct category from monthly_report.sales
where sold_at >= %(month)s and sold_at < %(month)s::timestamptz + interval '1 month'
order by category
"""

# Every day of the month has its figure, also one without sales.
DAYS = """
select d::date::text, count(s.id), coalesce(sum(s.amount), 0)::float8
from generate_series(%(month)s::timestamptz, %(month)s::timestamptz + interval '1 month - 1 day', '1 day') d
left join monthly_report.sales s
  on s.category = %(category)s and s.sold_at >= d and s.sold_at < d + interval '1 day'
group by d order by d
"""


def make_up_sales(conn: psycopg.Connection[Any], month: date) -> None:
    """See to it that there is a table, and that something was sold in that month."""
    conn.execute(_TABLE)
    conn.execute(_MAKE_UP, {"month": month})


def read_categories(conn: psycopg.Connection[Any], month: date) -> list[str]:
    """The categories of which something was sold in that month."""
    return [category for (category,) in conn.execute(_CATEGORIES, {"month": month})]
