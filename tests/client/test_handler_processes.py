"""Handlers in processes: a crash is its job's alone, nothing else waits for them, and none outlives its worker."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgworker_client import Context, JobEvent, Worker, add_job, add_jobs, cancel_jobs, configure_task
from pgworker_client.process_pool import processors
from tests.calling import retry_in_an_hour
from tests.client import process_handlers as handlers
from tests.client.background import Background
from tests.client.command import ROOT, Spawn, ended
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]
Start = Callable[[Worker], Background]


def worker_with(
    dsn: str, *functions: Callable[[Any, Any], Any], timeout: float | None = None, **options: Any
) -> Worker:
    worker = Worker(dsn, **options)
    for function in functions:
        worker.task(function.__name__, executor="process", timeout=timeout)(function)
    return worker


def outcome(db: Db, job_id: int) -> tuple[str, Any, str | None]:
    row = db.execute("select state, result, last_error from pgworker.jobs where id = %s", [job_id]).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def error_of(db: Db, worker: Worker, payload: Any) -> str:
    """The last_error of the only task, run once with that payload."""
    (task,) = worker.tasks.by_name
    job = add_job(db, task, payload, max_attempts=1)
    worker.run_once()
    state, _, error = outcome(db, job.id)
    assert state == "failed"
    assert error is not None
    return error


def spinning(db: Db, job_id: int) -> int:
    """The process in which the job runs."""
    (pid,) = until_row(db, "select progress from pgworker.jobs where id = %s and progress is not null", job_id)
    return int(pid)


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_runs_in_another_process_which_is_kept_for_the_next_and_ends_with_the_worker(dsn: str, db: Db) -> None:
    jobs = [add_job(db, "pid") for _ in range(3)]
    worker_with(dsn, handlers.pid, concurrency=1).run_once()
    pids = {outcome(db, job.id)[1] for job in jobs}
    assert len(pids) == 1
    assert os.getpid() not in pids
    assert not exists(pids.pop())


def test_the_context_has_the_job_a_logger_progress_and_cancelled(
    dsn: str, db: Db, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pgworker")
    job = add_job(db, "look", {"a": 1})
    worker_with(dsn, handlers.look).run_once()
    assert outcome(db, job.id)[:2] == ("completed", [job.id, {"a": 1}, 1, False, None])
    assert db.execute("select progress from pgworker.jobs where id = %s", [job.id]).fetchone() == ({"seen": {"a": 1}},)
    (record,) = [record for record in caplog.records if record.getMessage() == "looking at {'a': 1}"]
    assert (record.task, record.job_id, record.more) == ("look", job.id, 1)  # type: ignore[attr-defined]


def test_a_thread_that_a_handler_left_behind_does_not_speak_for_the_next_job(dsn: str, db: Db, tmp_path: Path) -> None:
    first, second = add_job(db, "leaves_a_thread", str(tmp_path)), add_job(db, "hears_the_thread", str(tmp_path))
    worker_with(dsn, handlers.leaves_a_thread, handlers.hears_the_thread, concurrency=1).run_once()
    assert outcome(db, second.id)[1] == "ctx.progress() was called after the handler had ended"
    rows = db.execute("select progress from pgworker.jobs where id = any(%s)", [[first.id, second.id]]).fetchall()
    assert rows == [(None,)]


def test_what_is_not_in_the_context_says_so(dsn: str, db: Db) -> None:
    error = error_of(db, worker_with(dsn, handlers.connect), None)
    assert error.startswith("AttributeError: ctx.connection is not there in a handler with executor='process'")
    assert "connect to the database yourself" in error


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT"])
def test_a_handler_that_crashes_its_process_fails_alone_and_the_others_go_on(dsn: str, db: Db, name: str) -> None:
    crash = add_job(db, "die", name, max_attempts=1)
    others = [add_job(db, "pid") for _ in range(5)]
    worker_with(dsn, handlers.die, handlers.pid, concurrency=2).run_once()
    assert outcome(db, crash.id) == ("failed", None, f"the process of the handler was killed by {name}")
    assert {outcome(db, job.id)[0] for job in others} == {"completed"}


def test_a_real_crash_is_retried_like_any_failure(dsn: str, db: Db) -> None:
    job = add_job(db, "null_pointer")
    retry_in_an_hour(db, "null_pointer")
    worker_with(dsn, handlers.null_pointer).run_once()
    assert outcome(db, job.id) == ("scheduled", None, "the process of the handler was killed by SIGSEGV")


@pytest.mark.parametrize("status", [0, 3])
def test_a_handler_that_ends_its_process_fails(dsn: str, db: Db, status: int) -> None:
    error = error_of(db, worker_with(dsn, handlers.exit_at_once), status)
    assert error == f"the process of the handler ended with exit status {status}"


def test_the_end_of_a_process_is_seen_though_what_it_forked_lives_on(dsn: str, db: Db, tmp_path: Path) -> None:
    error = error_of(db, worker_with(dsn, handlers.forks_and_dies), str(tmp_path / "go"))
    (tmp_path / "go").touch()
    assert error == "the process of the handler was killed by SIGKILL"


def test_an_idle_process_that_was_killed_is_replaced(dsn: str, db: Db, start: Start) -> None:
    start(worker := worker_with(dsn, handlers.pid, concurrency=1))
    for _ in range(2):
        job = add_job(db, "pid")
        (pid,) = until_row(db, "select result from pgworker.jobs where id = %s and state = 'completed'", job.id)
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: not exists(pid), "it is dead")  # type: ignore[misc]
    worker.stop()


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        ("lambda", "TypeError: the result of the handler cannot leave its process: "),
        ("generator", "TypeError: the result of the handler cannot leave its process: cannot pickle 'generator'"),
        ("set", "TypeError: the result of the handler cannot be written as JSON: "),
    ],
)
def test_results_that_cannot_be_kept_fail_their_job(dsn: str, db: Db, payload: str, error: str) -> None:
    assert error_of(db, worker_with(dsn, handlers.returns), payload).startswith(error)


def test_a_result_larger_than_any_pipe_comes_through(dsn: str, db: Db) -> None:
    job = add_job(db, "returns", "big")
    worker_with(dsn, handlers.returns).run_once()
    assert outcome(db, job.id)[1] == "x" * 3_000_000


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        ("value", "ValueError: no luck"),
        ("unpicklable", "tests.client.process_handlers.Unpicklable: code 7"),
        ("interrupt", "KeyboardInterrupt"),
        ("stop", "StopIteration"),
    ],
)
def test_what_a_handler_raises_is_kept_with_its_traceback(dsn: str, db: Db, payload: str, error: str) -> None:
    text = error_of(db, worker_with(dsn, handlers.raises), payload)
    assert text.startswith(error + "\n\nTraceback")
    assert "in raises\n" in text
    assert "process_main.py" not in text


def test_sys_exit_is_a_failure_and_no_end_of_the_worker(dsn: str, db: Db) -> None:
    assert error_of(db, worker_with(dsn, handlers.sys_exit), 2).startswith("SystemExit: 2")


def test_retry_fail_and_cancel_mean_the_same_there(dsn: str, db: Db) -> None:
    retry, fail, cancel = (add_job(db, "raises", payload) for payload in ("retry", "fail", "cancel"))
    worker_with(dsn, handlers.raises).run_once()
    assert outcome(db, retry.id) == ("scheduled", None, "later")
    assert outcome(db, fail.id) == ("failed", None, "never")
    assert outcome(db, cancel.id) == ("cancelled", None, "no need")
    row = db.execute("select run_at > now() + interval '30 minutes' from pgworker.jobs where id = %s", [retry.id])
    assert row.fetchone() == (True,)


def test_a_batch_may_fail_in_part(dsn: str, db: Db) -> None:
    job = add_job(db, "batch", [1, 0, 2])
    retry_in_an_hour(db, "batch")
    worker_with(dsn, handlers.batch).run_once()
    row = db.execute("select state, payload, last_error from pgworker.jobs where id = %s", [job.id]).fetchone()
    assert row == ("scheduled", [0], "1 of 3 items failed\n[1] ValueError: odd")


def test_payloads_are_typed_there_too(dsn: str, db: Db) -> None:
    good, bad = add_job(db, "typed_order", {"number": 7}), add_job(db, "typed_order", {"number": "x"})
    worker_with(dsn, handlers.typed_order).run_once()
    assert outcome(db, good.id)[1] == ["Order", 7]
    state, _, error = outcome(db, bad.id)
    assert state == "failed"
    assert error is not None
    assert error.startswith("the payload does not fit Order: ")


def test_middleware_and_hooks_are_around_it(dsn: str, db: Db) -> None:
    worker = worker_with(dsn, handlers.pid, handlers.die, handlers.raises)
    seen: list[Any] = []

    @worker.middleware
    async def around(ctx: Context, call_next: Callable[[], Any]) -> Any:
        try:
            return {"wrapped": await call_next()}
        except Exception as exc:
            seen.append((ctx.job.task_identifier, type(exc).__name__, str(exc)))
            raise

    @worker.on("completed", "failed")
    def told(event: JobEvent) -> None:
        seen.append((event.name, event.job.task_identifier))

    good = add_job(db, "pid")
    add_job(db, "die", "SIGSEGV", max_attempts=1)
    add_job(db, "raises", "value", max_attempts=1)
    worker.run_once()
    assert list(outcome(db, good.id)[1]) == ["wrapped"]
    assert set(seen) == {
        ("completed", "pid"),
        ("failed", "die"),
        ("failed", "raises"),
        ("die", "ProcessDied", "the process of the handler was killed by SIGSEGV"),
        ("raises", "ValueError", "no luck"),
    }


def test_the_loop_goes_on_while_handlers_compute(dsn: str, db: Db, start: Start) -> None:
    worker = worker_with(dsn, handlers.spin, concurrency=2, lease=3)

    @worker.task
    async def quick(_payload: Any, _ctx: Context) -> str:
        await asyncio.sleep(0)
        return "quick"

    job = add_job(db, "spin", "deaf")
    background = start(worker)
    pid = spinning(db, job.id)
    beat = "select lease_until from pgworker.worker"  # renewed from the loop
    first = until_row(db, beat)
    add_jobs(db, [{"identifier": "quick"}] * 20)
    until_row(db, "select 1 where (select count(*) from pgworker.jobs where result = '\"quick\"') = 20")
    until(lambda: db.execute(beat).fetchone() != first, "the lease is renewed")
    assert exists(pid)
    worker.stop()
    worker.stop()
    background.join()


def test_there_are_no_more_processes_than_processors(dsn: str, db: Db, start: Start, tmp_path: Path) -> None:
    most = processors()
    worker = worker_with(dsn, handlers.until_file, concurrency=most + 3)
    jobs = add_jobs(db, [{"identifier": "until_file", "payload": str(tmp_path / "go")}] * (most + 3))
    background = start(worker)
    until_row(db, f"select 1 where (select count(*) from pgworker.jobs where state = 'running') = {most + 3}")
    until(lambda: len(list(tmp_path.iterdir())) == most, "as many run as there are processors")
    (tmp_path / "go").touch()
    until_row(db, f"select 1 where (select count(*) from pgworker.jobs where state = 'completed') = {most + 3}")
    worker.stop()
    background.join()
    assert len({outcome(db, job.id)[1] for job in jobs}) == most


@pytest.mark.parametrize("function", [handlers.spin, handlers.in_c])
def test_a_timeout_ends_the_process(dsn: str, db: Db, function: Callable[..., Any]) -> None:
    job = add_job(db, function.__name__, "deaf", max_attempts=1)
    worker_with(dsn, function, timeout=0.5).run_once()
    assert outcome(db, job.id) == ("failed", None, "timed out after 0.5 s")
    row = db.execute("select progress from pgworker.jobs where id = %s", [job.id]).fetchone()
    assert row is not None
    assert not exists(row[0])


def test_the_timeout_of_the_tasks_settings_ends_the_process_too(dsn: str, db: Db) -> None:
    configure_task(db, "spin", timeout=timedelta(seconds=0.5), max_attempts=1)
    job = add_job(db, "spin", "deaf")
    worker_with(dsn, handlers.spin).run_once()
    assert outcome(db, job.id) == ("failed", None, "timed out after 0.5 s")


def test_a_handler_that_heard_of_its_timeout_keeps_its_process_and_the_next_one_is_not_killed_for_it(
    dsn: str, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgworker_client.process_pool._MOMENT", 2.0)
    worker = worker_with(dsn, handlers.spin, timeout=0.1, concurrency=1)
    worker.task("busy", executor="process")(handlers.busy)
    first, second = add_job(db, "spin", max_attempts=1), add_job(db, "busy", 2.5)  # longer than the other's moment
    worker.run_once()
    assert outcome(db, first.id)[::2] == ("failed", "timed out after 0.1 s")
    progress = db.execute("select progress from pgworker.jobs where id = %s", [first.id]).fetchone()
    assert outcome(db, second.id)[:2] == ("completed", *(progress or ()))


@pytest.mark.parametrize("payload", ["listening", "deaf"])
def test_a_cancelled_job_ends_whether_its_handler_listens_or_not(dsn: str, db: Db, start: Start, payload: str) -> None:
    worker = worker_with(dsn, handlers.spin)
    job = add_job(db, "spin", payload)
    start(worker)
    pid = spinning(db, job.id)
    cancel_jobs(db, [job.id], "enough")
    until_row(db, "select 1 from pgworker.jobs where id = %s and state <> 'running'", job.id)
    if payload == "deaf":
        assert outcome(db, job.id)[::2] == ("cancelled", "enough")
        until(lambda: not exists(pid), "the process is gone")
    else:
        assert outcome(db, job.id)[1] == "told"  # as in a thread: what it returned is worth keeping
        assert exists(pid)
    worker.stop()


@pytest.mark.parametrize("payload", ["listening", "deaf"])
def test_the_second_stop_ends_them_and_gives_the_job_back(dsn: str, db: Db, start: Start, payload: str) -> None:
    worker = worker_with(dsn, handlers.spin)
    job = add_job(db, "spin", payload)
    background = start(worker)
    pid = spinning(db, job.id)
    worker.stop()
    worker.stop()
    background.join()
    assert not exists(pid)
    assert db.execute("select state, attempts from pgworker.jobs").fetchall() == [("ready", 0)]


SHOP = """
from pgworker_client import Worker
from tests.client import process_handlers as handlers
worker = Worker()
for one in (handlers.spin, handlers.in_c, handlers.until_file):
    worker.task(one.__name__, executor="process")(one)
