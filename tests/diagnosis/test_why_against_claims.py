"""Whatever the state: what why() calls ready a claim gets, and nothing else; what it names is really in the way.

PGWORKER_MODEL_EXAMPLES sets how many random histories are tried; without it a few, always the same ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from tests.calling import Conn, add, call, claim_ids, register, rows, values
from tests.clock import move_clock
from tests.connections import Connections
from tests.histories import histories, patience
from tests.model.queue_model import Model
from tests.model.test_against_model import Queue
from tests.trees import test_tree_model as trees

_LIVE = "select id, state, parent_id, pgworker.why(id) as why from pgworker.jobs where finished_at is null"


def ready(conn: Conn) -> set[int]:
    """The jobs that nothing holds back, if one asks."""
    said = rows(conn, _LIVE)
    assert all(job["why"].startswith("claimed by worker ") == (job["state"] == "running") for job in said)
    return {job["id"] for job in said if job["why"].startswith("ready, ")}


def would_get(conn: Conn, worker: int, **asked: Any) -> set[int]:
    """The jobs that a worker gets which claims all that it can, as if it had not."""
    with conn.transaction(force_rollback=True):
        return set(claim_ids(conn, worker, 1000, **asked))


@dataclass
class WithForbiddenFlags(Model):
    """The model, with flags that the database forbids."""

    forbidden: set[str] = field(default_factory=set)

    def claim(self, worker: int, most: int, tasks: list[str] | None, forbidden: list[str]) -> list[int]:
        return super().claim(worker, most, tasks, [*forbidden, *self.forbidden])


class ExplainedQueue(Queue):
    """The queue of the model, where somebody asks why() from time to time."""

    def __init__(self, connections: list[psycopg.Connection[Any]]) -> None:
        super().__init__(connections)
        self.model: WithForbiddenFlags = WithForbiddenFlags()
        self.asked: dict[int, dict[str, Any]] = {}

    def teardown(self) -> None:
        super().teardown()
        self.connections[0].execute("truncate pgworker.forbidden_flag")

    def _claim(self, worker: int, most: int, tasks: list[str] | None, forbidden: list[str]) -> None:
        super()._claim(worker, most, tasks, forbidden)
        self.asked[worker % len(self.workers)] = {"tasks": tasks, "forbidden_flags": forbidden}

    @rule(flag=st.sampled_from(["x", "y"]), forbidden=st.booleans())
    def forbid_or_allow(self, flag: str, forbidden: bool) -> None:
        self.call(f"select pgworker.{'forbid' if forbidden else 'allow'}_flag(%s)", flag)
        self.model.forbidden = self.model.forbidden | {flag} if forbidden else self.model.forbidden - {flag}

    @invariant()
    def what_is_ready_is_what_claims_get(self) -> None:
        got = [would_get(self.connections[n], self.workers[n], **asked) for n, asked in self.asked.items()]
        if self.workers:
            assert ready(self.connections[0]) == set().union(*got)


class ExplainedForest(trees.Forest):
    """Trees, where a worker that takes everything asks why() after each step."""

    def step(self, kind: str, pick: int, number: int) -> None:
        super().step(kind, pick, number)
        worker = register(self.conn, lease="1 hour")
        claimed = would_get(self.conn, worker)
        # What asks must be on record, and would have been if that claim had lasted.
        self.conn.execute("insert into pgworker.interest values (%s, 0, null, null)", [worker])
        assert ready(self.conn) == claimed
        live = {job["id"]: job for job in rows(self.conn, _LIVE)}
        for id, job in live.items():
            if job["state"] == "waiting":
                blockers = [int(named) for named in re.findall(r"(\d+) \(", job["why"])]
                assert blockers, job
                for blocker in blockers:
                    gate = re.match(r"below job (\d+)", job["why"])
                    beside = live[int(gate[1])]["parent_id"] if gate else job["parent_id"]
                    assert live[blocker]["parent_id"] == (id if "child" in job["why"] else beside), job
        self.conn.execute("delete from pgworker.interest where worker_id = %s", [worker])
        self.conn.execute("delete from pgworker.worker where id = %s", [worker])


@pytest.mark.parametrize("workers", [1, 2])
@patience(120)
def test_why_is_the_truth_about_queues(connect: Connections, workers: int) -> None:
    connections = [connect() for _ in range(workers)]
    run_state_machine_as_test(
        lambda: ExplainedQueue(connections),  # type: ignore[arg-type]
        settings=histories(6, stateful_step_count=40),
    )


@patience(120)
def test_why_is_the_truth_about_trees(db: Conn) -> None:
    @histories(8)
    @given(
        families=st.lists(trees.families, min_size=1, max_size=2),
        steps=st.lists(st.tuples(trees.kinds, trees.picks, trees.picks), min_size=20, max_size=40),
    )
    def explain(families: list[list[trees.Spec]], steps: list[trees.Step]) -> None:
        forest = ExplainedForest(db, families)
        for step in steps:
            forest.step(*step)

    explain()


_NOON = datetime(2031, 5, 17, 12, tzinfo=UTC)
_limits = st.fixed_dictionaries(
    {},
    optional={
        "max_concurrency": st.sampled_from([1, 2]),
        "max_concurrency_per_key": st.just(1),
        "rate_limit": st.just(2),
        "rate_limit_per_key": st.just(1),
        "fair": st.booleans(),
    },
)
_job = st.fixed_dictionaries(
    {
        "identifier": st.sampled_from(["a", "a", "b"]),
        "limit_key": st.sampled_from([None, "k", "l"]),
        "queue_name": st.sampled_from([None, None, "q"]),
        "flags": st.sampled_from([None, None, ["x"]]),
        "priority": st.sampled_from([0, 0, 1]),
    }
)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), _job),
        st.tuples(st.just("add"), _job),
        st.tuples(st.just("limit"), _limits),
        st.tuples(st.just("claim"), st.sampled_from([1, 1, 2])),
        st.tuples(st.just("complete"), st.integers(0, 9)),
        st.tuples(st.just("pass"), st.sampled_from([1, 30])),
    ),
    min_size=15,
    max_size=30,
)


def gets(conn: Conn, worker: int, job: int) -> bool:
    """Whether a worker gets that job if no other is there to be claimed first."""
    with conn.transaction(force_rollback=True):
        conn.execute("select set_config('pgworker.cursor', '', false), set_config('pgworker.lanes', '', false)")
        conn.execute("update pgworker.job set run_at = '2100-01-01' where id <> %s and locked_by is null", [job])
        return claim_ids(conn, worker, 1000, forbidden_flags=["y"]) == [job]


@patience(120)
def test_why_is_the_truth_about_limits(db: Conn) -> None:
    @histories(15)
    @given(steps=_steps)
    def explain(steps: list[tuple[str, Any]]) -> None:
        now = _NOON
        db.execute("truncate pgworker.job, pgworker.queue, pgworker.task, pgworker.permit, pgworker.worker")
        db.execute("select set_config('pgworker.cursor', '', false), set_config('pgworker.lanes', '', false)")
        move_clock(db, str(now))
        worker = register(db, lease="1 day")
        claim_ids(db, worker, forbidden_flags=["y"])
        for kind, chosen in steps:
            if kind == "add":
                add(db, **chosen)
            elif kind == "limit":
                rates = {f"{name}": "20 seconds" for name in ("rate_interval", "rate_interval_per_key")}
                wanted = {name: rate for name, rate in rates.items() if name.replace("interval", "limit") in chosen}
                call(db, "configure_task", "a", **chosen, **wanted, reset=["all"])
            elif kind == "claim":
                claim_ids(db, worker, chosen, forbidden_flags=["y"])
            elif kind == "complete":
                held = values(db, "select id from pgworker.jobs where state = 'running' order by id")
                for job in held[chosen : chosen + 1]:
                    call(db, "complete_job", worker, job)
            else:
                now += timedelta(seconds=chosen)
                move_clock(db, str(now))
            said = ready(db)
            got = would_get(db, worker, forbidden_flags=["y"])
            assert got <= said
            assert all(gets(db, worker, job) for job in said - got)

    explain()
