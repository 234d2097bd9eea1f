"""Trees from Python: the builder, adding, and reading what became of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

import psycopg
import pytest

from pgworker_client import (
    Node,
    Worker,
    add_job_tree,
    children,
    complete_jobs,
    get_children_values,
    get_failed_children_values,
    job_tree,
    permanently_fail_jobs,
    tree_progress,
)
from pgworker_client.node import nodes_json

Db = psycopg.Connection[Any]

pytestmark = pytest.mark.usefixtures("consistent_afterwards")

any_node = cast("Callable[..., Node]", Node)  # for what the type checker would not let pass


def test_a_node_is_written_as_the_json_that_the_database_takes() -> None:
    orders = Node("load-orders", {"month": 9}, name="orders")
    moment = datetime(2100, 1, 1, tzinfo=UTC)
    tree = Node(
        "report",
        children=[
            orders,
            Node("load-refunds", name="refunds", on_failure="ignore", max_attempts=3, flags=("slow", "night")),
            Node("render", after=[orders, "refunds"], run_at=moment, children=[{"identifier": "page", "priority": 0}]),
        ],
    )
    assert json.loads(tree.to_json()) == {
        "identifier": "report",
        "children": [
            {"identifier": "load-orders", "payload": {"month": 9}, "name": "orders"},
            {
                "identifier": "load-refunds",
                "name": "refunds",
                "on_failure": "ignore",
                "max_attempts": 3,
                "flags": ["slow", "night"],
            },
            {
                "identifier": "render",
                "after": ["orders", "refunds"],
                "run_at": "2100-01-01T00:00:00+00:00",
                "children": [{"identifier": "page", "priority": 0}],
            },
        ],
    }
    assert repr(tree) == "<Node 'report', 3 children>"
    assert repr(orders) == "<Node 'load-orders', name='orders'>"


def test_a_compensation_is_written_from_a_node_or_a_dict() -> None:
    refund = Node("refund", {"reason": "failed"}, max_attempts=3, flags=("bank",))
    tree = Node("order", children=[
        Node("charge", compensate=refund),
        Node("reserve", compensate={"identifier": "release", "flags": ("stock",)}),
        {"identifier": "pack", "compensate": Node("unpack")},
    ])  # fmt: skip
    assert [child["compensate"] for child in json.loads(tree.to_json())["children"]] == [
        {"identifier": "refund", "payload": {"reason": "failed"}, "max_attempts": 3, "flags": ["bank"]},
        {"identifier": "release", "flags": ["stock"]},
        {"identifier": "unpack"},
    ]


def _contains_itself() -> Node:
    node = Node("a", children=[Node("b")])
    node.children[0].children.append(node)  # type: ignore[union-attr]
    return node


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            lambda: any_node("a", on_fail="ignore"),
            "Node has no argument 'on_fail'; it takes name, children, after, on_f",
        ),
        (lambda: any_node("a", children=Node("b")), "children of node 'a' must be a list, not <Node 'b'>"),
        (lambda: any_node("a", children={"identifier": "b"}), "children of node 'a' must be a list, not {'id"),
        (lambda: Node("a", after="b"), "after of node 'a' must be a list, not 'b'"),
        (
            lambda: Node("a", children=[Node("b", after=[Node("c")])]),
            r"children\[0\].after\[0\]: <Node 'c'> is not a sib",
        ),
        (
            lambda: Node("a", children=[c := Node("c"), Node("b", after=[c])]),
            r"tree.children\[1\].after\[0\]: .*no name",
        ),
        (lambda: Node("a", children=[Node("b", {1, 2})]), r"tree.children\[0\] cannot be written as JSON: .*set"),
        (lambda: Node("a", float("nan")), "tree cannot be written as JSON"),
        (
            lambda: Node("a", children=[{"identifier": "b", "run_at": datetime(2100, 1, 1)}]),  # noqa: DTZ001
            r"tree.children\[0\].run_at must be an aware datetime",
        ),
        (
            lambda: Node("a", children=[Node("b", compensate=Node("c", children=[Node("d")]))]),
            r"tree.children\[0\].compensate: <Node 'c', 1 children> is one job",
        ),
        (_contains_itself, r"tree.children\[0\].children\[0\] is a node that contains itself"),
    ],
)
def test_a_tree_that_cannot_be_written_is_refused_with_the_place(tree: Callable[[], Node], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tree().to_json()


def test_children_that_a_generator_makes_are_not_lost() -> None:
    names = ("a", "b")
    assert json.loads(nodes_json((Node(name) for name in names), "children")) == [
        {"identifier": name} for name in names
    ]
    assert len(Node("top", children=(Node(name) for name in names), after=(name for name in names)).children) == 2


@pytest.mark.parametrize("nodes", [None, Node("a"), {"identifier": "a"}, "a", 5])
def test_what_is_no_list_of_children_is_refused_by_its_name(nodes: Any) -> None:
    with pytest.raises(TypeError, match=r"children must be a list, not "):
        nodes_json(nodes, "children")


def test_a_tree_of_nodes_is_added_and_read_back(db: Db) -> None:
    a = Node("t", {"n": 1}, name="a", on_failure="remove")
    root = add_job_tree(db, Node("top", children=[a, Node("t", after=[a], children=[Node("leaf")])]))
    assert (root.task_identifier, root.state, root.root_id, root.parent_id) == ("top", "waiting", root.id, None)
    rows = job_tree(db, root.id)
    assert [(row.depth, row.task_identifier, row.name, row.state) for row in rows] == [
        (0, "top", None, "waiting"),
        (1, "t", "a", "ready"),
        (1, "t", None, "waiting"),
        (2, "leaf", None, "waiting"),
    ]
    assert (rows[1].payload, rows[1].on_failure, rows[3].path) == ({"n": 1}, "remove", "top/t/leaf")
    assert [row.id for row in job_tree(db, rows[3].id)] == [row.id for row in rows]
    assert tree_progress(db, root.id) == {"waiting": 3, "ready": 1}
    assert [job.id for job in children(db, root.id)] == [rows[1].id, rows[2].id]


def test_a_tree_of_dicts_is_added_as_well(db: Db) -> None:
    spec = {"identifier": "top", "children": [{"identifier": "a", "name": "x"}, {"identifier": "b", "after": ["x"]}]}
    root = add_job_tree(db, spec)
    assert [job.state for job in children(db, root.id)] == ["ready", "waiting"]
    assert add_job_tree(db, json.loads(json.dumps(spec))).id > root.id


def test_what_children_left_is_read_by_their_ids(db: Db) -> None:
    root = add_job_tree(db, Node("top", children=[Node("t", n, on_failure="ignore") for n in range(3)]))

    async def handler(payload: Any, ctx: Any) -> Any:
        await ctx.progress({"seen": payload})
        return {"n": payload}

    one, two, three = children(db, root.id)
    permanently_fail_jobs(db, [two.id])
    dsn = f"{db.info.dsn} password={db.info.password}"
    Worker(dsn, tasks={"t": handler}).run_once()
    assert get_children_values(db, root.id) == {one.id: {"n": 0}, three.id: {"n": 2}}
    assert get_failed_children_values(db, root.id) == {two.id: None}
    assert get_children_values(db, one.id) == get_failed_children_values(db, 10**15) == {}
    assert job_tree(db, 10**15) == []
    assert tree_progress(db, 10**15) == {}


def test_the_tree_vanishes_with_the_callers_rollback(dsn: str, db: Db) -> None:
    with psycopg.connect(dsn) as conn:
        add_job_tree(conn, Node("top", children=[Node("leaf")]))
        conn.rollback()
    assert db.execute("select count(*) from pgworker.jobs").fetchone() == (0,)


async def test_an_async_connection_gives_an_awaitable(dsn: str) -> None:
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        root = await add_job_tree(conn, Node("top", children=[Node("leaf")]))
        assert [row.depth for row in await job_tree(conn, root.id)] == [0, 1]
        assert await tree_progress(conn, root.id) == {"waiting": 1, "ready": 1}
        (leaf,) = await children(conn, root.id)
        await complete_jobs(conn, [leaf.id])
        assert await get_children_values(conn, root.id) == {leaf.id: None}


@pytest.mark.parametrize(
    ("tree", "sqlstate", "message"),
    [
        (Node("a", children=[Node("b"), Node("c", after=["x"])]), "PW003", "tree.children[1].after"),
        (Node("a", children=[{"identifier": "b", "on_failure": "explode"}]), "PW003", "tree.children[0].on_failure"),
        (Node("a", children=[Node("b", children=[Node("")])]), "22023", "tree.children[0].children[0].identifier"),
        (Node("a", children=[{"identifier": "b", "onFailure": "ignore"}]), "22023", "onFailure"),
        (Node("a", children=[cast("Any", "b")]), "22023", "tree.children[0]"),
        ({"identifier": "a", "children": {"identifier": "b"}}, "22023", "tree.children"),
        ({"identifier": "a", "children": [{"identifier": "b", "after": "c"}]}, "22023", "tree.children[0].after"),
    ],
)
def test_what_is_wrong_with_a_tree_is_the_databases_error_and_names_the_place(
    db: Db, tree: Any, sqlstate: str, message: str
) -> None:
    with pytest.raises(psycopg.Error) as refused:
        add_job_tree(db, tree)
    assert refused.value.sqlstate == sqlstate
    assert message in str(refused.value)
    assert db.execute("select count(*) from pgworker.jobs").fetchone() == (0,)


def test_a_tree_a_thousand_deep_is_written(db: Db) -> None:
    tree = Node("leaf")
    for _ in range(999):
        tree = Node("level", children=[tree])
    root = add_job_tree(db, tree)
    assert job_tree(db, root.id)[-1].depth == 999
