"""What a session brings along cannot change what the functions do with the rights of who installed them."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

import psycopg
import pytest

from tests.calling import FUTURE, PAST, Conn, add, call, claim_ids, register, rows, seen, value
from tests.connections import Connections
from tests.lifecycle import job_in

Role = Callable[..., str]

TABLES = ("job", "jobs", "finished", "queue", "task", "worker", "notice", "setting", "claimed_job")
SEQUENCES = ("job_id", "worker_id", "turn", "epoch")

# What the functions call or compare with; each of these raises.
SHADOWS = {
    "now()": "timestamptz", "statement_timestamp()": "timestamptz", "clock_timestamp()": "timestamptz",
    "length(text)": "int", "format(text)": "text", "format(text, text)": "text", "format(text, bigint)": "text",
    "left(text, int)": "text", "quote_literal(text)": "text", "jsonb_typeof(jsonb)": "text",
    "jsonb_array_length(jsonb)": "int", "to_jsonb(text)": "jsonb", "concat_ws(text, text)": "text",
    "hashtext(text)": "int", "nextval(regclass)": "bigint", "exp(double precision)": "double precision",
    "exp(numeric)": "numeric", "trunc(numeric)": "numeric", "set_config(text, text, boolean)": "text",
    "current_setting(text)": "text", "current_setting(text, boolean)": "text", "pg_notify(text, text)": "void",
    "pg_try_advisory_lock(int, int)": "boolean", "pg_advisory_unlock(int, int)": "boolean",
    "pg_advisory_lock_shared(int, int)": "void", "pg_try_advisory_xact_lock(int, int)": "boolean",
    "pg_backend_pid()": "int", "string_to_array(text, text)": "text[]", "generate_series(int, int)": "setof int",
    "cardinality(bigint[])": "int", "cardinality(text[])": "int", "array_position(text[], text)": "int",
    "unnest(bigint[])": "setof bigint", "unnest(text[])": "setof text", "max(bigint)": "bigint", "count()": "bigint",
    "clock()": "timestamptz", "wake()": "void", "put_job()": "bigint", "invalid_argument()": "text",
    "version()": "text",
}  # fmt: skip

OPERATORS = [
    ("=", "text", "text"), ("=", "bigint", "bigint"), ("=", "int", "int"), ("<>", "text", "text"),
    ("<", "bigint", "bigint"), (">", "bigint", "bigint"), ("<=", "timestamptz", "timestamptz"),
    (">", "timestamptz", "timestamptz"), ("<", "timestamptz", "timestamptz"), ("+", "smallint", "int"),
    ("+", "timestamptz", "interval"), ("*", "double precision", "interval"), ("||", "jsonb", "jsonb"),
    ("||", "text", "text"), ("||", "bigint[]", "bigint[]"), ("-", "jsonb", "text[]"), ("->", "jsonb", "text"),
    ("->>", "jsonb", "text"), ("&&", "text[]", "text[]"), ("=", "tid", "tid"), (">=", "smallint", "smallint"),
    ("&", "bigint", "bigint"), ("=", "jsonb", "jsonb"),
]  # fmt: skip

RAISES = "language plpgsql as $$ begin raise exception 'hijacked, with the rights of %', current_user; end $$"


def lay_traps(conn: Conn) -> None:
    """Shadow everything that can be shadowed, and put it first on the path of this session."""
    for signature, returns in SHADOWS.items():
        conn.execute(f"create function trap.{signature} returns {returns} {RAISES}")
    for n, (operator, left, right) in enumerate(OPERATORS):
        conn.execute(f"create function trap.operate_{n}({left}, {right}) returns boolean {RAISES}")
        conn.execute(
            f"create operator trap.{operator} (leftarg = {left}, rightarg = {right}, function = trap.operate_{n})"
        )
    for name in TABLES:
        conn.execute(f"create table trap.{name} (id bigint, name text)")
        conn.execute(f"create temp table {name} (id bigint, name text)")
    for name in SEQUENCES:
        conn.execute(f"create sequence trap.{name}")
        conn.execute(f"create temp sequence {name}")
    conn.execute("create domain trap.text as pg_catalog.int4")
    conn.execute("create domain pg_temp.jsonb as pg_catalog.int4")
    conn.execute("set search_path = pg_temp, trap, pg_catalog")


def trapped(connect: Connections, db: Conn, role: Role, grant: str) -> Conn:
    """Return the session of a role with that grant, in which every trap is laid."""
    name = role("mallory")
    db.execute("create schema trap authorization mallory")
    call(db, grant, name)
    theirs = connect(user=name)
    lay_traps(theirs)
    for trap in (
        "select now()",
        "select 'a'::pg_catalog.text = 'b'::pg_catalog.text",
        "select nextval('turn'), length('a')",
    ):
        with pytest.raises(psycopg.errors.RaiseException, match="hijacked"):
            theirs.execute(trap)
    return theirs


def caught(db: Conn) -> int:
    """Return how many rows the tables in the traps have got."""
    return sum(int(value(db, f"select count(*) from trap.{name}")) for name in TABLES)


def test_a_producers_session_changes_nothing_about_adding(db: Conn, connect: Connections, role: Role) -> None:
    theirs = trapped(connect, db, role, "grant_producer")
    job = add(theirs, "a", payload='{"n": 1}', queue_name="q", run_at=FUTURE, job_key="k", priority=3, flags=["x"])
    assert job == seen(db, job["id"])
    again = add(theirs, "b", payload="[1]", job_key="k", job_key_mode="preserve_run_at")
    assert (again["id"], again["state"], again["revision"]) == (job["id"], "scheduled", 1)
    bulk = call(
        theirs, "add_jobs", '[{"identifier": "a", "run_at": "2030-01-01"}, {"identifier": "b", "job_key": "k"}]'
    )
    assert bulk == [seen(db, bulk[0]["id"]), seen(db, job["id"])]
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="queue_name must be 1 to 128 characters long"):
        add(theirs, "a", queue_name="")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="unknown key 'jobKey'"):
        call(theirs, "add_jobs", '[{"identifier": "a", "jobKey": "k"}]')
    assert value(db, "select count(*) from pgworker.jobs") == 2
    assert caught(db) == 0


def test_a_workers_session_changes_nothing_about_the_protocol(db: Conn, connect: Connections, role: Role) -> None:
    theirs = trapped(connect, db, role, "grant_worker")
    ids = [add(db, queue_name=f"q{n}" if n % 2 else None, priority=n % 3)["id"] for n in range(10)]
    worker = register(theirs, "mallory")
    expected = sorted(ids, key=lambda job: (ids.index(job) % 3, job))
    assert claim_ids(theirs, worker, 4, tasks=["a"], forbidden_flags=["x"]) == expected[:4]
    assert claim_ids(theirs, worker, 9) == expected[4:]
    assert claim_ids(theirs, worker, 9) == []
    call(theirs, "set_progress", worker, expected[0], "1")
    call(theirs, "complete_job", worker, expected[0], "1")
    (failed,) = call(theirs, "fail_job", worker, expected[1], "it broke")
    assert failed == seen(db, expected[1])
    call(theirs, "cancel_job", worker, expected[2])
    told = call(theirs, "finish_jobs", worker, [expected[3]], None, [expected[4], 1234567], ["it broke", "x"])
    assert [line["outcome"] for line in told] == ["completed", "scheduled", "lost"]
    call(theirs, "release_jobs", worker, [expected[5]])
    call(db, "cancel_jobs", [expected[6]])
    assert call(theirs, "heartbeat", worker) == [{"job_id": expected[6], "notice": "cancel"}]
    assert len(call(theirs, "held_jobs", worker)) == 4
    with pytest.raises(psycopg.Error, match=f"job {expected[0]} is not held by worker {worker}"):
        call(theirs, "complete_job", worker, expected[0])
    assert value(theirs, "select pgworker.next_run_at()") == min(
        value(db, "select min(run_at) from pgworker.jobs where state = 'scheduled'"), failed["run_at"]
    )
    call(theirs, "maintain")
    call(theirs, "unregister_worker", worker)
    states = rows(db, "select state, count(*) as n from pgworker.jobs group by 1 order by 1")
    assert states == [
        {"state": "cancelled", "n": 2}, {"state": "completed", "n": 1}, {"state": "ready", "n": 4},
        {"state": "scheduled", "n": 2},
    ]  # fmt: skip
    assert caught(db) == 0


def test_an_administrators_session_changes_nothing_about_administration(
    db: Conn, connect: Connections, role: Role
) -> None:
    trapped(connect, db, role, "grant_producer")
    ids = {state: job_in(db, state) for state in ("ready", "scheduled", "failed", "cancelled", "running")}
    admin = connect()
    for name in TABLES:
        admin.execute(f"create temp table {name} (id bigint, name text)")
    admin.execute("set search_path = pg_temp, trap, pg_catalog")
    with pytest.raises(psycopg.errors.RaiseException, match="hijacked"):
        admin.execute("select length('a')")
    assert len(call(admin, "reschedule_jobs", [ids["scheduled"]], run_at=PAST, priority=2)) == 1
    assert len(call(admin, "retry_jobs", [ids["failed"], ids["cancelled"]])) == 2
    assert len(call(admin, "complete_jobs", [ids["ready"]])) == 1
    assert len(call(admin, "permanently_fail_jobs", [ids["scheduled"]])) == 1
    assert len(call(admin, "cancel_jobs", list(ids.values()))) == 3
    assert len(call(admin, "force_unlock_workers", [seen(db, ids["running"])["locked_by"]])) == 1
    for function, name in (("pause_queue", "q"), ("resume_queue", "q"), ("pause_task", "t"), ("resume_task", "t")):
        call(admin, function, name)
    call(admin, "cleanup")
    add(db, job_key="k")
    assert call(admin, "remove_job", "k")[0]["key"] == "k"
    call(admin, "grant_observer", "mallory")
    assert caught(db) == 0


def test_an_observers_session_cannot_change_what_it_sees(db: Conn, connect: Connections, role: Role) -> None:
    theirs = trapped(connect, db, role, "grant_observer")
    job_in(db, "scheduled")
    job_in(db, "ready")
    job_in(db, "running")
    query = "select * from pgworker.jobs"
    by_id = itemgetter("id")
    assert sorted(rows(theirs, query), key=by_id) == sorted(rows(db, query), key=by_id)


@pytest.mark.parametrize(
    "type_",
    [
        "create type trap.key as (a int)",
        "create type trap.key as enum ('(1)')",
    ],
    ids=["composite", "enum"],
)
def test_a_cast_of_ones_own_is_not_run_with_the_rights_of_the_queue(
    db: Conn, connect: Connections, role: Role, type_: str
) -> None:
    call(db, "grant_producer", role("mallory"))
    db.execute("create schema trap authorization mallory")
    theirs = connect(user="mallory")
    theirs.execute(type_)
    for target in ("json", "jsonb", "text", "varchar", "numeric", "boolean"):
        theirs.execute(f"create function trap.to_{target}(trap.key) returns {target} {RAISES}")
        theirs.execute(f"create cast (trap.key as {target}) with function trap.to_{target}(trap.key) as implicit")
    with pytest.raises(psycopg.errors.RaiseException, match="hijacked"):
        theirs.execute("select '(1)'::trap.key::jsonb")
    for columns in ("id trap.key", "id trap.key[]", "id int, other trap.key default '(1)'"):
        theirs.execute(f"create table trap.t ({columns})")
        theirs.execute("create trigger t after insert or update or delete on trap.t "
                       "for each row execute function pgworker.trigger_job('a')")  # fmt: skip
        identity = {"id trap.key": "(1)", "id trap.key[]": '{"(1)"}'}.get(columns, "1")
        theirs.execute("insert into trap.t (id) values (%s)", [identity])
        theirs.execute("update trap.t set id = id")
        theirs.execute("delete from trap.t")
        theirs.execute("drop table trap.t")
    told = rows(db, "select payload ->> 'op' as op, payload -> 'id' as id from pgworker.jobs order by id")
    assert [line["op"] for line in told] == ["INSERT", "UPDATE", "DELETE"] * 3
    assert told[0]["id"] in ("(1)", 1)


def test_a_triggers_table_cannot_shadow_what_the_trigger_function_reads(
    db: Conn, connect: Connections, role: Role
) -> None:
    theirs = trapped(connect, db, role, "grant_producer")
    theirs.execute("create table trap.pg_attribute (id int, attrelid oid, attname name)")
    theirs.execute("create trigger t after insert on trap.pg_attribute "
                   "for each row execute function pgworker.trigger_job('a', 'id')")  # fmt: skip
    theirs.execute("insert into trap.pg_attribute (id) values (7)")
    assert value(db, "select payload -> 'id' from pgworker.jobs") == 7


def test_a_producer_cannot_make_the_queue_read_a_table_for_it(db: Conn, connect: Connections, role: Role) -> None:
    # The key column's name becomes part of a statement.
    call(db, "grant_producer", role("mallory"))
    db.execute("create schema trap authorization mallory")
    db.execute("create table public.secret as select 'treasure' as word")
    theirs = connect(user="mallory")
    column = "id\") is not null from public.secret where (select word from public.secret) = ('treasure') --"
    quoted = column.replace('"', '""')
    theirs.execute(f'create table trap.t ("{quoted}" int)')
    argument = column.replace("'", "''")
    theirs.execute(f"create trigger t after insert on trap.t "
                   f"for each row execute function pgworker.trigger_job('a', '{argument[:63]}')")  # fmt: skip
    try:
        theirs.execute("insert into trap.t values (7)")
    except psycopg.errors.InvalidParameterValue:
        return  # the name was cut off: no such column
    assert value(db, "select payload -> 'id' from pgworker.jobs") == 7
