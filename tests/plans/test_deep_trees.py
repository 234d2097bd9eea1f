"""What the end of a job means for others is worked out level by level, once, and not from each level all the way."""

from __future__ import annotations

import pytest

from tests.calling import Conn, value
from tests.plans.explained import Explained, buffers, nodes
from tests.trees.planting import deep


def _pages_for(conn: Conn, levels: int, end: str) -> int:
    root = value(conn, "select id from pgworker.add_job_tree(%s::jsonb)", deep(levels))
    leaf = value(conn, "select max(id) from pgworker.job")
    read = buffers(conn, end.format(root=root, leaf=leaf))
    assert value(conn, "select count(*) from pgworker.job") == 0
    return read


@pytest.mark.parametrize(
    "end",
    [
        "select count(*) from pgworker.cancel_jobs(array[{root}::bigint])",
        "select count(*) from pgworker.permanently_fail_jobs(array[{leaf}::bigint])",
        "select count(*) from pgworker.complete_jobs(array[{root}::bigint])",
    ],
    ids=["cancel", "fail", "complete"],
)
def test_the_work_grows_with_the_levels_and_not_with_their_square(db: Conn, end: str) -> None:
    _pages_for(db, 3, end)  # its plans, and the catalogue
    few = _pages_for(db, 60, end)
    many = _pages_for(db, 480, end)
    assert many < 2 * 8 * few, (few, many)


def _rows_for(explained: Explained, conn: Conn, levels: int, width: int, query: str) -> float:
    """How many rows all statements handle, those in functions too, for a tree of that many levels of that many jobs."""
    leaves = ', {"identifier": "leaf"}' * (width - 1)
    tree = '{"identifier": "inner"}'
    for _ in range(levels - 1):
        tree = f'{{"identifier": "inner", "children": [{tree}{leaves}]}}'
    root = value(conn, "select id from pgworker.add_job_tree(%s::jsonb)", tree)
    explained.forget()
    conn.execute(query.format(root=root).encode())
    rows: float = sum(
        (part["Actual Rows"] + part.get("Rows Removed by Filter", 0)) * part["Actual Loops"]
        for _, plan in explained.plans
        for part in nodes(plan)
    )
    conn.execute("delete from pgworker.job")
    return rows


@pytest.mark.parametrize(
    "query",
    [
        "select count(*) from pgworker.cancel_jobs(array[{root}::bigint])",
        "delete from pgworker.job where root_id = {root}",
        "select count(*) from pgworker.job_tree({root})",
    ],
    ids=["cancel", "delete", "job_tree"],
)
def test_a_tree_costs_the_same_whether_it_is_wide_or_deep(db: Conn, query: str) -> None:
    explained = Explained(db)
    wide = _rows_for(explained, db, 10, 100, query)
    deep = _rows_for(explained, db, 100, 10, query)
    assert deep < 3 * wide, (deep, wide)
