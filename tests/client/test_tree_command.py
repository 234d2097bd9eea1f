"""``pgworker tree``: what it draws, and how it follows a tree to its end."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgworker_client import (
    Context,
    Fail,
    Node,
    Worker,
    add_job,
    add_job_tree,
    cancel_jobs,
    children,
    complete_jobs,
    permanently_fail_jobs,
)
from pgworker_client.tree_picture import clip, duration
from tests.client.command import ROOT, Spawn, ended
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]

pytestmark = pytest.mark.usefixtures("consistent_afterwards")


def drawn(out: str) -> list[str]:
    """The lines, without what differs from run to run."""
    return [re.sub(r"  (after |in )?[\d.]+ s", r"  \1T", line) for line in out.splitlines()]


@pytest.fixture
def report(dsn: str, db: Db) -> int:
    """A tree whose leaves have run; returns the root's id, 1."""

    async def load(payload: Any, ctx: Context) -> None:
        if payload == "refunds" and ctx.job.attempts == 2:
            raise Fail("no such table\nand more about that")
        if payload != "orders":
            raise ValueError("not yet")

    loads = [
        Node("load", "orders", name="orders"),
        Node("load", "refunds", name="refunds", on_failure="ignore"),
        Node("load", "rates"),
    ]
    pages = [Node("page", n) for n in range(2)]
    root = add_job_tree(db, Node("report", children=[*loads, Node("render", after=["orders"], children=pages)]))
    worker = Worker(dsn, tasks={"load": load})
    worker.run_once()
    db.execute("select pgworker.reschedule_jobs(array[3::bigint], now())")
    # On a slow machine its retry would be due before it is looked at.
    db.execute("select pgworker.reschedule_jobs(array[4::bigint], now() + interval '50 seconds')")
    worker.run_once()
    return root.id


def test_the_tree_is_drawn_with_states_attempts_times_and_errors(spawn: Spawn, report: int) -> None:
    status, out, err = ended(spawn("tree", str(report)))
    assert (status, err) == (0, "")
    assert drawn(out) == [
        "waiting    report #1",
        "completed  ├─ orders (load) #2  T",
        "failed     ├─ refunds (load) #3  attempt 2 of 25  T  no such table",
        "scheduled  ├─ load #4  attempt 1 of 25  in T  ValueError: not yet",
        "waiting    └─ render #5",
        "ready         ├─ page #6",
        "ready         └─ page #7",
        "7 jobs: 1 completed, 2 waiting, 2 ready, 1 scheduled, 1 failed",
    ]


def test_any_job_of_the_tree_can_be_named_and_is_marked(spawn: Spawn, report: int) -> None:
    status, out, _ = ended(spawn("tree", str(report + 5)))
    assert status == 0
    assert [line for line in drawn(out) if "←" in line] == ["ready         ├─ page #6 ←"]


def test_a_job_that_is_in_no_tree_is_a_tree_of_one(spawn: Spawn, db: Db) -> None:
    job = add_job(db, "lonely", max_attempts=1)
    assert ended(spawn("tree", str(job.id))) == (0, f"ready      lonely #{job.id}\n1 job: 1 ready\n", "")


def test_an_unknown_job_is_an_error_in_one_line(spawn: Spawn, db: Db) -> None:
    for arguments in (["42"], ["42", "--follow"]):
        status, out, err = ended(spawn("tree", *arguments))
        assert (status, out) == (1, "")
        assert err.splitlines() == [
            f"pgworker: no job 42 in database {db.info.dbname}: there never was one, or it has ended and is not kept"
        ]


def test_whoever_may_look_can_look_at_trees(spawn: Spawn, dsn: str, db: Db, role: Callable[..., str]) -> None:
    db.execute(f"select pgworker.grant_observer('{role('eye')}')")
    root = add_job_tree(db, Node("top", children=[Node("t")]))
    status, out, _ = ended(spawn("tree", str(root.id), "--dsn", make_conninfo(dsn, user="eye")))
    assert (status, len(out.splitlines())) == (0, 3)


