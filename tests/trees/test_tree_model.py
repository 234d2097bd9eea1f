"""Random trees with random policies end, step by step, as a model that knows no counters says.

PGWORKER_MODEL_EXAMPLES sets how many random histories are tried; without it a few, always the same ones.
"""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.calling import Conn, Row, call, claim_ids, register, rows, value
from tests.histories import histories, patience
from tests.invariants import violations
from tests.trees.forest import Node
from tests.trees.tree_model import Trees

_SEEN = """
select v.id, case v.state when 'scheduled' then 'ready' else v.state end as state, v.locked_by as holder, v.attempts,
       coalesce(j.cause_id, f.cause_id) as cause, v.last_error, v.parent_id, v.run_at > now() as early
from pgworker.jobs v
left join pgworker.job j on j.id = v.id
left join pgworker.finished f on f.id = v.id
order by v.id
"""
_TABLES = "job, finished, counter, dependency, unsettled, queue, worker, notice"

Spec = dict[str, Any]
Step = tuple[str, int, int]

_node = {
    "on_failure": st.sampled_from(["fail-parent", "fail-parent", "ignore", "remove"]),
    "max_attempts": st.sampled_from([1, 1, 2]),
    "queue": st.sampled_from([None, None, None, "q"]),
    "after": st.sampled_from([0, 0, 0, 1, 1, 2, 3, 5]),  # a bit for each of the siblings before it
}
leaves = st.fixed_dictionaries({**_node, "children": st.just([])})
families = st.lists(
    st.recursive(
        leaves,
        lambda below: st.fixed_dictionaries({**_node, "children": st.lists(below, min_size=1, max_size=4)}),
        max_leaves=12,
    ),
    min_size=1,
    max_size=4,
)
picks = st.integers(0, 999)
kinds = st.sampled_from(
    ["claim"] * 9 + ["complete"] * 5 + ["fail", "fail", "give_up", "give_up", "report", "report", "vanish"]
    + ["cancel_job", "cancel", "permanently_fail", "complete_by_hand", "delete", "remove_job", "retry", "retry"]
    + ["retry", "add_children", "add_children", "wait", "wait"]
)  # fmt: skip


