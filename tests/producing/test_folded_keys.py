"""One key in many specs of add_jobs: what single calls would have made of it, told row by row, and written once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.calling import FUTURE, PAST, Conn, Row, add, call, claim_ids, register, rows, seen, value
from tests.connections import Connections
from tests.lifecycle import LIVE, job_in

KEYS = ("absent", *LIVE)

WRITTEN = "select pg_stat_get_xact_tuples_updated('pgworker.job'::regclass)"


def spec(chance: random.Random) -> dict[str, Any]:
    """Return a spec whose key is one of few, with few others of its attributes."""
    attributes = {
        "payload": chance.choice([[1], [2, 3], {"n": 1}, "text", None]),
        "queue_name": "q",
        "run_at": chance.choice([PAST, FUTURE, None]),
        "max_attempts": 7,
        "priority": chance.randint(-3, 3),
        "flags": chance.choice([["x"], []]),
    }
    chosen = {name: given for name, given in attributes.items() if chance.random() < 0.6}
    mode = chance.choice(["replace", "preserve_run_at", "unsafe_dedupe"])
    return {"identifier": chance.choice("ab"), "job_key": chance.choice(KEYS), "job_key_mode": mode, **chosen}


def single(conn: Conn, given: dict[str, Any]) -> Row:
    arguments = dict(given)
    if "payload" in arguments:
        arguments["payload"] = Jsonb(arguments["payload"])
    return add(conn, arguments.pop("identifier"), **arguments)


def numbered(known: Sequence[int], told: list[Row]) -> list[Row]:
    """Return the rows with the ids of new jobs in place of what the sequence happened to give."""
    new: dict[int, str] = {}
    for job in told:
        if job["id"] not in known:
            new.setdefault(job["id"], f"new {len(new)}")
    return [job | {"id": new.get(job["id"], job["id"])} for job in told]


def outcome(conn: Conn, known: Sequence[int], how: str, specs: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the specs one by one or together, and take it back; return all that can be seen of it."""
    epoch = value(conn, "select last_value from pgworker.epoch")
    with conn.transaction(force_rollback=True):
        told = [single(conn, one) for one in specs] if how == "singly" else call(conn, "add_jobs", Jsonb(specs))
        left = rows(conn, "select * from pgworker.jobs order by key nulls first, id")
        return {
            "told": numbered(known, told),
            "left": numbered(known, left),
            "woken": value(conn, "select current_setting('pgworker.woken', true) = 'yes'"),
            "swept": value(conn, "select last_value from pgworker.epoch") > epoch,
        }


@pytest.mark.parametrize("seed", range(25))
def test_many_specs_of_few_keys_are_what_single_calls_would_have_made_of_them(
    db: Conn, connect: Connections, seed: int
) -> None:
    chance = random.Random(seed)
    known = [
        job_in(db, state, job_key=state, payload="[0]", flags=["old"], run_at=PAST if state == "ready" else None)
        for state in LIVE
    ]
    sleeper = connect()
    assert claim_ids(sleeper, register(sleeper), tasks=["of nobody"]) == []
    with db.transaction(force_rollback=True):  # one time for both
        specs = [spec(chance) for _ in range(chance.choice([2, 5, 40]))]
        singly, together = (outcome(db, known, how, specs) for how in ("singly", "together"))
        assert together["told"] == singly["told"]
        assert together["left"] == singly["left"]
        assert together["woken"] or not singly["woken"]
        assert together["swept"] or not singly["swept"]


@pytest.mark.parametrize("mode", ["replace", "preserve_run_at", "unsafe_dedupe"])
@pytest.mark.parametrize("state", ["absent", "ready", "running"])
def test_a_key_in_thousands_of_specs_is_not_written_thousands_of_times(tx: Conn, mode: str, state: str) -> None:
    # Each version of a row that its own transaction has left behind is walked over by whatever looks for the key.
    if state != "absent":
        job_in(tx, state, job_key="k")
    before = value(tx, WRITTEN)
    specs = [{"identifier": "a", "payload": {"n": n}, "job_key": "k", "job_key_mode": mode} for n in range(3000)]
    told = call(tx, "add_jobs", Jsonb(specs))
    assert value(tx, WRITTEN) - before <= 3
    counted = 0 if state == "absent" or (state == "running" and mode != "unsafe_dedupe") else 1
    assert [job["revision"] for job in told] == list(range(counted, 3000 + counted))
    assert seen(tx, told[-1]["id"]) == told[-1]


def test_a_job_that_only_the_fold_makes_claimable_is_looked_for(tx: Conn) -> None:
    """It lies behind the cursors that passed it over; none of the specs names a time that is due."""
    job = add(tx, job_key="k", run_at=PAST, flags=["forbidden"])["id"]
    specs = [{"identifier": "a", "job_key": "k", "run_at": FUTURE, "job_key_mode": "preserve_run_at"}] * 2
    epoch = value(tx, "select last_value from pgworker.epoch")
    assert [row["state"] for row in call(tx, "add_jobs", Jsonb(specs))] == ["ready", "ready"]
    assert value(tx, "select last_value from pgworker.epoch") > epoch
    assert claim_ids(tx, register(tx), forbidden_flags=["forbidden"]) == [job]
