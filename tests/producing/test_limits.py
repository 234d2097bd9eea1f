"""The limits of add_job's arguments: named in the error, exact at the boundary; a refused call leaves nothing."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.calling import Conn, Row, add, call, contents, refused, value

TOO_FAR = [
    ("identifier", "", "1 to 128 characters long, got 0"),
    ("identifier", "x" * 129, "1 to 128 characters long, got 129"),
    ("queue_name", "", "1 to 128 characters long, got 0"),
    ("queue_name", "x" * 129, "1 to 128 characters long, got 129"),
    ("job_key", "", "1 to 512 characters long, got 0"),
    ("job_key", "x" * 513, "1 to 512 characters long, got 513"),
    ("max_attempts", 0, "from 1 to 32767, got 0"),
    ("max_attempts", -1, "from 1 to 32767, got -1"),
    ("max_attempts", 32768, "from 1 to 32767, got 32768"),
    ("max_attempts", 2**31 - 1, "from 1 to 32767, got 2147483647"),
    ("priority", -32769, "from -32768 to 32767, got -32769"),
    ("priority", 32768, "from -32768 to 32767, got 32768"),
    ("run_at", "infinity", "between the years 1 and 9999, got infinity"),
    ("run_at", "-infinity", "between the years 1 and 9999, got -infinity"),
    ("run_at", "10000-01-01 00:00+00", "between the years 1 and 9999, got 10000-01-01"),
    ("run_at", "0044-03-15 00:00+00 BC", "between the years 1 and 9999, got 0044-03-15"),
    ("flags", [""], "without NULL or empty members"),
    ("flags", ["x", None], "without NULL or empty members"),
    ("job_key_mode", "", "one of replace, preserve_run_at, unsafe_dedupe, debounce, got ''"),
    ("job_key_mode", "Replace", "one of replace, preserve_run_at, unsafe_dedupe, debounce, got 'Replace'"),
    ("limit_key", "", "1 to 512 characters long, got 0"),
    ("limit_key", "x" * 513, "1 to 512 characters long, got 513"),
    ("unique_for", "0", "longer than nothing and at most 10 years, got 00:00:00"),
    ("unique_for", "-1 hour", "longer than nothing and at most 10 years, got -01:00:00"),
    ("unique_for", "11 years", "longer than nothing and at most 10 years, got 11 years"),
    ("unique_for", "1 hour", "needs a job_key, got 01:00:00 without one"),
    ("debounce_max", "0", "longer than nothing and at most 10 years, got 00:00:00"),
    ("debounce_max", "-1 hour", "longer than nothing and at most 10 years, got -01:00:00"),
    ("debounce_max", "11 years", "longer than nothing and at most 10 years, got 11 years"),
    ("debounce_max", "1 hour", "needs job_key_mode debounce, got 01:00:00 with replace"),
    ("job_key_mode", "merge", "one of replace, preserve_run_at, unsafe_dedupe, debounce, got 'merge'"),
]

AT_THE_EDGE = [
    ("identifier", "x"),
    ("identifier", "é" * 128),  # characters, not bytes
    ("queue_name", "x"),
    ("queue_name", "é" * 128),
    ("job_key", "x"),
    ("job_key", "é" * 512),
    ("max_attempts", 1),
    ("max_attempts", 32767),
    ("priority", -32768),
    ("priority", 32767),
    ("flags", ["x"]),
    ("flags", ["é" * 1000]),
    ("limit_key", "x"),
    ("limit_key", "é" * 512),
]

_COLUMNS = {"identifier": "task_identifier", "job_key": "key"}


def _id(value: Any) -> str:
    text = str(value)
    return text if len(text) < 30 else f"{text[0]}*{len(text)}"


def _add_one(conn: Conn, name: str, given: Any) -> Row:
    (job,) = call(conn, "add_job", **({"identifier": "a"} | {name: given}))
    return job


@pytest.mark.parametrize(("name", "given", "says"), TOO_FAR, ids=_id)
def test_add_job_refuses_what_is_out_of_its_limits(tx: Conn, name: str, given: Any, says: str) -> None:
    with refused(tx, "22023", name, says):
        _add_one(tx, name, given)


@pytest.mark.parametrize("payload", ["'{}'::json", "'{}'::text", "'{}'::jsonb"])
def test_no_overload_lets_a_limit_be_passed(tx: Conn, payload: str) -> None:
    with refused(tx, "22023", "queue_name must be 1 to 128 characters long, got 129"):
        value(tx, f"select pgworker.add_job('a', {payload}, queue_name := repeat('q', 129))")


@pytest.mark.parametrize(("name", "given", "says"), TOO_FAR, ids=_id)
def test_add_jobs_refuses_the_same_and_says_in_which_spec(tx: Conn, name: str, given: Any, says: str) -> None:
    specs = [{"identifier": "fine", "job_key": "k"}, {"identifier": "a"} | {name: given}, {"identifier": "fine"}]
    with refused(tx, "22023", f"specs[1].{name} ", says):
        call(tx, "add_jobs", Jsonb(specs))


@pytest.mark.parametrize(("name", "given"), AT_THE_EDGE, ids=_id)
def test_add_job_takes_what_is_just_within(tx: Conn, name: str, given: Any) -> None:
    assert _add_one(tx, name, given)[_COLUMNS.get(name, name)] == given


@pytest.mark.parametrize(("name", "given"), AT_THE_EDGE, ids=_id)
def test_add_jobs_takes_what_is_just_within(tx: Conn, name: str, given: Any) -> None:
    (job,) = call(tx, "add_jobs", Jsonb([{"identifier": "a"} | {name: given}]))
    assert job[_COLUMNS.get(name, name)] == given


@pytest.mark.parametrize("run_at", ["0001-01-03 00:00:00+00", "9999-12-29 23:59:59+00"])
def test_the_first_and_the_last_times_that_every_client_can_read_are_taken(tx: Conn, run_at: str) -> None:
    assert str(add(tx, run_at=run_at)["run_at"]).startswith(run_at[:10])
    (job,) = call(tx, "add_jobs", Jsonb([{"identifier": "a", "run_at": run_at}]))
    assert str(job["run_at"]).startswith(run_at[:10])


def test_a_null_identifier_is_told_from_a_bad_one(tx: Conn) -> None:
    with refused(tx, "22004", "identifier must not be null"):
        _add_one(tx, "identifier", None)
    with refused(tx, "22004", "identifier must not be null"):
        value(tx, "select pgworker.add_job(null, '{}'::json)")


@pytest.mark.parametrize("spec", [{}, {"identifier": None}, {"payload": {}}])
def test_a_spec_without_identifier_is_refused(tx: Conn, spec: dict[str, Any]) -> None:
    with refused(tx, "22004", "specs[0].identifier must not be null"):
        call(tx, "add_jobs", Jsonb([spec]))


@pytest.mark.parametrize("mode", ["replace", "preserve_run_at", "unsafe_dedupe", "debounce", None])
def test_every_mode_is_taken_without_a_key_too(tx: Conn, mode: str | None) -> None:
    assert _add_one(tx, "job_key_mode", mode)["revision"] == 0
    assert call(tx, "add_jobs", Jsonb([{"identifier": "a", "job_key_mode": mode}]))[0]["revision"] == 0


def test_a_null_mode_replaces(tx: Conn) -> None:
    first = add(tx, job_key="k", priority=5)
    second = add(tx, job_key="k", job_key_mode=None)
    assert (second["id"], second["priority"], second["revision"]) == (first["id"], 0, 1)


def test_a_bad_mode_is_refused_before_the_key_is_looked_at(tx: Conn) -> None:
    add(tx, job_key="k")
    with refused(tx, "22023", "job_key_mode"):
        add(tx, job_key="k", job_key_mode="merge")


def test_a_refused_call_changes_no_job_with_that_key(tx: Conn) -> None:
    add(tx, job_key="k")
    with refused(tx, "22023", "priority"):
        add(tx, "b", job_key="k", priority=32768)


def test_nested_flags_are_refused_although_each_member_is_fine(tx: Conn) -> None:
    with refused(tx, "22023", "flags must be a plain list"):
        value(tx, "select pgworker.add_job('a', flags := array[array['x'], array['y']])")


def test_flags_that_are_an_empty_list_are_no_flags(tx: Conn) -> None:
    job = add(tx, flags=[])
    assert not job["flags"]
    (other,) = call(tx, "add_jobs", Jsonb([{"identifier": "a", "flags": []}]))
    assert other["flags"] == job["flags"]


def test_numbers_that_no_int_can_hold_are_refused_in_a_spec(tx: Conn) -> None:
    for name in ("priority", "max_attempts"):
        for given in (1e30, -(2**63), 1.5):
            with refused(tx, "22023", f"specs[0].{name} must be "):
                call(tx, "add_jobs", Jsonb([{"identifier": "a", name: given}]))


def test_the_first_of_several_wrong_arguments_does_not_hide_that_it_is_wrong(tx: Conn) -> None:
    with refused(tx, "22023", "identifier"):
        add(tx, "", queue_name="", priority=99999)


def test_a_hint_says_what_to_do_instead(tx: Conn) -> None:
    with refused(tx, "22023", "job_key", hint="hash a longer key"):
        add(tx, job_key="x" * 600)
    with refused(tx, "22023", "priority", hint="Lower numbers run sooner"):
        add(tx, priority=40000)


def test_a_refusal_leaves_the_callers_transaction_to_the_caller(db: Conn) -> None:
    with db.transaction():
        kept = add(db)
        with pytest.raises(psycopg.errors.InvalidParameterValue), db.transaction():
            add(db, "")
    assert value(db, "select array_agg(id) from pgworker.jobs") == [kept["id"]]
    assert contents(db)["queue"] == contents(db)["task"] == []


def test_adding_makes_no_row_for_queue_or_task(tx: Conn) -> None:
    # Producers would hold its lock until they commit.
    add(tx, "some-task", queue_name="some-queue", job_key="k")
    call(tx, "add_jobs", Jsonb([{"identifier": "other", "queue_name": "other"}]))
    assert contents(tx)["queue"] == contents(tx)["task"] == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"unique_for": "1 hour", "job_key_mode": "debounce"}, "unique_for cannot be had with"),
        ({"debounce_max": "1 hour", "job_key_mode": "unsafe_dedupe"}, "debounce_max needs job_key_mode debounce, got"),
        ({"debounce_max": "1 hour", "unique_for": "1 hour"}, "debounce_max needs job_key_mode debounce"),
    ],
)
def test_windows_that_contradict_each_other_are_refused(tx: Conn, given: dict[str, Any], says: str) -> None:
    with refused(tx, "22023", says):
        add(tx, job_key="k", **given)
    with refused(tx, "22023", f"specs[0].{says}"):
        call(tx, "add_jobs", Jsonb([{"identifier": "a", "job_key": "k"} | given]))


@pytest.mark.parametrize("name", ["unique_for", "debounce_max"])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        (3600, "must be a string, got 3600"),
        ("soon", "is not an interval: 'soon'"),
        ("1e300 years", "is not an interval: '1e300 years'"),
    ],
)
def test_an_interval_that_is_none_is_refused_in_a_spec(tx: Conn, name: str, given: Any, says: str) -> None:
    with refused(tx, "22023", f"specs[0].{name} {says}", hint="Write an interval as text"):
        call(tx, "add_jobs", Jsonb([{"identifier": "a", "job_key": "k", name: given}]))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"unique_for": "1 hour", "job_key": "k"}, "unique_for cannot be had in a tree, got '1 hour'"),
        ({"job_key_mode": "debounce", "debounce_max": "1 hour"}, "debounce_max cannot be had in a tree, got '1 hour'"),
        ({"job_key_mode": "debounce"}, "job_key_mode cannot be had in a tree, got 'debounce'"),
    ],
)
def test_no_node_of_a_tree_stands_for_another_job(tx: Conn, given: dict[str, Any], says: str) -> None:
    node = {"identifier": "a", **given}
    with refused(tx, "PW003", f"tree.{says}"):
        call(tx, "add_job_tree", Jsonb(node))
    with refused(tx, "PW003", f"tree.children[1].{says}"):
        call(tx, "add_job_tree", Jsonb({"identifier": "a", "children": [{"identifier": "b"}, node]}))


def test_a_node_has_a_limit_key_and_may_leave_the_windows_null(tx: Conn) -> None:
    node = {"identifier": "a", "limit_key": "ada", "unique_for": None, "debounce_max": None, "job_key_mode": "replace"}
    assert call(tx, "add_job_tree", Jsonb(node))[0]["limit_key"] == "ada"
    with refused(tx, "22023", "tree.limit_key must be 1 to 512 characters long, got 0"):
        call(tx, "add_job_tree", Jsonb(node | {"limit_key": ""}))