class Forest:
    """Trees in a database and in the model, step by step."""

    def __init__(self, conn: Conn, families: list[list[Spec]]) -> None:
        self.conn = conn
        self.model = Trees()
        self.workers: list[int] = []
        conn.execute(f"truncate {', '.join(f'pgworker.{name}' for name in _TABLES.split(', '))}".encode())
        conn.execute("select set_config('pgworker.cursor', '', false)")
        for family in families:
            ((root,),) = conn.execute(
                "select id from pgworker.add_job_tree(%s::text::jsonb)",
                [json.dumps({"identifier": "root", "max_attempts": 1, "children": self.written(family)})],
            )
            self.model[root] = Node(root, None, 0, "fail-parent", 1)
            self.learn(root, family)
        self.model.settle()

    def written(self, specs: list[Spec]) -> list[Spec]:
        """Write nodes as add_job_tree takes them: each has a task of its own, and a key."""
        self.names = getattr(self, "names", 0)
        nodes: list[Spec] = []
        for place, spec in enumerate(specs):
            self.names += 1
            nodes.append(
                {
                    "identifier": "t",
                    "name": f"n{self.names}",
                    "job_key": f"k{self.names}",
                    "on_failure": spec["on_failure"],
                    "max_attempts": spec["max_attempts"],
                    "after": [nodes[before]["name"] for before in range(place) if spec["after"] >> before & 1],
                    **({"queue_name": spec["queue"]} if spec["queue"] else {}),
                    "children": self.written(spec["children"]),
                }
            )
        return nodes

    def learn(self, parent: int, specs: list[Spec]) -> None:
        """Put what was added below a job into the model: ids ascend as the tree reads."""
        known = self.model.keys()
        found = [row for row in self.seen() if row["parent_id"] == parent and row["id"] not in known]
        ids = [row["id"] for row in found]
        for place, (id, spec) in enumerate(zip(ids, specs, strict=True)):
            after = {ids[before] for before in range(place) if spec["after"] >> before & 1}
            depth = self.model[parent].depth + 1
            node = Node(id, parent, depth, spec["on_failure"], spec["max_attempts"], after, gates=set(after))
            self.model[id] = node
        for id, spec in zip(ids, specs, strict=True):
            self.learn(id, spec["children"])

    def seen(self) -> list[Row]:
        return rows(self.conn, _SEEN)

    def chosen(self, state: str, pick: int, most: int = 1) -> list[int]:
        """Return up to so many jobs of that state, none below another."""
        ids = [id for id, node in self.model.items() if state in (self.model.seen(node), node.state)]
        start = pick % len(ids) if ids else 0
        found = sorted((ids[start:] + ids[:start])[:most])
        return [id for id in found if not self.model.all(self.model.children, id) & set(found)]

    def step(self, kind: str, pick: int, number: int) -> None:
        getattr(self, f"do_{kind}")(pick, 1 + number % 3)
        self.model.settle()
        got = {row["id"]: (row["state"], row["holder"], row["attempts"]) for row in self.seen()}
        expected = {
            id: (self.model.seen(node), node.holder, node.attempts)
            for id, node in self.model.items()
            if node.state != "gone"
        }
        assert got == expected
        for row in self.seen():
            node = self.model[row["id"]]
            if node.state != "live":
                said = re.match(r"child (\d+) ", row["last_error"] or "")
                named = node.ended[2] if node.state == "completed" else int(said[1]) if said else None
                assert (row["state"], row["cause"], named) == node.ended, row
        assert violations(self.conn) == []
        assert rows(self.conn, "select * from pgworker.unsettled") == []  # nobody was in the way

    def do_claim(self, pick: int, number: int) -> None:
        for id in self.chosen("ready", pick, number):
            if len(self.workers) < 2:
                self.workers.append(register(self.conn, lease="1 hour"))
            worker = self.workers[pick % 2 % len(self.workers)]
            self.conn.execute("update pgworker.job set task_identifier = 'it', run_at = now() where id = %s", [id])
            busy = value(
                self.conn, "select exists (select from pgworker.queue q join pgworker.job j on j.queue_name = q.name"
                " where q.job_id is not null and j.id = %s)", id,
            )  # fmt: skip
            claimed = claim_ids(self.conn, worker, tasks=["it"])
            assert claimed == ([] if busy else [id])
            self.conn.execute("update pgworker.job set task_identifier = 't' where id = %s", [id])
            for _ in claimed:
                self.model[id].holder = worker
                self.model[id].attempts += 1

    def run_out(self, ids: list[int]) -> dict[int, str]:
        """Give failed attempts back; return those that may not run again, as failed."""
        over = {}
        for id in ids:
            node = self.model[id]
            if node.attempts < node.most and not node.stop:
                node.holder = None
                node.waits = False
            else:
                over[id] = "failed"
        return over

    def do_complete(self, pick: int, number: int) -> None:
        for id in self.chosen("running", pick):
            call(self.conn, "complete_job", self.model[id].holder, id)
            self.model.end({id: "completed"})

    def do_fail(self, pick: int, number: int) -> None:
        for id in self.chosen("running", pick):
            call(self.conn, "fail_job", self.model[id].holder, id, "it broke")
            self.model.end(self.run_out([id]))

    def do_give_up(self, pick: int, number: int) -> None:
        for id in self.chosen("running", pick):
            call(self.conn, "fail_job", self.model[id].holder, id, "it broke", permanent=True)
            self.model.end({id: "failed"})

    def do_cancel_job(self, pick: int, number: int) -> None:
        for id in self.chosen("running", pick):
            call(self.conn, "cancel_job", self.model[id].holder, id)
            self.model.end({id: "cancelled"})

    def do_report(self, pick: int, number: int) -> None:
        """Whatever a worker holds ends at once, some of it badly."""
        if self.workers:
            worker = self.workers[pick % len(self.workers)]
            held = [id for id, node in self.model.items() if node.holder == worker]
            completed, failed = held[::number], [id for id in held if id not in held[::number]]
            call(self.conn, "finish_jobs", worker, completed, None, failed, ["it broke"] * len(failed))
            self.model.end(dict.fromkeys(completed, "completed") | self.run_out(failed))

    def do_vanish(self, pick: int, number: int) -> None:
        if self.workers:
            worker = self.workers.pop(pick % len(self.workers))
            self.conn.execute("update pgworker.worker set lease_until = now() - interval '1 s' where id = %s", [worker])
            call(self.conn, "maintain")
            self.model.end(self.run_out([id for id, node in self.model.items() if node.holder == worker]))

    def do_cancel(self, pick: int, number: int) -> None:
        ids = self.chosen("live" if pick % 4 else "failed", pick, number)
        call(self.conn, "cancel_jobs", ids)
        for node in self.model.live(ids):
            node.stop = node.stop or (("cancelled", None, None) if node.holder else None)
        self.model.end({node.id: "cancelled" for node in self.model.live(ids) if not node.holder})
        for id in ids:
            self.model.stop(self.model.all(self.model.children, id), id, None)

    def do_permanently_fail(self, pick: int, number: int) -> None:
        ids = self.chosen("live", pick, number)
        call(self.conn, "permanently_fail_jobs", ids)
        self.model.end({node.id: "failed" for node in self.model.live(ids) if not node.holder})

    def do_complete_by_hand(self, pick: int, number: int) -> None:
        ids = self.chosen("live", pick, number) + self.chosen("failed", pick)
        call(self.conn, "complete_jobs", ids)
        self.model.end({node.id: "completed" for node in self.model.live(ids) if not node.holder})
        for id in ids:
            node = self.model[id]
            node.ended = ("completed", *node.ended[1:]) if node.state == "failed" else node.ended

    def do_delete(self, pick: int, number: int) -> None:
        ids = self.chosen("live", pick, number)
        self.conn.execute("delete from pgworker.job where id = any (%s)", [ids])
        self.model.end(dict.fromkeys(ids, "gone"))
        self.conn.execute(
            "update pgworker.queue q set job_id = null"
            " where not exists (select from pgworker.job j where j.id = q.job_id)"
        )

    def do_remove_job(self, pick: int, number: int) -> None:
        for id in self.chosen("live", pick):
            key = value(self.conn, "select key from pgworker.job where id = %s", id)
            removed = call(self.conn, "remove_job", key)
            if key and self.model[id].holder:
                self.model[id].most = self.model[id].attempts
            elif key:
                assert [row["id"] for row in removed] == [id]
                self.model.end({id: "gone"})

    def do_retry(self, pick: int, number: int) -> None:
        ids = self.chosen("failed", pick, number) or self.chosen("cancelled", pick, number)
        call(self.conn, "retry_jobs", ids)
        self.model.retry(ids)

    def do_add_children(self, pick: int, number: int) -> None:
        for id in self.chosen("running", pick):
            spec = {"on_failure": ["fail-parent", "ignore"][pick % 2], "max_attempts": 1, "queue": None, "children": []}
            specs = [{**spec, "after": pick >> 2 & 3, "children": [{**spec, "after": 0}] * (place % 2)}
                     for place in range(number)]  # fmt: skip
            call(self.conn, "add_children", self.model[id].holder, id, json.dumps(self.written(specs)))
            self.learn(id, specs)

    def do_wait(self, pick: int, number: int) -> None:
        for id in self.chosen("running", pick):
            node = self.model[id]
            waits = any(child.state == "live" for child in self.model.children(id)) and not node.stop
            assert value(self.conn, "select pgworker.wait_for_children(%s, %s)", node.holder, id) == waits
            if waits:
                node.holder, node.waits = None, True
                node.attempts -= 1


@patience(300)
def test_no_history_of_a_forest_makes_it_differ_from_the_model(db: Conn) -> None:
    @histories(16)
    @given(
        families=st.lists(families, min_size=1, max_size=2),
        steps=st.lists(st.tuples(kinds, picks, picks), min_size=30, max_size=60),
    )
    def compare(families: list[list[Spec]], steps: list[Step]) -> None:
        forest = Forest(db, families)
        for step in steps:
            forest.step(*step)

    compare()
