"""add_jobs: many jobs in one call, as many single calls would have added them, or none of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.calling import FUTURE, Conn, Row, add, call, claim_ids, refused, register, row, rows, value


def add_jobs(conn: Conn, *specs: Any) -> list[Row]:
    return call(conn, "add_jobs", Jsonb(list(specs)))


def test_results_come_in_the_order_of_the_specs_whatever_their_attributes(tx: Conn) -> None:
    specs = [
        {"identifier": f"t{n}", "priority": -n, **({"job_key": f"k{99 - n}"} if n % 3 else {}),
         "run_at": f"20{30 - n % 20}-01-01"}
        for n in range(40)
    ]  # fmt: skip
    jobs = add_jobs(tx, *specs)
    assert [job["task_identifier"] for job in jobs] == [spec["identifier"] for spec in specs]
    ids = [job["id"] for job in jobs]
    assert ids == sorted(set(ids))
    assert rows(tx, "select * from pgworker.jobs order by id") == jobs


def test_every_key_of_a_spec_arrives(tx: Conn) -> None:
    (job,) = add_jobs(tx, {
        "identifier": "a", "payload": {"n": [1, None]}, "queue_name": "q", "run_at": "2100-01-01T02:00:00+02:00",
        "max_attempts": 3, "job_key": "k", "priority": -7, "flags": ["x", "y"], "job_key_mode": "preserve_run_at",
    })  # fmt: skip
    single = add(tx, "a", payload='{"n": [1, null]}', queue_name="q", run_at=FUTURE, max_attempts=3, job_key="other",
                 priority=-7, flags=["x", "y"])  # fmt: skip
    assert job | {"id": 0, "key": None} == single | {"id": 0, "key": None}
    assert job["key"] == "k"


@pytest.mark.parametrize("payload", [{"a": 1}, [1, 2], [], "text", 5, True, {}])
def test_a_payload_of_any_json_type_arrives_as_it_is(tx: Conn, payload: Any) -> None:
    assert add_jobs(tx, {"identifier": "a", "payload": payload})[0]["payload"] == payload


def test_json_nulls_mean_the_defaults(tx: Conn) -> None:
    names = ("payload", "queue_name", "run_at", "max_attempts", "job_key", "priority", "flags", "job_key_mode")
    nulls, plain = add_jobs(tx, {"identifier": "a"} | dict.fromkeys(names), {"identifier": "a"})
    assert nulls | {"id": 0} == plain | {"id": 0} == add(tx) | {"id": 0}


def test_no_specs_add_nothing(tx: Conn) -> None:
    assert add_jobs(tx) == []
    assert value(tx, "select count(*) from pgworker.jobs") == 0


def test_a_key_that_occurs_twice_is_folded_as_two_calls_would(tx: Conn) -> None:
    first, other, second, third = add_jobs(
        tx,
        {"identifier": "a", "job_key": "k", "payload": [1], "priority": 5, "run_at": FUTURE},
        {"identifier": "b"},
        {"identifier": "c", "job_key": "k", "payload": [2], "job_key_mode": "preserve_run_at"},
        {"identifier": "d", "job_key": "k", "payload": [3], "job_key_mode": "unsafe_dedupe"},
    )
    assert first["id"] == second["id"] == third["id"] < other["id"]
    # Each row is what its own call would have returned.
    assert [(job["task_identifier"], job["payload"], job["revision"]) for job in (first, second, third)] == [
        ("a", [1], 0), ("c", [1, 2], 1), ("c", [1, 2], 2),
    ]  # fmt: skip
    left = rows(tx, "select * from pgworker.jobs order by id")
    assert left == [third, other]
    assert str(third["run_at"]) == "2100-01-01 00:00:00+00:00"
    assert third["priority"] == 0


def test_a_key_that_is_taken_meets_the_live_job(tx: Conn) -> None:
    old = add(tx, "old", job_key="k", payload='{"old": 1}', priority=9)
    new, fresh = add_jobs(tx, {"identifier": "new", "job_key": "k"}, {"identifier": "fresh", "job_key": "l"})
    assert (new["id"], new["created_at"], new["revision"]) == (old["id"], old["created_at"], 1)
    assert (new["task_identifier"], new["payload"], new["priority"]) == ("new", {}, 0)
    assert fresh["id"] > old["id"]


def test_a_running_job_with_that_key_is_left_to_run(tx: Conn) -> None:
    worker = register(tx)
    old = add(tx, "old", job_key="k")
    assert claim_ids(tx, worker) == [old["id"]]
    new, twice = add_jobs(tx, {"identifier": "new", "job_key": "k"}, {"identifier": "again", "job_key": "k"})
    assert old["id"] < new["id"] == twice["id"]
    assert row(tx, "select key, state, attempts, max_attempts from pgworker.jobs where id = %s", old["id"]) == {
        "key": None, "state": "running", "attempts": 1, "max_attempts": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "says", "hint"),
    [
        ({"jobKey": "k"}, "unknown key 'jobKey'", "Did you mean 'job_key'?"),
        ({"runAt": "2030-01-01"}, "unknown key 'runAt'", "Did you mean 'run_at'?"),
        ({"maxAttempts": 1}, "unknown key 'maxAttempts'", "Did you mean 'max_attempts'?"),
        ({"queueName": "q"}, "unknown key 'queueName'", "Did you mean 'queue_name'?"),
        ({"jobKeyMode": "replace"}, "unknown key 'jobKeyMode'", "Did you mean 'job_key_mode'?"),
        ({"taskIdentifier": "a"}, "unknown key 'taskIdentifier'", "Did you mean 'identifier'?"),
        ({"PRIORITY": 1}, "unknown key 'PRIORITY'", "Did you mean 'priority'?"),
        ({"job-key": "k"}, "unknown key 'job-key'", "Did you mean 'job_key'?"),
        ({"priorty": 1}, "unknown key 'priorty'", "Did you mean 'priority'?"),
        ({"paylaod": 1}, "unknown key 'paylaod'", "Did you mean 'payload'?"),
        ({"paylod": 1}, "unknown key 'paylod'", "Did you mean 'payload'?"),
        ({"flag": ["x"]}, "unknown key 'flag'", "Did you mean 'flags'?"),
        ({"queue": "q"}, "unknown key 'queue'", "Did you mean 'queue_name'?"),
        ({"key": "k"}, "unknown key 'key'", "Did you mean 'job_key'?"),
        ({"colour": "blue"}, "unknown key 'colour'", "Known keys: identifier, payload, queue_name"),
        ({"": 1}, "unknown key ''", "Known keys: "),
        ({"it's": 1}, "unknown key 'it''s'", "Known keys: "),
        ({"children": []}, "unknown key 'children'", "Known keys: "),  # of trees, not of single jobs
    ],
)
def test_a_misspelt_key_is_named_with_the_one_that_was_meant(
    tx: Conn, spec: dict[str, Any], says: str, hint: str
) -> None:
    with refused(tx, "22023", "specs[1] has an ", says, hint=hint):
        add_jobs(tx, {"identifier": "fine"}, {"identifier": "a"} | spec)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"identifier": 5}, "specs[1].identifier must be a string, got 5"),
        ({"queue_name": ["q"]}, 'specs[1].queue_name must be a string, got ["q"]'),
        ({"job_key": 17}, "specs[1].job_key must be a string, got 17"),
        ({"job_key_mode": {}}, "specs[1].job_key_mode must be a string, got {}"),
        ({"max_attempts": "3"}, 'specs[1].max_attempts must be a number, got "3"'),
        ({"priority": True}, "specs[1].priority must be a number, got true"),
        ({"flags": "x"}, 'specs[1].flags must be an array, got "x"'),
        ({"flags": {"x": 1}}, 'specs[1].flags must be an array, got {"x": 1}'),
        ({"flags": [1]}, "specs[1].flags must be a list of strings, got [1]"),
        ({"flags": [["x"]]}, 'specs[1].flags must be a list of strings, got [["x"]]'),
        ({"run_at": 1700000000}, "specs[1].run_at must be a string, got 1700000000"),
        ({"run_at": "tomorrowish"}, "specs[1].run_at is not a time: 'tomorrowish'"),
        ({"run_at": "2030-02-31"}, "specs[1].run_at is not a time: '2030-02-31'"),
        ({"run_at": ""}, "specs[1].run_at is not a time: ''"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_and_shown(tx: Conn, spec: dict[str, Any], says: str) -> None:
    with refused(tx, "22023", says):
        add_jobs(tx, {"identifier": "fine", "job_key": "k"}, {"identifier": "a"} | spec)


@pytest.mark.parametrize("member", [1, "a", None, [], True])
def test_a_spec_that_is_no_object_is_refused(tx: Conn, member: Any) -> None:
    with refused(tx, "22023", "specs[1] must be an object, got "):
        add_jobs(tx, {"identifier": "a"}, member)


@pytest.mark.parametrize("specs", [{}, {"identifier": "a"}, "a", 1, None])
def test_specs_that_are_no_array_are_refused(tx: Conn, specs: Any) -> None:
    with refused(tx, "22023", "specs must be an array of objects, got "):
        call(tx, "add_jobs", Jsonb(specs))


def test_null_specs_are_refused(tx: Conn) -> None:
    with refused(tx, "22004", "specs must not be null"):
        call(tx, "add_jobs", None)


def test_one_bad_spec_at_the_end_undoes_what_was_folded_before_it(tx: Conn) -> None:
    add(tx, "old", job_key="k", payload="[1]")
    with refused(tx, "22023", "specs[2].priority"):
        add_jobs(
            tx,
            {"identifier": "new", "job_key": "k", "payload": [2]},
            {"identifier": "new", "job_key": "k", "payload": [3]},
            {"identifier": "new", "priority": 99999},
        )


def test_a_hundred_thousand_jobs_are_one_call(db: Conn) -> None:
    # Takes about three seconds; were it quadratic, the test would run into its time limit.
    specs = [{"identifier": "bulk", "payload": n} for n in range(100_000)]
    query = "select id, payload::int from pgworker.add_jobs(%s)"
    ids, payloads = zip(*db.execute(query, [Jsonb(specs)]).fetchall(), strict=True)
    assert payloads == tuple(range(100_000))
    assert all(before < after for before, after in pairwise(ids))
    assert claim_ids(db, register(db), 1000) == list(ids[:1000])


def test_thousands_of_keys_that_are_all_taken_are_folded(tx: Conn) -> None:
    specs = [{"identifier": "bulk", "job_key": f"k{n}", "payload": [n]} for n in range(3000)]
    first = add_jobs(tx, *specs)
    second = add_jobs(tx, *reversed(specs))
    assert [job["id"] for job in second] == [job["id"] for job in reversed(first)]
    assert {job["revision"] for job in second} == {1}
    assert second[0]["payload"] == [2999, 2999]