def test_a_running_job_shows_how_long(spawn: Spawn, db: Db) -> None:
    add_job_tree(db, Node("top", children=[Node("t")]))
    db.execute("select pgworker.get_jobs(pgworker.register_worker())")
    assert re.match(r"running    └─ t #2  \d+\.\d s$", ended(spawn("tree", "1"))[1].splitlines()[1])


def test_what_an_error_holds_does_not_reach_the_terminal(spawn: Spawn, db: Db) -> None:
    job = add_job(db, "t")
    permanently_fail_jobs(db, [job.id], "\x1b]0;owned\x07 \x9b31m red\r over")
    status, out, _ = ended(spawn("tree", str(job.id)))
    assert (status, "\x1b" in out, "\x07" in out, "\r" in out, "\x9b" in out) == (0, False, False, False, False)
    assert "owned" in out


def test_of_many_siblings_the_interesting_ones_are_shown(spawn: Spawn, db: Db) -> None:
    root = add_job_tree(db, Node("top", children=[Node("t", children=[Node("u")], on_failure="ignore")] * 2000))
    tops = children(db, root.id)
    leaf = children(db, tops[1500].id)[0]
    complete_jobs(db, [children(db, tops[n].id)[0].id for n in range(3)])
    permanently_fail_jobs(db, [leaf.id], "torn")
    lines = ended(spawn("tree", str(tops[1800].id)))[1].splitlines()
    assert len(lines) < 40
    assert f"failed     ├─ t #{tops[1500].id}" in [line.split("  after")[0] for line in lines]
    assert f"ready      ├─ t #{tops[1800].id} ←" not in lines  # it waits for its own child
    assert f"waiting    ├─ t #{tops[1800].id} ←" in lines
    assert lines[-2].strip().startswith("└─ … 1,988 more: ")
    assert lines[-2].endswith(", with 1,988 jobs below them")
    assert lines[-1].startswith("4,001 jobs: 3 completed, ")
    assert len(ended(spawn("tree", "1", "--all"))[1].splitlines()) == 4002


def test_a_reader_that_has_seen_enough_is_no_error(dsn: str, db: Db) -> None:
    root = add_job_tree(db, Node("top", children=[Node("t")] * 3000))
    command = f"{sys.executable} -m pgworker_client tree {root.id} --all | head -n 1"
    environment = {**os.environ, "DATABASE_URL": dsn}
    done = subprocess.run(["sh", "-c", command], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"waiting    top #{root.id}\n", "")


@pytest.mark.parametrize(
    ("end", "expected", "state"),
    [(complete_jobs, 0, "completed"), (permanently_fail_jobs, 1, "failed"), (cancel_jobs, 1, "cancelled")],
)
def test_follow_ends_with_the_root_and_its_status_says_how(
    spawn: Spawn, db: Db, end: Callable[..., Any], expected: int, state: str
) -> None:
    root = add_job_tree(db, Node("top", children=[Node("t", on_failure="ignore")]))
    process = spawn("tree", str(root.id), "--follow")
    assert process.stdout is not None
    assert process.stdout.readline() == "2 jobs: 1 waiting, 1 ready\n"
    complete_jobs(db, [children(db, root.id)[0].id])
    assert process.stdout.readline() == "2 jobs: 1 completed, 1 ready\n"
    end(db, [root.id])
    status, out, err = ended(process)
    assert (status, err) == (expected, "")
    assert drawn(out)[0].startswith(f"{state:<9}  top #1  after T")
    assert drawn(out)[1:2] == ["completed  └─ t #2  after T"]


def test_ctrl_c_ends_following_without_a_word(spawn: Spawn, db: Db) -> None:
    process = spawn("tree", str(add_job(db, "t").id), "--follow")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "")


