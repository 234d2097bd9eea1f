"""The shop's tables, and what the steps of an order do to them."""

from __future__ import annotations

SHOP = """
create schema if not exists order_fulfilment;
create table if not exists order_fulfilment.stock (
  item      text    primary key,
  price     int     not null,
  available int     not null check (available >= 0)
);
create table if not exists order_fulfilment.account (
  customer text primary key,
  balance  int  not null check (balance >= 0)
);
insert into order_fulfilment.stock values ('lamp', 30, 100), ('chair', 90, 10) on conflict do nothing;
insert into order_fulfilment.account values ('ada', 1000), ('grace', 50) on conflict do nothing;
"""

PRICE = "select price * %(quantity)s from order_fulfilment.stock where item = %(item)s"

RESERVE = """
update order_fulfilment.stock set available = available - %(quantity)s
where item = %(item)s and available >= %(quantity)s
returning available
"""

RELEASE = "update order_fulfilment.stock set available = available + %(quantity)s where item = %(item)s"

CHARGE = """
update order_fulfilment.account set balance = balance - %(amount)s
where customer = %(customer)s and balance >= %(amount)s
returning balance
"""

REFUND = "update order_fulfilment.account set balance = balance + %(amount)s where customer = %(customer)s"
