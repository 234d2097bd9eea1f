"""Whatever happens to random trees: what ran to undo them is what had completed, backwards, if the root ended badly.

PGWORKER_MODEL_EXAMPLES sets how many random histories are tried; without it a few, always the same ones.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import event, given
from hypothesis import strategies as st

from tests.calling import Conn, call, claim, register, rows, state, value, values
from tests.histories import histories, patience
from tests.invariants import violations
from tests.trees.undoing import settle

_TABLES = "job, finished, attempt, counter, dependency, compensation, unsettled, worker, notice"

Spec = dict[str, Any]

_node = {
    "on_failure": st.sampled_from(["fail-parent", "fail-parent", "ignore", "remove"]),
    "undoable": st.booleans(),
    "after": st.sampled_from([0, 0, 1, 1, 3]),  # a bit for each of the siblings before it
}
_nodes = st.lists(
    st.recursive(
        st.fixed_dictionaries({**_node, "children": st.just([])}),
        lambda below: st.fixed_dictionaries({**_node, "children": st.lists(below, min_size=1, max_size=3)}),
        max_leaves=8,
    ),
    min_size=2,
    max_size=4,
)
_steps = st.lists(
    st.tuples(
        st.sampled_from(["claim"] * 5 + ["complete"] * 8 + ["fail", "add", "by hand", "cancel", "delete", "retry"]),
        st.integers(0, 99),
    ),
    min_size=10,
    max_size=40,
)


def _written(specs: list[Spec]) -> list[Spec]:
    return [
        {
            "identifier": "t",
            "name": f"n{place}",
            "on_failure": spec["on_failure"],
            "max_attempts": 1,
            "after": [f"n{before}" for before in range(place) if spec["after"] >> before & 1],
            "children": _written(spec["children"]),
            **({"compensate": {"identifier": "undo", "max_attempts": 1}} if spec["undoable"] else {}),
        }
        for place, spec in enumerate(specs)
    ]


class History:
    """A tree, what is done to it, and what of it has completed."""

    def __init__(self, conn: Conn, specs: list[Spec]) -> None:
        self.conn = conn
        self.worker = register(conn)
        tree = {"identifier": "t", "max_attempts": 1, "children": _written(specs)}
        self.root = value(conn, "select id from pgworker.add_job_tree(%s)", json.dumps(tree))
        self.held: list[int] = []
        self.completed: list[int] = []

    def pick(self, ids: list[int], number: int) -> list[int]:
        return ids[number % len(ids) :][:1] if ids else []

    def live(self) -> list[int]:
        query = "select id from pgworker.job where task_identifier = 't' and locked_by is null order by id"
        return values(self.conn, query)

    def step(self, kind: str, number: int) -> None:
        if kind == "claim":
            self.held += [job["id"] for job in claim(self.conn, self.worker, 1 + number % 2, tasks=["t"])]
        elif kind in ("complete", "fail", "add"):
            for job in self.pick(self.held, number):
                if kind == "add":
                    children = _written([{"on_failure": "ignore", "undoable": True, "after": 0, "children": []}])
                    del children[0]["name"]
                    call(self.conn, "add_children", self.worker, job, json.dumps(children))
                    return
                self.held.remove(job)
                if kind == "fail":
                    call(self.conn, "fail_job", self.worker, job, "it broke")
                else:
                    call(self.conn, "complete_job", self.worker, job)  # also if it was asked to stop: it is done
                    self.completed.append(job)
        elif kind == "by hand":
            self.completed += [job["id"] for job in call(self.conn, "complete_jobs", self.pick(self.live(), number))]
        elif kind == "cancel":
            call(self.conn, "cancel_jobs", self.pick(self.live(), number))
        elif kind == "delete":
            self.conn.execute("delete from pgworker.job where id = any (%s)", [self.pick(self.live(), number)])
        else:
            query = "select id from pgworker.finished where task_identifier = 't' and state <> 'completed' order by id"
            again = [job["id"] for job in call(self.conn, "retry_jobs", self.pick(values(self.conn, query), number))]
            self.completed = [job for job in self.completed if job not in again]
        assert violations(self.conn) == []

    def drain(self) -> list[int]:
        """Do what there is to do; return what was undone, in that order. Every third compensation fails."""
        undone: list[int] = []
        while self.held or values(self.conn, "select id from pgworker.job union all select n from pgworker.unsettled"):
            self.step("claim", 1)
            for _ in self.held[:]:
                self.step("complete", 0)
            for job in claim(self.conn, self.worker, 10, tasks=["undo"]):
                undone.append(job["payload"]["node"]["id"])
                if len(undone) % 3:
                    call(self.conn, "complete_job", self.worker, job["id"])
                else:
                    call(self.conn, "fail_job", self.worker, job["id"], "it broke")
            settle(self.conn)
            assert violations(self.conn) == []
        return undone


@patience(300)
def test_what_was_undone_is_what_had_completed_backwards_if_the_tree_failed(db: Conn) -> None:
    @histories(20)
    @given(specs=_nodes, steps=_steps)
    def compare(specs: list[Spec], steps: list[tuple[str, int]]) -> None:
        db.execute(f"truncate {', '.join(f'pgworker.{name}' for name in _TABLES.split(', '))}".encode())
        db.execute("select set_config('pgworker.cursor', '', false)")
        history = History(db, specs)
        for kind, number in steps:
            history.step(kind, number)
        undone = history.drain()
        undoable = {row["node_id"] for row in rows(db, "select node_id from pgworker.compensations")}
        ended = state(db, history.root)
        expected = (
            [job for job in reversed(history.completed) if job in undoable] if ended in ("failed", "cancelled") else []
        )
        event(f"{ended}, {min(len(expected), 3)} undone")
        assert undone == expected

    compare()
