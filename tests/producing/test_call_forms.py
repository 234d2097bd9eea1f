"""add_job as people write it: without casts, from SQL, from triggers, from roles that may do nothing else."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import psycopg
import pytest

from tests.calling import Conn, add, claim_ids, refused, register, row, rows, seen, value
from tests.connections import Connections


@pytest.mark.parametrize(
    ("arguments", "payload"),
    [
        ("'a'", {}),
        ("'a', null", {}),
        ("'a', '{\"n\":1}'", {"n": 1}),
        ("'a', '{\"n\":1}'::text", {"n": 1}),
        ("'a', '{\"n\":1}'::json", {"n": 1}),
        ("'a', '{\"n\":1}'::jsonb", {"n": 1}),
        ("'a', json_build_object('n', 1)", {"n": 1}),
        ("'a', jsonb_build_object('n', 1)", {"n": 1}),
        ("'a', row_to_json(row(1))", {"f1": 1}),
        ("'a', to_jsonb(1)", 1),
        ("'a', '[1, 2]'", [1, 2]),
        ("'a', null::json", {}),
        ("'a', null::jsonb", {}),
        ("'a', null::text", {}),
        ("identifier := 'a', payload := '{\"n\":1}'", {"n": 1}),
        ("identifier := 'a', payload := json_build_object('n', 1)", {"n": 1}),
        ("identifier := 'a'", {}),
        ("'a', run_at := now() + interval '2 days'", {}),
        ("'a', queue_name := 'q', priority := 3", {}),
        ("'a', '{}', 'q', now(), 3, 'k', 1, '{x}', 'replace'", {}),
        ("'a', '{}'::json, 'q', now(), 3, 'k', 1, array['x'], 'replace'", {}),
        ("'a', '{}', 'q', now(), 3, 'k', 1, '{x}', 'replace', 'ada', '1 hour'", {}),
        ("'a', '{}'::json, 'q', now(), 3, 'k', 1, '{x}', 'debounce', 'ada', null, interval '1 hour'", {}),
        ("'a', '{}'::jsonb, 'q', now(), 3, 'k', 1, '{x}', 'debounce', 'ada', null, '1 hour'", {}),
        ("'a', job_key => 'k', unique_for => '1 hour'", {}),
        ("'a', limit_key => 'ada'", {}),
    ],
)
def test_no_way_of_writing_the_payload_is_ambiguous(tx: Conn, arguments: str, payload: object) -> None:
    job = row(tx, f"select * from pgworker.add_job({arguments})")
    assert job["task_identifier"] == "a"
    assert job["payload"] == payload
    assert seen(tx, job["id"]) == job


@pytest.mark.parametrize("payload", ["", "::json", "::jsonb", "::text"])
def test_every_overload_passes_on_every_argument(tx: Conn, payload: str) -> None:
    job = row(
        tx,
        f"select * from pgworker.add_job('a', '{{\"n\": 1}}'{payload}, 'q', '2100-01-01 00:00+00', 7, 'k', -3, "
        "array['x', 'y'], 'unsafe_dedupe', 'ada', '1 hour')",
    )
    assert (job["limit_key"], job["unique_until"] - job["created_at"]) == ("ada", timedelta(hours=1))
    assert (job["payload"], job["queue_name"], job["max_attempts"], job["key"], job["priority"], job["flags"]) == (
        {"n": 1}, "q", 7, "k", -3, ["x", "y"],
    )  # fmt: skip
    assert job["state"] == "scheduled"
    assert str(job["run_at"]) == "2100-01-01 00:00:00+00:00"
    again = row(
        tx, f"select * from pgworker.add_job('b', '{{}}'{payload}, job_key := 'k', job_key_mode := 'unsafe_dedupe')"
    )
    assert (again["id"], again["task_identifier"], again["revision"]) == (job["id"], "a", 1)
    bounded = row(
        tx,
        f"select * from pgworker.add_job('b', '{{}}'{payload}, run_at := '2100-01-01 00:00+00', job_key_mode := "
        "'debounce', debounce_max := '1 hour')",
    )
    assert bounded["run_at"] - bounded["created_at"] == timedelta(hours=1)


def test_omitted_arguments_get_their_documented_defaults(tx: Conn) -> None:
    job = row(tx, "select j.*, j.run_at = now() as due_now, j.created_at = now() as created_now "
                  "from pgworker.add_job('a') j")  # fmt: skip
    assert isinstance(job.pop("id"), int)
    for name in ("run_at", "created_at"):
        assert job.pop(name) is not None
    assert job == {
        "task_identifier": "a", "queue_name": None, "state": "ready", "payload": {}, "priority": 0, "attempts": 0,
        "max_attempts": 25, "last_error": None, "key": None, "revision": 0, "flags": None, "parent_id": None,
        "root_id": None, "name": None, "on_failure": None, "progress": None, "result": None, "locked_at": None,
        "locked_by": None, "finished_at": None, "started_at": None, "limit_key": None, "unique_until": None,
        "due_now": True, "created_now": True,
    }  # fmt: skip


def test_null_arguments_mean_the_defaults(tx: Conn) -> None:
    left_out = row(tx, "select * from pgworker.add_job('a')")
    nulls = row(tx, f"select * from pgworker.add_job('a', {', '.join(['null'] * 11)})")
    assert nulls.pop("id") > left_out.pop("id")
    assert nulls == left_out


@pytest.mark.parametrize("cast", ["::jsonb", "::json", "::text", ""])
def test_a_null_of_json_is_no_payload_however_it_comes(tx: Conn, cast: str) -> None:
    assert row(tx, f"select * from pgworker.add_job('a', 'null'{cast})")["payload"] == {}
    tx.execute("select pgworker.add_job('a', '{\"n\": 1}', job_key := 'k')")
    assert row(tx, f"select * from pgworker.add_job('a', 'null'{cast}, job_key := 'k')")["payload"] == {}
    assert row(tx, f"select * from pgworker.add_job('a', '[null]'{cast})")["payload"] == [None]


@pytest.mark.parametrize(
    ("payload", "says", "why"),
    [
        ("''", "got ''", "invalid input syntax for type json"),
        ("'{n: 1}'", "got '{n: 1}'", 'Token "n" is invalid'),
        ("repeat('x', 5000)", f"got '{'x' * 200}'", "invalid input syntax for type json"),
        ("'\"\\u0000\"'", "got ", "u0000 cannot be converted to text"),
        ("'\"\\u0000\"'::json", "got ", "u0000 cannot be converted to text"),
        ("'1e400000'::json", "got '1e400000'", "overflow"),
        ("repeat('[', 100000)", "got '[[", "stack depth limit exceeded"),
    ],
    ids=str,
)
def test_a_payload_that_is_no_json_is_refused_by_name_and_adds_nothing(
    tx: Conn, payload: str, says: str, why: str
) -> None:
    with refused(tx, "22023", "payload must be JSON that jsonb can hold", says, hint="to_jsonb()") as error:
        tx.execute(f"select pgworker.add_job('a', {payload})")
    assert why in str(error.value.diag.message_detail)


def test_a_payload_of_type_jsonb_costs_no_subtransaction(tx: Conn) -> None:
    # The lint allows the name, which the overload for text needs; this one is the hot path.
    hot = "pgworker.add_job(text, jsonb, text, timestamptz, int, text, int, text[], text, text, interval, interval)"
    for function in (hot, "pgworker.put_job", "pgworker.invalid_argument"):
        kind = "regprocedure" if "(" in function else "regproc"
        assert value(tx, f"select prosrc !~* 'exception\\s+when' from pg_proc where oid = %s::{kind}", function)


def test_a_job_vanishes_with_its_transaction(db: Conn, connect: Connections) -> None:
    other = connect()
    worker = register(other)
    with db.transaction(force_rollback=True):
        add(db)
        db.execute('select pgworker.add_jobs(\'[{"identifier": "a"}, {"identifier": "b", "job_key": "k"}]\')')
        assert claim_ids(other, worker, 10) == []  # not before the commit either
    assert claim_ids(other, worker, 10) == []
    assert value(db, "select count(*) from pgworker.jobs") == 0
    with db.transaction():
        kept = add(db)["id"]
    assert claim_ids(other, worker, 10) == [kept]


def test_a_savepoint_takes_back_only_what_came_after_it(tx: Conn) -> None:
    kept = add(tx)
    with tx.transaction(force_rollback=True):
        add(tx)
    assert [job["id"] for job in rows(tx, "select id from pgworker.jobs")] == [kept["id"]]


def test_a_trigger_of_a_role_without_any_table_of_ours_can_add(
    db: Conn, connect: Connections, role: Callable[..., str]
) -> None:
    db.execute(f"select pgworker.grant_producer('{role('shop')}')")
    db.execute("create schema shop authorization shop")
    shop = connect(user="shop")
    shop.execute("""
        create table shop.orders (id int primary key, email text);
        create function shop.ordered() returns trigger language plpgsql as $$
        begin
          perform pgworker.add_job('receipt', row_to_json(new), queue_name := 'mail', job_key := 'order-' || new.id);
          return new;
        end $$;
        create trigger ordered after insert on shop.orders for each row execute function shop.ordered();
    """)
    shop.execute("insert into shop.orders select n, n || '@example.com' from generate_series(1, 3) n")
    assert rows(db, "select task_identifier, payload, queue_name, key from pgworker.jobs order by id") == [
        {"task_identifier": "receipt", "payload": {"id": n, "email": f"{n}@example.com"}, "queue_name": "mail",
         "key": f"order-{n}"} for n in (1, 2, 3)
    ]  # fmt: skip
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        shop.execute("select from pgworker.job")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        shop.execute("select from pgworker.jobs")


def test_a_job_can_be_added_by_a_statement_that_reads_and_writes(tx: Conn) -> None:
    tx.execute("create temp table orders (id int) on commit drop")
    tx.execute(
        "with bought as (insert into orders values (1), (2) returning id) "
        "select pgworker.add_job('receipt', jsonb_build_object('id', id)) from bought"
    )
    assert value(tx, "select array_agg(payload ->> 'id' order by id) from pgworker.jobs") == ["1", "2"]


def test_ids_ascend_in_the_order_of_the_calls(tx: Conn) -> None:
    ids = [add(tx)["id"] for _ in range(20)]
    assert ids == sorted(set(ids))


def test_no_id_can_run_out_at_two_billion(tx: Conn) -> None:
    assert rows(
        tx,
        "select sequencename from pg_sequences where schemaname = 'pgworker' and data_type::text <> 'bigint'",
    ) == []  # fmt: skip
    assert rows(
        tx,
        "select table_name, column_name from information_schema.columns where table_schema = 'pgworker' "
        "and (column_name = 'id' or column_name like '%%\\_id' or column_name in ('locked_by', 'turn')) "
        "and data_type <> 'bigint'",
    ) == []  # fmt: skip
    tx.execute("alter sequence pgworker.job_id restart 9000000000000000000")
    assert add(tx)["id"] == 9000000000000000000