def test_following_holds_no_snapshot_between_two_looks(spawn: Spawn, db: Db) -> None:
    process = spawn("tree", str(add_job(db, "t").id), "--follow")
    assert process.stdout is not None
    process.stdout.readline()
    looks = "select state from pg_stat_activity where query like '%%pgworker.job_tree%%' and pid <> pg_backend_pid()"
    until(lambda: db.execute(looks).fetchall() == [("idle",)], "it rests, in no transaction")
    process.kill()


class Terminal:
    """A terminal in which the command runs; everything that it writes is kept."""

    def __init__(self, dsn: str, *arguments: str, rows: int, **environment: str) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 60, 0, 0))
        variables = {**os.environ, "TERM": "xterm", "NO_COLOR": "", "DATABASE_URL": dsn, **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pgworker_client", "tree", *arguments],
            cwd=ROOT,
            env={name: value for name, value in variables.items() if name not in ("COLUMNS", "LINES")},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.written = ""

    def read_until(self, text: str) -> None:
        """Read what it writes until that has appeared, from now on."""
        start = len(self.written)
        while text not in self.written[start:]:
            self._read()

    def end(self) -> tuple[int, str]:
        """Its exit status, and all that it wrote."""
        try:
            while True:
                self._read()
        except OSError:  # how Linux says that nobody has the terminal open any more
            return self.process.wait(20), self.written

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self) -> None:
        data = os.read(self._master, 65536)
        if not data:
            raise OSError("closed")
        self.written += data.decode().replace("\r\n", "\n")


@pytest.fixture
def terminal(dsn: str) -> Iterator[Callable[..., Terminal]]:
    """Run ``pgworker tree ARGUMENT…`` in a terminal 60 columns wide."""
    opened: list[Terminal] = []

    def start(*arguments: str, rows: int = 24, **environment: str) -> Terminal:
        opened.append(Terminal(dsn, *arguments, rows=rows, **environment))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_states_are_coloured_on_a_terminal_only(terminal: Callable[..., Terminal], db: Db) -> None:
    job = str(add_job(db, "t").id)
    permanently_fail_jobs(db, [int(job)], "x" * 100)
    status, out = terminal(job).end()
    assert status == 0
    assert out.startswith("\x1b[1;31mfailed     \x1b[0mt #1  after ")
    first = re.sub(r"\x1b\[[\d;]*m", "", out.splitlines()[0])
    assert (len(first), first[-2:]) == (60, "x…")  # no line is broken in two
    for setting in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in terminal(job, **setting).end()[1]


def test_follow_draws_over_what_it_drew_and_stays_within_the_window(terminal: Callable[..., Terminal], db: Db) -> None:
    root = add_job_tree(db, Node("top", children=[Node("t")] * 50))
    watched = terminal(str(root.id), "--follow", rows=10, NO_COLOR="1")
    watched.read_until("51 jobs: 1 waiting, 50 ready")
    height = len(watched.written.splitlines())
    assert height < 10
    assert "\x1b" not in watched.written
    watched.read_until(f"\x1b[{height}F\x1b[J")
    complete_jobs(db, [child.id for child in children(db, root.id)])
    until_row(db, "select 1 from pgworker.jobs where id = %s and state = 'ready'", root.id)
    complete_jobs(db, [root.id])
    status, out = watched.end()
    assert status == 0
    last = out.rpartition("\x1b[J")[2].splitlines()
    assert (drawn(last[0]), last[-1]) == (["completed  top #1  after T"], "51 jobs: 51 completed")
    assert len(last) == 15  # the end is for reading: it may be higher than the window


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("plain", 5, "plain"),
        ("plain", 4, "pla…"),
        ("接続拒否", 8, "接続拒否"),
        ("接続拒否", 7, "接続拒…"),
        ("接続", 2, "…"),
    ],
)
def test_a_line_is_cut_where_the_terminal_ends(text: str, width: int, shown: str) -> None:
    assert clip(text, width) == shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (100 * 3600, "4 days")],
)
def test_times_are_written_as_one_reads_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
