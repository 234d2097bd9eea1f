"""What the end of a job means for others is worked out level by level, once, and not from each level all the way."""

from __future__ import annotations

import pytest

from tests.calling import Conn, value
from tests.plans.explained import buffers
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
