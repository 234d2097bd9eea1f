"""``python -m examples.monthly_report MONTH``: adds the report of that month to the queue and prints the root's id."""

from __future__ import annotations

import argparse
import os
from datetime import date
from pathlib import Path

import psycopg

from examples.monthly_report.report import report_tree
from examples.monthly_report.sales import make_up_sales, read_categories
from pgworker_client import add_job_tree

#: Nothing listens there.
NO_SERVICE = "http://127.0.0.1:9/rates"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.monthly_report")
    parser.add_argument("month", nargs="?", type=_month, default=date(2026, 9, 1), help="such as 2026-09")
    parser.add_argument("--rates", metavar="URL", default=NO_SERVICE, help="a service with exchange rates")
    options = parser.parse_args()
    with psycopg.connect(os.environ.get("DATABASE_URL", "")) as conn:  # sales and jobs: one transaction
        make_up_sales(conn, options.month)
        categories = read_categories(conn, options.month)
        root = add_job_tree(conn, report_tree(options.month, categories, options.rates, Path.cwd()))
    print(root.id)


def _month(text: str) -> date:
    try:
        return date.fromisoformat(f"{text}-01")
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a month such as 2026-09: {text}") from None


main()
