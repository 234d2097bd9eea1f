"""``python -m examples.order_fulfilment``: adds an order to the queue and prints the root's id."""

from __future__ import annotations

import argparse
import os

import psycopg

from examples.order_fulfilment.order import order_tree
from examples.order_fulfilment.shop import SHOP
from pgworker_client import add_job_tree

#: Nothing listens there.
NO_SERVICE = "http://127.0.0.1:9/orders"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.order_fulfilment")
    parser.add_argument("--item", choices=["lamp", "chair"], default="lamp")
    parser.add_argument("--quantity", type=int, default=1)
    parser.add_argument("--customer", default="ada")
    parser.add_argument("--notify", metavar="URL", default=NO_SERVICE, help="a service that ships")
    options = parser.parse_args()
    with psycopg.connect(os.environ.get("DATABASE_URL", "")) as conn:
        conn.execute(SHOP)
        root = add_job_tree(conn, order_tree(options.item, options.quantity, options.customer, options.notify))
    print(root.id)


main()