"""


@pytest.mark.parametrize("task", ["spin", "in_c"])
def test_processes_vanish_when_their_worker_is_killed(spawn: Spawn, db: Db, tmp_path: Path, task: str) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    job = add_job(db, task, "deaf")
    worker = spawn("run", "shop")
    pid = spinning(db, job.id)
    assert exists(pid)
    worker.kill()
    until(lambda: not exists(pid), "the process is gone")


def test_a_signal_to_all_processes_lets_running_handlers_end(spawn: Spawn, db: Db, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    job = add_job(db, "until_file", "go")
    worker = spawn("run", "shop")
    (begun,) = until(lambda: list(tmp_path.glob("go-*")), "it runs")
    pid = int(begun.name.partition("-")[2])
    for one in (pid, worker.pid):
        os.kill(one, signal.SIGINT)
    (tmp_path / "go").touch()
    status, _, err = ended(worker)
    assert status == 0, err
    assert outcome(db, job.id)[:2] == ("completed", pid)


DIED_EARLY = "the process of the handler ended with exit status 1 before it began; its standard error may say why"

SCRIPT = """
import os
from pgworker_client import Worker
worker = Worker()

@worker.task(executor="process")
def pid(payload, ctx):
    return os.getpid()

{guard}worker.run_once()
"""


def run_script(dsn: str, *arguments: str, text: str | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        input=text,
        env={**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


def test_handlers_of_the_script_that_runs_the_worker_are_found(dsn: str, db: Db, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(guard="if __name__ == '__main__': "))
    job = add_job(db, "pid")
    assert run_script(dsn, str(tmp_path / "script.py")) == (0, "")
    assert outcome(db, job.id)[0] == "completed"


def test_a_script_that_runs_its_worker_when_it_is_imported_is_told_how_to_write_it(
    dsn: str, db: Db, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(guard=""))
    job = add_job(db, "pid", max_attempts=1)
    _, err = run_script(dsn, str(tmp_path / "script.py"))
    assert "put the call of worker.run() below: if __name__ == '__main__'" in err
    assert outcome(db, job.id)[::2] == ("failed", DIED_EARLY)


def test_handlers_typed_in_are_refused(dsn: str) -> None:
    status, err = run_script(dsn, "-", text=SCRIPT.format(guard=""))
    assert status == 1
    assert "pid was typed in or is in a __main__.py: put it into a module" in err


def test_handlers_that_no_process_could_import_are_refused_where_they_are_registered() -> None:
    def inner(_payload: Any, _ctx: Any) -> None: ...

    async def coroutine(_payload: Any, _ctx: Any) -> None: ...

    register = Worker().task("t", executor="process")
    refused: list[tuple[Any, str]] = [
        (inner, "inner is made while the program runs: define it with def at the top level of a module"),
        (lambda _payload, _ctx: None, "<lambda> is made while the program runs"),
        (functools.partial(inner), "needs a function, defined with def in a module, not functools.partial"),
        (coroutine, "an async handler runs in the worker's event loop; executor='process' is for plain functions"),
    ]
    for function, complaint in refused:
        with pytest.raises(TypeError, match="task 't': ") as caught:
            register(function)
        assert complaint in str(caught.value)
    with pytest.raises(ValueError, match="executor must be 'process' or None, not 'thread'"):
        Worker().task("t", executor="thread")(handlers.pid)  # type: ignore[call-overload]


def test_a_handler_that_was_replaced_after_its_registration_is_refused_at_the_start(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_with(dsn, handlers.pid)
    monkeypatch.setattr(handlers, "pid", handlers.look)
    with pytest.raises(TypeError, match=r"make @worker\.task the outermost"):
        worker.run_once()
