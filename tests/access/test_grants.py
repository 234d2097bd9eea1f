"""What each role may do: exactly what its grant says, by the catalog and by trying."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from tests.calling import Conn, add, call, claim_ids, refused, register, rows, seen, value, values
from tests.connections import Connections
from tests.lifecycle import STATES, job_in

PRODUCER = {"version", "fake_now", "add_job", "add_jobs", "add_job_tree", "trigger_job"}

WORKER = PRODUCER | {
    "check_client", "register_worker", "get_jobs", "get_job", "complete_job", "fail_job", "cancel_job", "finish_jobs",
    "release_jobs", "set_progress", "wait_for_children", "heartbeat", "held_jobs", "restart_timeouts",
    "unregister_worker", "maintain",
    "next_run_at", "add_children", "children", "get_children_values", "get_failed_children_values",
}  # fmt: skip

OBSERVER = {
    "version", "next_run_at", "children", "get_children_values", "get_failed_children_values", "job_tree",
    "tree_progress", "audit", "why", "doctor", "cron_next", "cron_preview", "fake_now",
    "clock", "moved_clock", "job_state",  # the last three are what the view jobs calls
    "default_setting", "known_settings",  # and these what settings does
}  # fmt: skip

VIEWS = {"jobs", "tasks", "compensations", "job_attempts", "schedules", "forbidden_flags", "settings"}

GRANTED: dict[str, set[str]] = {
    "grant_producer": PRODUCER, "grant_worker": WORKER, "grant_observer": OBSERVER, "": set(),
}  # fmt: skip

Role = Callable[..., str]

FUNCTIONS = """
select p.proname, p.oid::regprocedure::text as signature, format(
  'select pgworker.%I(%s)', p.proname,
  (select string_agg('null::' || format_type(a.type, null), ', ' order by a.n)
   from unnest(p.proargtypes) with ordinality as a(type, n))) as call, p.prorettype = 'trigger'::regtype as of_trigger
