"""``pgworker tree``: a tree of jobs drawn in the terminal, once or until it is finished."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import Any, TextIO

import psycopg
from psycopg.rows import args_row

from pgworker_client.errors import PgworkerError
from pgworker_client.tree_picture import FINISHED, Shown, Tree

# Only what is shown, and of errors their first line: payloads and results of a wide tree may be gigabytes.
_TREE = """
    select t.depth, t.id, t.name, t.task_identifier, t.state, t.attempts, t.max_attempts,
           case when t.state = 'scheduled' then extract(epoch from pgworker.clock() - t.run_at)
                else extract(epoch from coalesce(t.finished_at, pgworker.clock()) - t.started_at) end::float8,
           extract(epoch from t.finished_at - t.created_at)::float8,
           split_part(ltrim(left(t.last_error, 1000), E' \\n'), E'\\n', 1)
    from pgworker.job_tree(%s::bigint) t
"""

#: Seconds between two looks, and how much longer than a look that is: looking must not cost what is looked at.
_LOOK_EVERY = 0.3
_REST = 5

_COLOURS = {
    "completed": "32",
    "failed": "1;31",
    "running": "36",
    "scheduled": "33",
    "cancelled": "35",
    "waiting": "2",
    "ready": "0",
}


def show_tree(conn: psycopg.Connection[Any], job_id: int, *, follow: bool, everything: bool) -> int:
    """Draw the tree of that job, with ``follow`` again and again until its root has ended.

    Returns the exit status: 0, or with ``follow`` 1 for a root that failed or was cancelled. PgworkerError for a job
    that the database does not know.
    """
    conn.autocommit = True  # a look must not hold a snapshot until the next one
    screen = _Screen(sys.stdout)
    while True:
        begun = time.monotonic()
        tree = _read(conn, job_id)
        if not follow or tree.root.state in FINISHED:
            screen.end(tree, everything=everything)
            return int(follow and tree.root.state != "completed")
        screen.show(tree)
        time.sleep(max(_LOOK_EVERY, _REST * (time.monotonic() - begun)))


def _read(conn: psycopg.Connection[Any], job_id: int) -> Tree:
    with conn.cursor(row_factory=args_row(Shown)) as cur:
        jobs = cur.execute(_TREE, (job_id,)).fetchall()
    if not jobs:
        raise PgworkerError(
            f"no job {job_id} in database {conn.info.dbname}: there never was one, or it has ended and is not kept"
        )
    return Tree(jobs, job_id)


class _Screen:
    """Where the tree is drawn: over itself on a terminal; elsewhere a line for each change, and the tree at the end."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty() and os.environ.get("TERM") != "dumb"
        self._colours = self._terminal and not os.environ.get("NO_COLOR")
        self._height = 0
        self._said = ""

    def show(self, tree: Tree) -> None:
        """Draw the tree as it is now; it will be drawn over."""
        if self._terminal:
            columns, rows = shutil.get_terminal_size()
            # One row stays free for the cursor: a picture that scrolls cannot be drawn over.
            self._draw(tree.lines(self._paint, width=columns, height=max(4, rows - 1)))
        elif tree.summary() != self._said:
            self._said = tree.summary()
            self._draw([self._said])

    def end(self, tree: Tree, *, everything: bool) -> None:
        """Draw the tree for the last time, in full height."""
        width = shutil.get_terminal_size().columns if self._terminal else None
        self._draw(tree.lines(self._paint, width=width, fold=not everything))

    def _draw(self, lines: list[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        if self._height:
            text = f"\x1b[{self._height}F\x1b[J{text}"
        self._out.write(text)
        self._out.flush()
        self._height = len(lines) if self._terminal else 0

    def _paint(self, text: str, state: str) -> str:
        return f"\x1b[{_COLOURS[state]}m{text}\x1b[0m" if self._colours else text
