"""trigger_job(): a job for each changed row, with no code of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.calling import Conn, refused, rows, value
from tests.connections import Connections

PAYLOADS = "select array_agg(payload order by id) from pgworker.jobs"


def table(conn: Conn, columns: str, arguments: str = "'mail'", when: str = "after insert or update or delete") -> None:
    conn.execute(f"create table public.users ({columns})")
    conn.execute(
        f"create trigger t {when} on public.users for each row execute function pgworker.trigger_job({arguments})"
    )


def told(op: str, identity: Any) -> dict[str, Any]:
    return {"schema": "public", "table": "users", "op": op, "id": identity}


def test_every_row_of_every_operation_becomes_a_job(tx: Conn) -> None:
    table(tx, "id int, name text")
    tx.execute("insert into public.users values (1, 'a'), (2, 'b')")
    tx.execute("update public.users set id = 7 where id = 2")
    tx.execute("delete from public.users where id = 1")
    assert value(tx, PAYLOADS) == [told("INSERT", 1), told("INSERT", 2), told("UPDATE", 7), told("DELETE", 1)]
    job = rows(tx, "select distinct task_identifier, queue_name, key, priority, state from pgworker.jobs")
    assert job == [{"task_identifier": "mail", "queue_name": None, "key": None, "priority": 0, "state": "ready"}]


@pytest.mark.parametrize(
    ("type_", "written", "identity"),
    [
        ("smallint", "7", 7),
        ("bigint", "9007199254740993", 9007199254740993),
        ("numeric", "12345678901234567890", 12345678901234567890),
        ("text", "'it''s'", "it's"),
        ("text", "''", ""),
        ("varchar(10)", "'x'", "x"),
        ("uuid", "'6b86b273-ff34-4ce1-9d6b-804eff5a3f57'", "6b86b273-ff34-4ce1-9d6b-804eff5a3f57"),
        ("date", "'2030-01-31'", "2030-01-31"),
        ("int[]", "'{1,2}'", "{1,2}"),
    ],
)
def test_keys_of_any_type_are_told_numbers_as_numbers(tx: Conn, type_: str, written: str, identity: Any) -> None:
    table(tx, f"id {type_}")
    tx.execute(f"insert into public.users values ({written})")
    assert value(tx, PAYLOADS) == [told("INSERT", identity)]


@pytest.mark.parametrize("type_", ["int", "text", "uuid"])
def test_a_null_key_is_told_as_null(tx: Conn, type_: str) -> None:
    table(tx, f"id {type_}")
    tx.execute("insert into public.users values (null)")
    assert value(tx, PAYLOADS) == [told("INSERT", None)]


def test_another_key_column_can_be_named_whatever_its_name(tx: Conn) -> None:
    table(tx, 'id int, "Key; drop" text', "'mail', 'Key; drop'")
    tx.execute("insert into public.users values (1, 'x')")
    assert value(tx, PAYLOADS) == [told("INSERT", "x")]


def test_a_dropped_column_does_not_shift_the_key(tx: Conn) -> None:
    table(tx, "gone text, id int, name text")
    tx.execute("alter table public.users drop column gone")
    tx.execute("insert into public.users values (5, 'x')")
    assert value(tx, PAYLOADS) == [told("INSERT", 5)]


def test_a_partition_and_a_view_have_their_key_too(tx: Conn) -> None:
    tx.execute("create table public.users (name text, id int) partition by list (id)")
    tx.execute("create table public.part (id int, name text)")  # other order of the columns
    tx.execute("alter table public.users attach partition public.part for values in (1)")
    tx.execute("create trigger t after insert on public.users for each row execute function pgworker.trigger_job('a')")
    tx.execute("create view public.v as select * from public.users")
    tx.execute("create trigger v instead of delete on public.v for each row execute function pgworker.trigger_job('a')")
    tx.execute("insert into public.users (id) values (1)")
    tx.execute("delete from public.v")
    assert value(tx, "select array_agg(payload -> 'id' order by id) from pgworker.jobs") == [1, 1]


@pytest.mark.parametrize("when", ["before insert or update or delete", "after insert or update or delete"])
def test_the_change_itself_is_not_prevented_or_altered(tx: Conn, when: str) -> None:
    table(tx, "id int, name text", when=when)
    tx.execute("insert into public.users values (1, 'a'), (2, 'b')")
    tx.execute("update public.users set name = 'c' where id = 1")
    tx.execute("delete from public.users where id = 2")
    assert rows(tx, "select * from public.users") == [{"id": 1, "name": "c"}]
    assert value(tx, "select count(*) from pgworker.jobs") == 4


def test_a_missing_key_column_is_named(tx: Conn) -> None:
    table(tx, "number int")
    with refused(tx, "22023", "table public.users has no column id", hint="second argument"):
        tx.execute("insert into public.users values (1)")


def test_a_misnamed_key_column_is_named(tx: Conn) -> None:
    table(tx, "id int", "'mail', 'ID'")
    with refused(tx, "22023", 'has no column "ID"'):
        tx.execute("insert into public.users values (1)")


def test_a_system_column_is_no_key(tx: Conn) -> None:
    table(tx, "id int", "'mail', 'xmin'")
    with refused(tx, "22023", "has no column xmin"):
        tx.execute("insert into public.users values (1)")


@pytest.mark.parametrize("arguments", ["", "'mail', 'id', 'more'"])
def test_a_wrong_number_of_arguments_is_refused(tx: Conn, arguments: str) -> None:
    table(tx, "id int", arguments)
    with refused(tx, "22023", "trigger_job takes a task identifier and optionally a key column"):
        tx.execute("insert into public.users values (1)")


def test_a_statement_trigger_is_refused(tx: Conn) -> None:
    tx.execute("create table public.users (id int)")
    tx.execute("create trigger t after insert on public.users execute function pgworker.trigger_job('mail')")
    with refused(tx, "22023", "needs a row", hint="FOR EACH ROW"):
        tx.execute("insert into public.users values (1)")


def test_an_identifier_out_of_its_limits_is_refused(tx: Conn) -> None:
    table(tx, "id int", "''")
    with refused(tx, "22023", "identifier must be 1 to 128 characters long, got 0"):
        tx.execute("insert into public.users values (1)")


def test_who_may_only_write_the_table_needs_no_right_on_the_queue(
    db: Conn, connect: Connections, role: Callable[..., str]
) -> None:
    table(db, "id int")
    db.execute(f"grant insert on public.users to {role('clerk')}")
    connect(user="clerk").execute("insert into public.users select generate_series(1, 1000)")
    assert value(db, "select count(distinct payload ->> 'id') from pgworker.jobs") == 1000


def test_jobs_of_a_rolled_back_change_are_gone(tx: Conn) -> None:
    table(tx, "id int")
    with tx.transaction(force_rollback=True):
        tx.execute("insert into public.users values (1)")
    assert value(tx, "select count(*) from pgworker.jobs") == 0
