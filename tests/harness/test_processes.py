"""Tests that are spread over processes: what is counted, and what is left when they are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pgworker_client.embedded import EmbeddedServer
from pgworker_client.throwaway import ThrowawayDirectory
from tests import waiting

ROOT = Path(__file__).resolve().parents[2]

_TESTS = """
import os, time
from pathlib import Path
import pytest

@pytest.mark.parametrize("call", ["add_job('a')", "register_worker()"])
def test_it(server, tx, call, request):
    tx.execute("select pgworker." + call)
    pid = (server.directory / "data/postmaster.pid").read_text().split()[0]
    written = Path(os.environ["NOTES"], f"{os.getpid()}.new")
    written.write_text(f"{server.directory} {pid}")
    written.rename(written.with_suffix(".server"))
    if os.environ["THEN"] == "wait":
        time.sleep(600)
"""


def _run(notes: Path, server: EmbeddedServer, processes: int, then: str) -> subprocess.Popen[str]:
    """Start a run of two tests, in a session of its own, as from a terminal's shell."""
    path = notes / "test_it.py"
    path.write_text(_TESTS)
    own = ["-c", "pyproject.toml", "--rootdir", os.fspath(ROOT), "-p", "tests.conftest"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *own, "--pg", str(server.installation.major), f"-n{processes}", path],
        cwd=ROOT,
        env={**kept, "NOTES": os.fspath(notes), "THEN": then},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _servers(notes: Path) -> list[tuple[Path, int]]:
    found = [note.read_text().split() for note in notes.glob("*.server")]
    return [(Path(directory), int(pid)) for directory, pid in found]


def _gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_what_several_processes_ran_is_counted_together_and_once(server: EmbeddedServer, tmp_path: Path) -> None:
    lines = []
    for processes in (0, 2):
        notes = tmp_path / str(processes)
        notes.mkdir()
        with _run(notes, server, processes, "end") as run:
            said = run.communicate()[0]
        assert run.returncode == 0, said
        assert "2 passed in " in said.splitlines()[-1]
        lines.append([line for line in said.splitlines() if line.startswith("PL/pgSQL coverage")])
        assert len(_servers(notes)) == (processes or 1)
        assert all(_gone(pid) and not directory.exists() for directory, pid in _servers(notes))
    assert len(lines[0]) == 1
    assert lines[0] == lines[1]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", ["ctrl_c", signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_server(
    server: EmbeddedServer, tmp_path: Path, how: signal.Signals | str
) -> None:
    with _run(tmp_path, server, 2, "wait") as run:
        waiting.until(lambda: len(_servers(tmp_path)) == 2, "two servers", timeout=90)
        if isinstance(how, str):
            os.killpg(run.pid, signal.SIGINT)  # as the terminal does
        else:
            run.send_signal(how)
        waiting.until(lambda: all(_gone(pid) for _, pid in _servers(tmp_path)), "the servers' end", timeout=90)
        said = run.communicate()[0]
    assert run.returncode != 0, said
    for directory, _ in _servers(tmp_path):
        ThrowawayDirectory([directory.parent]).close()  # clears away what a killed process left
        assert not directory.exists()
