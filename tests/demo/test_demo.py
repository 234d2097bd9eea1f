"""``pgworker demo`` as anybody would run it: it shows what it says, works twice, and cleans up after itself."""

from __future__ import annotations

import email
import email.policy
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from pgworker_client.demo import main
from tests.demo.demo_process import DemoProcess, nobody_works_in, running
from tests.waiting import until, until_row

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
    pytest.mark.timeout(240),
]

_SHOP_OF_20 = {
    "prepare_receipt": [20, 0, 20, 0],
    "charge_card": [1, 0, 3, 2],
    "render": [20, 0, 20, 0],
    "send": [19, 1, 20, 0],
}


def test_it_works_twice_and_leaves_only_its_files(tmp_path: Path) -> None:
    for run in (1, 2):  # enough orders for connections and prepared statements to be used again and again
        with running(tmp_path, "--orders", "120") as demo:
            status, err = demo.end()
        assert (status, err) == (0, ""), demo.said
        assert demo.table() == {
            "prepare_receipt": [120, 0, 120, 0],
            "charge_card": [1, 0, 3, 2],
            "render": [120, 0, 120, 0],
            "send": [119, 1, 120, 0],
        }
        assert "361 jobs in " in demo.said
        assert "'kim.noat at example.com' is not an e-mail address" in demo.said
        assert len(demo.files) == run
        assert not demo.server_directory.exists()
        nobody_works_in(demo.server_directory, *demo.files)


def test_the_receipts_and_mails_are_real(tmp_path: Path) -> None:
    with running(tmp_path, "--orders", "3", "--directory", str(tmp_path / "files")) as demo:
        status, err = demo.end()
    assert (status, err) == (0, ""), demo.said
    receipts = sorted((tmp_path / "files/receipts").iterdir())
    assert [receipt.name for receipt in receipts] == ["000001.html", "000002.html", "000003.html"]
    assert "Receipt for order 1" in receipts[0].read_text()
    mails = sorted((tmp_path / "files/mails").iterdir())
    assert len(mails) == 2
    mail = email.message_from_bytes(mails[0].read_bytes(), policy=email.policy.default)
    assert mail["Subject"] == "Receipt for order 1"
    assert [part.get_filename() for part in mail.iter_attachments()] == ["000001.html"]


def test_ctrl_c_leaves_nothing_while_the_server_starts(tmp_path: Path) -> None:
    with running(tmp_path, "--orders", "20") as demo:
        until(lambda: demo.files, "the demo's first directory")
        demo.press_ctrl_c()
        status, err = demo.end()
    assert (status, err) == (130, ""), demo.said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["started in", "A worker waits", "[#"])
def test_ctrl_c_leaves_nothing_at_any_later_moment(tmp_path: Path, moment: str) -> None:
    with running(tmp_path, "--orders", "2000") as demo:
        demo.read_until(moment)
        files = demo.files
        demo.press_ctrl_c()
        status, err = demo.end()
    assert (status, err) == (130, ""), demo.said
    assert "Stopped by SIGINT" in demo.said
    assert list(tmp_path.iterdir()) == []
    assert not demo.server_directory.exists()
    nobody_works_in(demo.server_directory, *files)


def test_a_killed_demo_takes_its_worker_and_its_server_along(tmp_path: Path) -> None:
    with running(tmp_path, "--orders", "2000") as demo:
        demo.read_until("[#")
        demo.process.kill()
        demo.end()
    nobody_works_in(demo.server_directory, *demo.files)


def test_sigterm_is_as_good_as_ctrl_c(tmp_path: Path) -> None:
    with running(tmp_path, "--orders", "20") as demo:
        demo.read_until("A worker waits")
        demo.process.send_signal(signal.SIGTERM)
        status, err = demo.end()
    assert (status, err) == (143, ""), demo.said
    assert not demo.server_directory.exists()


def test_on_a_terminal_the_bar_is_one_line(tmp_path: Path) -> None:
    ours, its = os.openpty()
    demo = DemoProcess(tmp_path, "--orders", "20", stdout=its)
    os.close(its)
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # how a terminal says that the other side is gone
        pass
    finally:
        os.close(ours)
    status, err = demo.end()
    assert (status, err) == (0, "")
    bar = [line for line in said.decode().splitlines() if "of 61 jobs" in line]
    assert len(bar[-1:]) == 1
    assert said.count(b"\r  [") >= 1
    assert said.count(b"of 61 jobs") == said.count(b"\r  [")


def test_a_named_database_keeps_the_shop_and_can_be_used_again(
    tmp_path: Path, make_database: Callable[..., str]
) -> None:
    dsn = make_database("demo_shop")
    for run in (1, 2):
        with running(tmp_path, "--orders", "20", "--dsn", dsn) as demo:
            status, err = demo.end()
        assert (status, err) == (0, ""), demo.said
        assert demo.table() == _SHOP_OF_20, f"run {run}"
    with psycopg.connect(dsn, autocommit=True) as conn:
        until_row(conn, "select 1 from pgworker_demo.orders having count(*) = 20")
        # What it proposes to try next.
        conn.execute("update pgworker_demo.customers set email = 'kim.noat@example.com' where id = 100")
        failed = conn.execute("select max(id) from pgworker.jobs where state = 'failed'").fetchone()
        conn.execute("select from pgworker.retry_jobs(array[%s]::bigint[])", failed)
        assert conn.execute("select count(*) from pgworker.jobs where state = 'ready'").fetchone() == (1,)


def test_ctrl_c_leaves_a_named_database_without_live_jobs(tmp_path: Path, make_database: Callable[..., str]) -> None:
    dsn = make_database("demo_broken_off")
    with running(tmp_path, "--orders", "2000", "--dsn", dsn) as demo:
        demo.read_until("[#")
        demo.press_ctrl_c()
        status, err = demo.end()
    assert (status, err) == (130, ""), demo.said
    with psycopg.connect(dsn) as conn:
        assert conn.execute("select count(*) from pgworker.jobs where finished_at is null").fetchone() == (0,)
        assert conn.execute("select to_regnamespace('pgworker_demo')").fetchone() == (None,)
    assert list(tmp_path.iterdir()) == []


def test_a_database_with_jobs_of_such_tasks_is_refused(tmp_path: Path, dsn: str, db: psycopg.Connection[None]) -> None:
    db.execute("select from pgworker.add_job('send')")
    status, err = _refused(tmp_path, "--dsn", dsn)
    assert status == 1
    assert "1 jobs of its own" in err
    assert db.execute("select state from pgworker.jobs").fetchall() == [("ready",)]


def test_a_schema_of_somebody_else_is_never_dropped(tmp_path: Path, dsn: str, db: psycopg.Connection[None]) -> None:
    db.execute("create schema pgworker_demo")
    status, err = _refused(tmp_path, "--dsn", dsn)
    assert status == 1
    assert "that is not the demo's" in err


def test_a_directory_of_somebody_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    status, err = _refused(tmp_path, "--directory", str(tmp_path))
    assert status == 1
    assert "is not empty and no demo's directory" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_database_that_cannot_be_reached_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    status, err = _refused(tmp_path, "--dsn", "host=/nowhere dbname=shop")
    assert status == 1
    assert "/nowhere" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--orders", "0"], ["--orders", "many"], ["-j", "0"], ["--colour"]])
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: pgworker demo")


def _refused(temporary: Path, *arguments: str) -> tuple[int, str]:
    with running(temporary, *arguments) as demo:
        try:
            return demo.end()
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end: {demo.said}")
