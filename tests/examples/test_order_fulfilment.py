"""The fulfilment of an order, run as its text says: what was done is undone when it fails."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import examples.order_fulfilment
from tests.examples.commands import commands, run

Db = psycopg.Connection[Any]

pytestmark = pytest.mark.usefixtures("consistent_afterwards")

_RAN = "select task_identifier, state from pgworker.jobs where state <> 'cancelled' order by finished_at, id"
_SHOP = """
select (select available from order_fulfilment.stock where item = 'lamp'),
       (select balance from order_fulfilment.account where customer = 'ada')
"""


@pytest.fixture
def service() -> Iterator[tuple[str, list[Any]]]:
    """The address of a service that ships, and the orders that it has been told of."""
    told: list[Any] = []

    class Service(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", told
        server.shutdown()
        thread.join()


def _order(dsn: str, directory: Path, *more: str) -> list[str]:
    """Add an order, run it, and return what is then seen of it."""
    add, work, look = commands(examples.order_fulfilment)
    root = run(add, dsn, directory, *more).strip()
    run(work, dsn, directory)
    return run([root if word == "ID" else word for word in look], dsn, directory).splitlines()


def test_an_order_of_which_nobody_can_be_told_is_refunded_and_released(dsn: str, db: Db, tmp_path: Path) -> None:
    picture = _order(dsn, tmp_path)
    assert db.execute(_RAN).fetchall() == [
        ("reserve", "completed"),
        ("charge", "completed"),
        ("fulfil-order", "failed"),
        ("notify", "failed"),
        ("refund", "completed"),
        ("release", "completed"),
    ]
    assert db.execute(_SHOP).fetchone() == (100, 1000)
    refund = db.execute("select payload -> 'node' -> 'result' from pgworker.jobs where task_identifier = 'refund'")
    assert refund.fetchone() == ({"customer": "ada", "amount": 60},)
    assert picture[0].startswith("failed     fulfil-order #1  ")
    assert [line.split()[2] for line in picture[1:6]] == ["reserve", "charge", "notify", "compensation", "compensation"]
    assert picture[-1] == "6 jobs: 4 completed, 2 failed"


def test_an_order_that_is_fulfilled_stays_so(dsn: str, db: Db, tmp_path: Path, service: tuple[str, list[Any]]) -> None:
    url, told = service
    _order(dsn, tmp_path, "--notify", url)
    assert db.execute(_SHOP).fetchone() == (98, 940)
    assert told == [{"item": "lamp", "quantity": 2}]
    assert [task for task, _ in db.execute(_RAN).fetchall()] == ["reserve", "charge", "notify", "fulfil-order"]


@pytest.mark.parametrize(("quantity", "undone"), [("50", ["release"]), ("500", [])])
def test_only_what_was_done_is_undone(dsn: str, db: Db, tmp_path: Path, quantity: str, undone: list[str]) -> None:
    _order(dsn, tmp_path, "--quantity", quantity)
    ran = [task for task, state in db.execute(_RAN).fetchall() if state == "completed"]
    assert ran == [*(["reserve"] if undone else []), *undone]
    assert db.execute(_SHOP).fetchone() == (100, 1000)
