"""What a job costs, from add to finish, in what no other load on the machine changes: statements, WAL, pages.

Where a number here rises, a statement, an index entry or a row version has come in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tests.calling import Conn, call, register, value, values
from tests.cursors import sweeps_cost
from tests.plans.explained import Explained, Plan

_PAYLOAD = {"id": 1, "text": "x" * 75}  # a hundred bytes as JSON
_JOB = json.dumps({"identifier": "t", "payload": _PAYLOAD})
_ADD = f"select count(*) from pgworker.add_jobs((select jsonb_agg('{_JOB}'::jsonb) from generate_series(1, %s)))"
_ADD_ONE = f"select count(*) from pgworker.add_job('t', '{json.dumps(_PAYLOAD)}'::jsonb)"
_CLAIM = "select array_agg(id) from pgworker.get_jobs(%s, %s, '{t}')"
_FINISH = "select count(*) from pgworker.finish_jobs(%s, %s, %s::jsonb[], null, null)"
_COMPLETE = "select pgworker.complete_job(%s, %s)"


@dataclass
class Costs:
    """WAL records, WAL bytes and pages, for each job."""

    records: float
    size: float
    pages: float


class Ways:
    """A job's ways, each explained; ``costs`` of the last time that no page went whole into the WAL."""

    def __init__(self, conn: Conn, jobs: int, result: str | None = None) -> None:
        self.conn = conn
        self.jobs = jobs
        self.result = result
        self.worker = register(conn, lease="1 hour")
        self.costs: dict[str, Costs] = {}
        for _ in range(4):  # plans, the catalogue and the first pages have been read by then
            self._once()
        for _ in range(20):
            if not self._once():
                return
        raise AssertionError("there was always a checkpoint in between")

    def _once(self) -> int:
        add = (_ADD, self.jobs) if self.jobs > 1 else (_ADD_ONE,)
        if self.jobs == 1:
            sweeps_cost(self.conn, 0)  # a brief claim, also where the last one was slow
        images = self._cost("add", *add) + self._cost("claim", _CLAIM, self.worker, self.jobs)
        held = values(self.conn, "select id from pgworker.job where locked_by = %s order by id", self.worker)
        assert len(held) == self.jobs
        if self.jobs == 1:
            return images + self._cost("finish", _COMPLETE, self.worker, held[0])
        results = None if self.result is None else [self.result] * self.jobs
        return images + self._cost("finish", _FINISH, self.worker, held, results)

    def _cost(self, way: str, query: str, *parameters: Any) -> int:
        told = value(self.conn, f"explain (analyze, buffers, wal, format json) {query}", *parameters)
        plan: Plan = told[0]["Plan"]
        pages = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
        self.costs[way] = Costs(plan["WAL Records"] / self.jobs, plan["WAL Bytes"] / self.jobs, pages / self.jobs)
        return int(plan["WAL FPI"])


@pytest.mark.parametrize(
    ("jobs", "result", "most"),
    [
        # added: the row and two index entries; claimed: locked and updated, no index entry; ended: deleted
        (500, None, {"add": Costs(3.1, 380, 11), "claim": Costs(2.1, 165, 6), "finish": Costs(1.05, 60, 7)}),
        # kept: besides, the row in finished and two index entries
        (500, "1", {"add": Costs(3.1, 380, 11), "claim": Costs(2.1, 165, 6), "finish": Costs(4.1, 490, 15)}),
        # A claim by itself locks its worker, too. A job that is completed by itself is locked first.
        (1, None, {"add": Costs(3, 370, 11), "claim": Costs(3, 220, 17), "finish": Costs(2, 115, 16)}),
    ],
    ids=["many", "many with results", "one by one"],
)
def test_a_job_costs_no_more_than_it_must(db: Conn, jobs: int, result: str | None, most: dict[str, Costs]) -> None:
    spent = Ways(db, jobs, result).costs
    for way, bound in most.items():
        cost = spent[way]
        assert cost.records <= bound.records, (way, cost)
        assert cost.size <= bound.size, (way, cost)
        assert cost.pages <= bound.pages, (way, cost)
    assert value(db, "select count(*) from pgworker.job") == 0


def test_a_batch_takes_as_many_statements_as_a_job(db: Conn) -> None:
    worker = Ways(db, 2).worker
    explained = Explained(db)
    counts = []
    for jobs in (2, 2, 300):  # the first makes plans
        explained.forget()
        db.execute(_ADD.encode(), [jobs])
        db.execute(_CLAIM.encode(), [worker, jobs])
        held = values(db, "select id from pgworker.job where locked_by = %s", worker)
        call(db, "finish_jobs", worker, held, None, None, None)
        counts.append(len(explained.plans))
    assert max(counts[1:]) < 25, counts  # one more or less is a sweep that was due
