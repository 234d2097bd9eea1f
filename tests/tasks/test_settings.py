"""Settings of tasks: what each does, how it goes back to its default, and what is refused."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg
import pytest

from tests.calling import Conn, add, call, claim, contents, refused, register, row, rows, seen, value
from tests.connections import Connections

ALL: dict[str, Any] = {
    "max_attempts": 3,
    "backoff": '{"kind": "constant", "base": "00:00:05"}',
    "timeout": "1 minute",
    "max_concurrency": 4,
    "max_concurrency_per_key": 2,
    "rate_limit": 10,
    "rate_interval": "1 second",
    "rate_limit_per_key": 5,
    "rate_interval_per_key": "1 minute",
    "fair": True,
    "keep_completed": "1 day",
    "keep_failed": "7 days",
    "paused": True,
}


def configure(conn: Conn, identifier: str | None, **settings: Any) -> dict[str, Any]:
    (seen_now,) = call(conn, "configure_task", identifier, **settings)
    return seen_now


def test_every_setting_is_seen_in_the_view(tx: Conn) -> None:
    returned = configure(tx, "a", **ALL)
    assert returned == row(tx, "select * from pgworker.tasks")
    assert list(returned) == ["identifier", "paused", *[name for name in ALL if name != "paused"]]
    as_text = rows(tx, "select * from jsonb_each_text((select to_jsonb(t) from pgworker.tasks t))")
    assert {entry["key"]: entry["value"] for entry in as_text} == {
        "identifier": "a", "paused": "true", "max_attempts": "3",
        "backoff": '{"base": "00:00:05", "kind": "constant"}', "timeout": "00:01:00", "max_concurrency": "4",
        "max_concurrency_per_key": "2", "rate_limit": "10", "rate_interval": "00:00:01", "rate_limit_per_key": "5",
        "rate_interval_per_key": "00:01:00", "fair": "true", "keep_completed": "1 day", "keep_failed": "7 days",
    }  # fmt: skip


def test_null_leaves_every_setting_as_it_is(tx: Conn) -> None:
    before = configure(tx, "a", **ALL)
    assert configure(tx, "a") == before
    assert configure(tx, "a", **dict.fromkeys(ALL), reset=None) == before


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("rate_")])
def test_reset_brings_one_default_back_and_leaves_the_others(tx: Conn, name: str) -> None:
    before = configure(tx, "a", **ALL)
    default = False if name in ("fair", "paused") else None
    assert configure(tx, "a", reset=[name]) == before | {name: default}


@pytest.mark.parametrize("key", ["", "_per_key"])
def test_resetting_a_rate_resets_its_interval_too(tx: Conn, key: str) -> None:
    before = configure(tx, "a", **ALL)
    after = configure(tx, "a", reset=[f"rate_limit{key}"])
    assert after == before | {f"rate_limit{key}": None, f"rate_interval{key}": None}


def test_all_can_be_reset_at_once_and_then_nothing_is_left_to_clean_up(tx: Conn) -> None:
    configure(tx, "a", **ALL)
    after = configure(tx, "a", reset=["all"])
    assert after == {"identifier": "a", "paused": False, "fair": False} | {
        name: None for name in ALL if name not in ("paused", "fair")
    }
    call(tx, "cleanup", tasks=["gc_task_identifiers"])
    assert rows(tx, "select * from pgworker.tasks") == []


@pytest.mark.parametrize("name", ALL)
def test_cleanup_keeps_every_setting_that_somebody_made(tx: Conn, name: str) -> None:
    settings = {name: ALL[name]}
    for rate in ("rate_limit", "rate_interval"):
        if name.startswith(rate):
            key = "_per_key" if name.endswith("_per_key") else ""
            settings = {f"rate_limit{key}": 10, f"rate_interval{key}": "1 second"}
    before = configure(tx, "a", **settings)
    call(tx, "cleanup")
    assert rows(tx, "select * from pgworker.tasks") == [before]


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"max_attempts": 0}, ["max_attempts", "0"]),
    ({"max_attempts": 32768}, ["max_attempts", "32768"]),
    ({"max_concurrency": 0}, ["max_concurrency", "0"]),
    ({"max_concurrency": 100_001}, ["max_concurrency", "100001"]),
    ({"max_concurrency_per_key": -1}, ["max_concurrency_per_key", "-1"]),
    ({"rate_limit": 0, "rate_interval": "1 s"}, ["rate_limit", "0"]),
    ({"rate_limit": 5}, ["rate_interval", "null"]),
    ({"rate_interval": "5 s"}, ["rate_interval", "00:00:05"]),
    ({"rate_limit": 5, "rate_interval": "0"}, ["rate_interval", "00:00:00"]),
    ({"rate_limit": 5, "rate_interval": "-1 s"}, ["rate_interval", "-00:00:01"]),
    ({"rate_limit_per_key": 5}, ["rate_interval_per_key"]),
    ({"rate_limit_per_key": 1001, "rate_interval_per_key": "1 s"}, ["rate_limit_per_key", "1001"]),
    ({"timeout": "0"}, ["timeout", "00:00:00"]),
    ({"keep_completed": "-1 day"}, ["keep_completed", "-1 days"]),
    ({"keep_failed": "2000 years"}, ["keep_failed", "2000 years"]),
    ({"reset": ["retention"]}, ["reset", "retention"]),
    ({"reset": [None]}, ["reset", "null"]),
    ({"reset": ["timeout"], "timeout": "1 s"}, ["reset", "timeout"]),
]


@pytest.mark.parametrize(("settings", "says"), REFUSED)
def test_a_bad_setting_is_named_and_leaves_nothing_behind(tx: Conn, settings: dict[str, Any], says: list[str]) -> None:
    with refused(tx, "22023", *says):
        configure(tx, "a", **settings)


@pytest.mark.parametrize(("identifier", "code"), [(None, "22004"), ("", "22023"), ("x" * 129, "22023")])
def test_an_identifier_that_no_job_could_have_is_refused(tx: Conn, identifier: str | None, code: str) -> None:
    with refused(tx, code, "identifier"):
        configure(tx, identifier, max_attempts=1)


def test_max_attempts_of_the_task_is_the_default_however_a_job_is_added(tx: Conn) -> None:
    configure(tx, "a", max_attempts=3)
    assert add(tx, "a")["max_attempts"] == 3
    assert add(tx, "a", max_attempts=7)["max_attempts"] == 7
    assert add(tx, "b")["max_attempts"] == 25
    bulk = """[{"identifier": "a", "job_key": "k"}, {"identifier": "b"}, {"identifier": "a", "max_attempts": 9},
               {"identifier": "b", "job_key": "k"}, {"identifier": "a", "job_key": "k"}]"""
    assert [job["max_attempts"] for job in call(tx, "add_jobs", bulk)] == [3, 25, 9, 25, 3]
    assert add(tx, "b", job_key="k")["max_attempts"] == 25
    assert add(tx, "a", job_key="k")["max_attempts"] == 3
    (root,) = call(tx, "add_job_tree", '{"identifier": "b", "children": [{"identifier": "a"}]}')
    assert root["max_attempts"] == 25
    assert value(tx, "select max_attempts from pgworker.jobs where parent_id = %s", root["id"]) == 3


def test_the_timeout_comes_with_the_claim_and_only_to_the_task_that_has_one(tx: Conn) -> None:
    configure(tx, "a", timeout="90 seconds")
    add(tx, "a"), add(tx, "b")
    assert [(job["task_identifier"], job["timeout"]) for job in claim(tx, register(tx), 10)] == [
        ("a", timedelta(seconds=90)),
        ("b", None),
    ]


def test_pausing_is_a_setting_too(tx: Conn) -> None:
    worker = register(tx)
    job = add(tx, "a")["id"]
    call(tx, "pause_task", "a")
    assert row(tx, "select paused from pgworker.tasks") == {"paused": True}
    assert claim(tx, worker) == []
    configure(tx, "a", paused=False)
    assert [claimed["id"] for claimed in claim(tx, worker)] == [job]
    call(tx, "finish_jobs", worker, [job], None, None, None)
    configure(tx, "a", paused=True)
    job = add(tx, "a")["id"]
    assert claim(tx, worker) == []
    call(tx, "resume_task", "a")
    assert [claimed["id"] for claimed in claim(tx, worker)] == [job]


def test_only_the_owner_configures_and_an_observer_looks(db: Conn, connect: Connections, role: Any) -> None:
    configure(db, "a", max_attempts=3)
    for name, grant in (("watcher", "grant_observer"), ("hand", "grant_worker")):
        role(name)
        call(db, grant, name)
        session = connect(user=name)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            configure(session, "a", max_attempts=4)
    assert value(connect(user="watcher"), "select max_attempts from pgworker.tasks") == 3


def test_a_refused_change_leaves_the_settings_that_were(tx: Conn) -> None:
    before = configure(tx, "a", **ALL)
    stored = contents(tx)
    with pytest.raises(psycopg.Error), tx.transaction():
        configure(tx, "a", reset=["rate_interval"])
    assert contents(tx) == stored
    assert row(tx, "select * from pgworker.tasks") == before
    assert seen(tx, add(tx, "a")["id"])["max_attempts"] == 3
