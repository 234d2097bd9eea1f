"""The monthly report, run as its text says."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psycopg
import pytest

import examples.monthly_report
from tests.examples.commands import commands, run

Db = psycopg.Connection[Any]

pytestmark = pytest.mark.usefixtures("consistent_afterwards")


@pytest.fixture
def rates() -> Iterator[str]:
    """The address of a service that knows exchange rates."""

    class Service(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"USD": 2, "JPY": 150}).encode())

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class _Elements(HTMLParser):
    """How often each element opens; AssertionError where one closes that is not the last one open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_the_commands_of_its_text_make_a_page_without_the_rates(dsn: str, db: Db, tmp_path: Path) -> None:
    add, work, look = commands(examples.monthly_report)
    root = run(add, dsn, tmp_path).strip()
    run(work, dsn, tmp_path)
    picture = run([root if word == "ID" else word for word in look], dsn, tmp_path).splitlines()
    assert picture[0].startswith(f"completed  monthly-report #{root}  ")
    (rates,) = [line for line in picture if "rates" in line]
    assert rates.startswith("failed     ├─ rates (exchange-rates)")
    assert "URLError" in rates
    assert picture[-1] == "7 jobs: 6 completed, 1 failed"

    file = tmp_path / "monthly-report-2026-09.html"
    row = db.execute(
        "select result, (select sum(amount)::float8 from monthly_report.sales) from pgworker.jobs where id = 1"
    )
    result, revenue = row.fetchone() or (None, None)
    assert result == {"file": str(file), "revenue": revenue, "missing": [{"asked": "http://127.0.0.1:9/rates"}]}
    page = file.read_text(encoding="utf-8")
    elements = _Elements(page).count
    assert (elements["svg"], elements["rect"], elements["table"]) == (1, 30 * 4, 1)
    assert f"{revenue:,.2f} €" in page
    assert "The exchange rates were not to be had." in page
    assert list(tmp_path.iterdir()) == [file]


def test_with_a_service_that_answers_the_page_has_the_rates(dsn: str, db: Db, tmp_path: Path, rates: str) -> None:
    add, work, _ = commands(examples.monthly_report)
    run(add, dsn, tmp_path, "--rates", rates)
    run(work, dsn, tmp_path)
    assert db.execute("select state, count(*) from pgworker.jobs group by 1").fetchall() == [("completed", 7)]
    (revenue,) = db.execute("select sum(amount) from monthly_report.sales").fetchone() or (0,)
    page = (tmp_path / "monthly-report-2026-09.html").read_text(encoding="utf-8")
    assert f"Elsewhere that is {150 * revenue:,.2f} JPY, {2 * revenue:,.2f} USD." in page