from pg_proc p where p.pronamespace = 'pgworker'::regnamespace order by 2
"""


@pytest.mark.parametrize("grant", list(GRANTED))
def test_the_functions_that_a_role_may_execute_are_those_of_the_list(db: Conn, role: Role, grant: str) -> None:
    name = role("somebody")
    if grant:
        call(db, grant, name)
    allowed = values(
        db,
        "select distinct proname from pg_proc where pronamespace = 'pgworker'::regnamespace "
        "and has_function_privilege(%s, oid, 'execute')",
        name,
    )
    assert set(allowed) == GRANTED[grant]


@pytest.mark.parametrize("grant", list(GRANTED))
def test_no_role_gets_a_table_or_sequence_and_only_observers_the_views(db: Conn, role: Role, grant: str) -> None:
    name = role("somebody")
    if grant:
        call(db, grant, name)
    allowed = db.execute(
        "select c.relname, p.privilege from pg_class c "
        "cross join unnest(array['select', 'insert', 'update', 'delete', 'truncate', 'references', 'trigger']) "
        "  as p(privilege) "
        "where c.relnamespace = 'pgworker'::regnamespace and c.relkind in ('r', 'v', 'm', 'p') "
        "and (has_table_privilege(%(role)s, c.oid, p.privilege) "
        "     or p.privilege in ('select', 'insert', 'update', 'references') "
        "        and has_any_column_privilege(%(role)s, c.oid, p.privilege)) "
        "union all select c.relname, p.privilege from pg_class c "
        "cross join unnest(array['usage', 'select', 'update']) as p(privilege) "
        "where c.relnamespace = 'pgworker'::regnamespace and c.relkind = 'S' "
        "and has_sequence_privilege(%(role)s, c.oid, p.privilege)",
        {"role": name},
    ).fetchall()
    assert sorted(allowed) == ([(view, "select") for view in sorted(VIEWS)] if grant == "grant_observer" else [])
    may = row_of_schema_rights(db, name)
    assert may == (bool(grant), False)


def row_of_schema_rights(db: Conn, name: str) -> tuple[bool, bool]:
    query = "select has_schema_privilege(%s, 'pgworker', 'usage'), has_schema_privilege(%s, 'pgworker', 'create')"
    found = db.execute(query, [name, name]).fetchone()
    assert found is not None
    return found[0], found[1]


def test_nothing_at_all_is_open_to_public(db: Conn) -> None:
    assert db.execute(
        "select p.oid::regprocedure::text from pg_proc p where p.pronamespace = 'pgworker'::regnamespace "
        "and (p.proacl is null or exists (select from aclexplode(p.proacl) a where a.grantee = 0))"
    ).fetchall() == []  # fmt: skip
    assert db.execute(
        "select c.relname from pg_class c, aclexplode(c.relacl) a "
        "where c.relnamespace = 'pgworker'::regnamespace and a.grantee = 0"
    ).fetchall() == []  # fmt: skip
    assert db.execute(
        "select n.nspname from pg_namespace n, aclexplode(n.nspacl) a where n.nspname = 'pgworker' and a.grantee = 0"
    ).fetchall() == []  # fmt: skip


@pytest.mark.parametrize("grant", list(GRANTED))
def test_trying_every_function_gets_no_further_than_the_list(
    db: Conn, connect: Connections, role: Role, grant: str
) -> None:
    name = role("somebody")
    if grant:
        call(db, grant, name)
    theirs = connect(user=name)
    denied = set()
    for function in rows(db, FUNCTIONS):
        if function["of_trigger"]:
            continue
        try:
            with theirs.transaction(force_rollback=True):
                theirs.execute(function["call"])
        except psycopg.errors.InsufficientPrivilege as error:
            # Of the function itself or its schema, not of something that it wrongly does with the caller's rights.
            message = str(error.diag.message_primary)
            denied.add(function["proname"] if "schema pgworker" in message else message.rpartition(" ")[2])
        except psycopg.Error:
            pass  # it ran, and did not like the nulls
    everything = {function["proname"] for function in rows(db, FUNCTIONS) if not function["of_trigger"]}
    assert everything - denied == GRANTED[grant] - {"trigger_job"}


@pytest.mark.parametrize("grant", list(GRANTED))
def test_trying_every_table_gets_no_further_than_the_views(
    db: Conn, connect: Connections, role: Role, grant: str
) -> None:
    name = role("somebody")
    if grant:
        call(db, grant, name)
    theirs = connect(user=name)
    readable = set()
    for table in values(
        db, "select relname from pg_class where relnamespace = 'pgworker'::regnamespace and relkind in ('r', 'v', 'S')"
    ):
        for statement in ("select * from", "delete from", "truncate", "lock table"):
            try:
                with theirs.transaction(force_rollback=True):
                    theirs.execute(f"{statement} pgworker.{table}")
            except (
                psycopg.errors.InsufficientPrivilege,
                psycopg.errors.WrongObjectType,  # a sequence is no table,
                psycopg.errors.ObjectNotInPrerequisiteState,  # and nobody deletes from a union
            ):
                continue
            readable.add((statement, table))
    assert readable == ({("select * from", view) for view in VIEWS} if grant == "grant_observer" else set())


def test_a_worker_role_can_speak_the_whole_protocol(db: Conn, connect: Connections, role: Role) -> None:
    call(db, "grant_worker", role("hand"))
    hand = connect(user="hand")
    call(hand, "check_client", 1)
    call(hand, "version")
    worker = register(hand, "hand")
    leased = register(hand, lease="1 hour")
    for n in range(9):
        add(hand, queue_name=f"q{n}" if n % 2 else None)
    call(hand, "add_jobs", '[{"identifier": "a", "job_key": "k"}]')
    ids = claim_ids(hand, worker, 8)
    (job,) = call(hand, "get_job", leased)
    assert call(hand, "held_jobs", leased) == [{"job_id": job["id"], "attempts": 1}]
    call(hand, "restart_timeouts", worker, ids[:1])
    call(hand, "set_progress", worker, ids[0], "1")
    assert value(hand, "select pgworker.wait_for_children(%s, %s)", worker, ids[0]) is False
    call(hand, "complete_job", worker, ids[0], '{"n": 1}')
    (failed,) = call(hand, "fail_job", worker, ids[1], "it broke")
    assert failed["state"] == "scheduled"
    (cancelled,) = call(hand, "cancel_job", worker, ids[2])
    assert cancelled["state"] == "cancelled"
    told = call(hand, "finish_jobs", worker, ids[3:5], None, ids[5:6], ["it broke"])
    assert [line["outcome"] for line in told] == ["completed", "completed", "scheduled"]
    call(hand, "release_jobs", worker, ids[6:7])
    call(db, "cancel_jobs", [ids[7]])
    assert call(hand, "heartbeat", worker) == [{"job_id": ids[7], "notice": "cancel"}]
    assert value(hand, "select pgworker.next_run_at()") is not None
    db.execute("insert into pgworker.setting values ('allow_fake_now', 'on')")
    call(db, "schedule_job", "s", "@yearly", "from the schedule")
    call(hand, "fake_now", value(db, "select next_tick from pgworker.schedules"))
    for _ in range(2):  # first it gives up the worker whose lease is over by then
        call(hand, "maintain")  # which runs what it may not touch
    assert value(db, "select count(*) from pgworker.jobs where task_identifier = 'from the schedule'") == 1
    call(hand, "fake_now", None)
    call(hand, "unregister_worker", worker)


def test_an_observer_sees_every_job_and_schedule_as_the_owner_does(db: Conn, connect: Connections, role: Role) -> None:
    call(db, "grant_observer", role("eye"))
    eye = connect(user="eye")
    for state in STATES:
        job_in(db, state)
    query = "select * from pgworker.jobs order by id"
    assert rows(eye, query) == rows(db, query)
    call(db, "schedule_job", "s", "@daily", "t", payload='{"n": 1}')
    call(db, "pause_schedule", "s")
    schedules = "select * from pgworker.schedules"
    assert rows(eye, schedules) == rows(db, schedules) != []
    assert value(eye, "select pgworker.cron_next('@daily', '2030-01-01')") is not None
    assert value(eye, "select pgworker.version()") == value(db, "select pgworker.version()")
    call(eye, "next_run_at")
    # The moved clock is seen by whoever may look, without a right to read the settings.
    db.execute("insert into pgworker.setting values ('allow_fake_now', 'on')")
    eye.execute("set pgworker.fake_now = '2101-01-01'")
    assert rows(eye, "select from pgworker.jobs where state = 'scheduled'") == []


def test_a_producer_cannot_finish_anothers_work(db: Conn, connect: Connections, role: Role) -> None:
    call(db, "grant_producer", role("shop"))
    shop = connect(user="shop")
    worker = register(db)
    job = add(shop, queue_name="q", job_key="k")["id"]
    assert claim_ids(db, worker) == [job]
    before = seen(db, job)
    attempts = [
        "select pgworker.complete_job(%(worker)s, %(job)s)",
        "select pgworker.fail_job(%(worker)s, %(job)s, 'x')",
        "select pgworker.finish_jobs(%(worker)s, array[%(job)s::bigint], null, null, null)",
        "select pgworker.finish(array[%(job)s::bigint], array['completed'], null, null)",
        "select pgworker.cancel_jobs(array[%(job)s::bigint])",
        "select pgworker.complete_jobs(array[%(job)s::bigint])",
        "select pgworker.force_unlock_workers(array[%(worker)s::bigint])",
        "select pgworker.unregister_worker(%(worker)s)",
        "select pgworker.register_worker()",
        "select pgworker.remove_job('k')",
        "select pgworker.cleanup()",
        "select pgworker.grant_worker('shop')",
        "select pgworker.schedule_job('s', '@daily', 't')",
        "select pgworker.unschedule_job('s')",
        "select pgworker.load_crontab('', true)",
    ]
    for query in attempts:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            shop.execute(query, {"worker": worker, "job": job})
    assert seen(db, job) == before


@pytest.mark.parametrize("name", ["plain", 'We"ird; drop role', "été", "select"])
@pytest.mark.parametrize("grant", ["grant_producer", "grant_worker", "grant_observer"])
def test_a_role_of_any_name_can_be_granted_twice(db: Conn, role: Role, grant: str, name: str) -> None:
    role(name)
    quoted = value(db, "select quote_ident(%s)", name)
    for _ in range(2):
        db.execute(f"select pgworker.{grant}(%s)", [quoted])
    assert value(db, "select has_function_privilege(%s, 'pgworker.version()', 'execute')", name) is True


@pytest.mark.parametrize("grant", ["grant_producer", "grant_worker", "grant_observer"])
def test_a_role_that_is_not_there_cannot_be_granted(tx: Conn, grant: str) -> None:
    with pytest.raises(psycopg.errors.UndefinedObject), tx.transaction():
        call(tx, grant, "nobody_of_that_name")
    with refused(tx, "22004", "role must not be null", hint="CREATE ROLE"):
        value(tx, f"select pgworker.{grant}(null)")
    with refused(tx, "42704", "role 4000000000 does not exist", hint="CREATE ROLE"):  # one that was dropped meanwhile
        value(tx, f"select pgworker.{grant}(4000000000::oid::regrole)")


def test_grants_do_not_let_the_role_grant_on(db: Conn, connect: Connections, role: Role) -> None:
    call(db, "grant_worker", role("hand"))
    other = role("other")
    hand = connect(user="hand")
    hand.execute(f"grant usage on schema pgworker to {other}")  # a warning, and no grant
    hand.execute(f"grant execute on function pgworker.version() to {other}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        hand.execute(f"grant execute on function pgworker.cleanup(text[]) to {other}")
    assert row_of_schema_rights(db, other) == (False, False)
    assert value(db, "select has_function_privilege('other', 'pgworker.version()', 'execute')") is False
