"""Two transactions in one tree, in every order: what comes out is what one after the other would have made of it.

A session acts, a second one acts before the first has ended, and then they end, each with commit or rollback. Whoever
has to wait is seen waiting.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.calling import Conn, claim_ids, register, rows, value
from tests.connections import Connections
from tests.invariants import violations
from tests.sessions import Background
from tests.waiting import until

_CHILD = {"identifier": "child"}
_PARENT: dict[str, Any] = {
    "identifier": "p", "name": "p", "on_failure": "ignore",
    "children": [{**_CHILD, "name": "c1"}, {**_CHILD, "name": "c2"}],
}  # fmt: skip
_LEAF = {"identifier": "leaf", "name": "leaf"}
_PHASE = {"identifier": "phase", "name": "phase", "after": ["c1", "c2"], "children": [_LEAF]}
SCENES: dict[str, dict[str, Any]] = {
    "a parent": _PARENT,
    "a phase": {**_PARENT, "children": [*_PARENT["children"], _PHASE]},
    "a running parent": {**_PARENT, "children": []},
}
# {c} is the first child for the one session, the second for the other.
CHILD_ENDS = {
    "completes a child": "select pgworker.complete_job({worker}, {c}, '1')",
    "reports a child": "select * from pgworker.finish_jobs({worker}, array[{c}], null, null, null)",
}
ACTS = {
    **CHILD_ENDS,
    "fails a child": "select pgworker.fail_job({worker}, {c}, 'broken', permanent => true)",
    "deletes a child": "delete from pgworker.job where id = {c} returning id",
    "cancels the parent": "select pgworker.cancel_jobs(array[{p}::bigint])",
    "cancels the root": "select pgworker.cancel_jobs(array[{root}::bigint])",
    "fails the parent": "select pgworker.permanently_fail_jobs(array[{p}::bigint])",
    "completes the parent by hand": "select pgworker.complete_jobs(array[{p}::bigint])",
    "deletes the parent": "delete from pgworker.job where id = {p} returning id",
}
RUNNING_ACTS = {
    **{name: act for name, act in ACTS.items() if "by hand" not in name and "fails the parent" not in name},
    "waits": "select pgworker.wait_for_children({worker}, {p})",
    "adds children": """select pgworker.add_children({worker}, {p}, '[{{"identifier": "child", "name": "new{c}"}}]')""",
    "completes the parent": "select pgworker.complete_job({worker}, {p})",
}


class Scene:
    """A tree in which two children run, and what can be done to it."""

    def __init__(self, db: Conn, worker: int, which: str) -> None:
        tree = {"identifier": "root", "name": "root", "children": [SCENES[which]]}
        self.db = db
        self.root = value(db, "select id from pgworker.add_job_tree(%s)", Jsonb(tree))
        if which == "a running parent":
            (parent,) = claim_ids(db, worker, tasks=["p"])
            children = Jsonb(_PARENT["children"])
            db.execute("select pgworker.add_children(%s, %s, %s)", [worker, parent, children])
        assert len(claim_ids(db, worker, 10, tasks=["child"])) == 2
        found = db.execute("select name, id from pgworker.job where root_id = %s", [self.root]).fetchall()
        self.ids = {**dict(found), "root": self.root, "worker": worker}

    def act(self, act: str, child: str) -> str:
        return act.format(**self.ids, c=self.ids[child])

    def settled(self) -> dict[str, Any]:
        """Return the states of all, when what was put off has been done."""

        def over() -> bool:
            self.db.execute("select pgworker.maintain()")
            return not rows(self.db, "select from pgworker.unsettled")

        until(over, "the rest of the settling")
        found = {"violations": violations(self.db)} if violations(self.db) else {}
        return found | {
            re.sub(r"\d{2,}$", "", row["name"]): (row["state"], row["ends_as"])
            for row in rows(
                self.db,
                "select coalesce(v.name, 'root') as name, v.state, j.ends_as from pgworker.jobs v"
                " left join pgworker.job j on j.id = v.id where v.root_id = %s order by v.id",
                self.root,
            )
        }

    def free(self) -> None:
        """Take the tree away, so that the next scene finds none of its jobs."""
        self.db.execute("delete from pgworker.job where root_id = %s", [self.root])
        self.db.execute("delete from pgworker.finished where root_id = %s", [self.root])
        self.db.execute("delete from pgworker.dependency")


def _do(conn: Conn, query: str) -> None:
    """Do it, unless what it wants to do it to has gone."""
    try:
        with conn.transaction():
            rows(conn, query)
    except psycopg.Error as error:
        if error.sqlstate != "PW001":
            raise


def _in_turn(db: Conn, worker: int, which: str, acts: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    scene = Scene(db, worker, which)
    for act, child in acts:
        _do(db, scene.act(act, child))
    states = scene.settled()
    scene.free()
    return states


class Pair:
    """Two sessions that each have a transaction open."""

    def __init__(self, db: Conn, connect: Connections) -> None:
        self.db = db
        self.first, self.second = connect(autocommit=False), connect(autocommit=False)

    def run(self, first: str, second: str, ends: tuple[str, str], second_ends_first: bool) -> bool:
        """Return whether the second had to wait for the end of the first."""
        rows(self.first, first)
        background = Background(self.second, second)
        waits = until(
            lambda: "over" if background.over else self._blocked(), "the second session, which either ends or waits"
        )
        if waits == "over" and second_ends_first:
            self._end(self.second, background, ends[1])
            self._end(self.first, None, ends[0])
        else:
            self._end(self.first, None, ends[0])
            self._end(self.second, background, ends[1])
        return waits == "blocked"

    def _blocked(self) -> str:
        blocked = value(self.db, "select cardinality(pg_blocking_pids(%s)) > 0", self.second.info.backend_pid)
        return "blocked" if blocked else ""

    @staticmethod
    def _end(conn: Conn, background: Background | None, how: str) -> None:
        try:
            if background:
                background.result()
        except psycopg.Error as error:
            if error.sqlstate != "PW001":
                raise
            how = "rollback"
        conn.execute(how.encode())


@pytest.mark.timeout(600)  # some 400 pairs each
@pytest.mark.parametrize("which", SCENES)
def test_two_transactions_leave_what_one_after_the_other_would(db: Conn, connect: Connections, which: str) -> None:
    worker = register(db, lease="1 hour")
    pair = Pair(db, connect)
    acts = RUNNING_ACTS if which == "a running parent" else ACTS
    ends = [("commit", "commit"), ("commit", "rollback"), ("rollback", "commit")]
    waited = 0
    wrong: list[str] = []
    known: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    for (one, other), (first, second) in itertools.product(itertools.product(acts, acts), ends):
        done = [(acts[one], "c1")] * (first == "commit") + [(acts[other], "c2")] * (second == "commit")
        for order in itertools.permutations(done):
            if order not in known:
                known[order] = _in_turn(db, worker, which, order)
        possible = [known[order] for order in itertools.permutations(done)]
        for second_ends_first in (False, True):
            scene = Scene(db, worker, which)
            waits = pair.run(
                scene.act(acts[one], "c1"), scene.act(acts[other], "c2"), (first, second), second_ends_first
            )
            case = f"{one}, {first}; {other}, {second}; {'it waited' if waits else 'no wait'}, {second_ends_first=}"
            if {one, other} <= CHILD_ENDS.keys():
                assert waits, case
                assert rows(db, "select * from pgworker.unsettled") == [], case  # at once, without maintain()
            if (got := scene.settled()) not in possible:
                wrong.append(f"{case}: {got} is none of {possible}")
            scene.free()
            waited += waits
            if waits:
                break  # it cannot end first
    assert not wrong, f"{len(wrong)} cases:\n" + "\n".join(wrong)
    assert waited > 20
