"""Adding trees of jobs and reading them, in the caller's transaction.

``conn``, the first argument, is any psycopg connection or cursor; with an async one the call returns an awaitable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from pgworker_client.enqueue import all_jobs, one_job
from pgworker_client.job import JOB_COLUMNS, JobRow
from pgworker_client.node import NodeLike, nodes_json, tree_json
from pgworker_client.on_connection import Request, on_connection


@dataclasses.dataclass(slots=True)
class TreeRow(JobRow):
    """A job with its place in a tree: the root's depth is 0."""

    depth: int
    path: str


def _tree_rows(rows: list[tuple[Any, ...]]) -> list[TreeRow]:
    return [TreeRow(*row) for row in rows]


def _by_id(rows: list[tuple[Any, ...]]) -> dict[int, Any]:
    """A JSON object whose keys are ids. The ids that Python has of jobs are numbers, so they become such here too."""
    return {int(job_id): value for job_id, value in (rows[0][0] or {}).items()}


def _counts(rows: list[tuple[Any, ...]]) -> dict[str, int]:
    return dict(rows)


@on_connection
def add_job_tree(tree: NodeLike) -> Request[JobRow]:
    """Add a tree of jobs, a `Node` or a dict, in the transaction of ``conn`` and return the root.

    The whole tree is checked before anything is added; what is wrong with it is said with its place, such as
    ``tree.children[1].after`` (SQLSTATE PW003, or 22023 for an argument).
    """
    return Request(f"select {JOB_COLUMNS} from pgworker.add_job_tree(%s::jsonb)", (tree_json(tree, "tree"),), one_job)


@on_connection
def add_children(worker_id: int, job_id: int, children: Iterable[NodeLike]) -> Request[list[JobRow]]:
    """Add children to a running job, as ``ctx.add_children`` does, and return them in the order given."""
    return Request(
        f"select {JOB_COLUMNS} from pgworker.add_children(%s::bigint, %s::bigint, %s::jsonb)",
        (worker_id, job_id, nodes_json(children, "children")),
        all_jobs,
    )


@on_connection
def children(job_id: int) -> Request[list[JobRow]]:
    """The children of a job, as far as the database still knows them."""
    return Request(f"select {JOB_COLUMNS} from pgworker.children(%s::bigint)", (job_id,), all_jobs)


@on_connection
def get_children_values(job_id: int) -> Request[dict[int, Any]]:
    """The results of the children that have completed, by id."""
    return Request("select pgworker.get_children_values(%s::bigint)", (job_id,), _by_id)


@on_connection
def get_failed_children_values(job_id: int) -> Request[dict[int, Any]]:
    """The last progress of the children that have failed, by id."""
    return Request("select pgworker.get_failed_children_values(%s::bigint)", (job_id,), _by_id)


@on_connection
def job_tree(job_id: int) -> Request[list[TreeRow]]:
    """The whole tree that a job belongs to, in display order: each node before those below it."""
    return Request(f"select {JOB_COLUMNS}, depth, path from pgworker.job_tree(%s::bigint)", (job_id,), _tree_rows)


@on_connection
def tree_progress(job_id: int) -> Request[dict[str, int]]:
    """How many jobs of the tree that a job belongs to are in each state."""
    return Request("select state, jobs from pgworker.tree_progress(%s::bigint)", (job_id,), _counts)
