"""Finished jobs are kept as long as the settings say: of the installation, or of their task."""

from __future__ import annotations

from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.calling import Conn, add, call, claim_ids, contents, job_row, refused, register, rows, state, value, values
from tests.clock import move_clock
from tests.lifecycle import bring

WAYS = pytest.mark.parametrize("how", ["finish_jobs", "complete_job"])


def configure(conn: Conn, name: str | None, to: str | None) -> None:
    call(conn, "configure", name, to)


def of_task(conn: Conn, identifier: str, **columns: str) -> None:
    for name, to in columns.items():
        conn.execute(
            f"insert into pgworker.task (identifier, {name}) values (%s, %s) "
            f"on conflict (identifier) do update set {name} = excluded.{name}",
            [identifier, to],
        )


def complete(conn: Conn, how: str = "finish_jobs", result: Any = None, **arguments: Any) -> int:
    worker, job = register(conn), add(conn, **arguments)["id"]
    assert claim_ids(conn, worker) == [job]
    if how == "complete_job":
        value(conn, "select pgworker.complete_job(%s, %s, %s)", worker, job, result and Jsonb(result))
    else:
        (row,) = call(conn, "finish_jobs", worker, [job], result and [Jsonb(result)], None, None)
        assert (row["job_id"], row["outcome"]) == (job, "completed")
    return int(job)


def kept_for(conn: Conn, job: int) -> str | None:
    found = values(conn, "select (keep_until - finished_at)::text from pgworker.finished where id = %s", job)
    return found[0] if found else None


@WAYS
def test_what_is_kept_unless_somebody_says_otherwise(tx: Conn, how: str) -> None:
    assert kept_for(tx, complete(tx, how)) is None
    assert kept_for(tx, complete(tx, how, {"done": 1})) == "1 day"
    failed, cancelled = add(tx, "f")["id"], add(tx, "c")["id"]
    bring(tx, failed, "failed")
    bring(tx, cancelled, "cancelled")
    assert [kept_for(tx, job) for job in (failed, cancelled)] == ["30 days", "30 days"]
    by_hand = add(tx)["id"]
    call(tx, "complete_jobs", [by_hand])
    assert kept_for(tx, by_hand) == "1 day"


@WAYS
def test_the_installation_keeps_completed_jobs_and_those_with_results_at_least_as_long(tx: Conn, how: str) -> None:
    configure(tx, "keep_completed", "1 hour")
    assert kept_for(tx, complete(tx, how)) == "01:00:00"
    assert kept_for(tx, complete(tx, how, {"done": 1})) == "1 day"
    configure(tx, "keep_completed", "1 week")
    assert kept_for(tx, complete(tx, how, {"done": 1})) == "7 days"
    configure(tx, "keep_completed", None)
    configure(tx, "keep_results", "0")
    assert kept_for(tx, complete(tx, how, {"done": 1})) is None


def test_failed_jobs_are_kept_as_long_as_the_installation_says(tx: Conn) -> None:
    configure(tx, "keep_failed", "2 hours")
    job = add(tx)["id"]
    bring(tx, job, "failed")
    assert kept_for(tx, job) == "02:00:00"
    configure(tx, "keep_failed", "0")
    job = add(tx)["id"]
    bring(tx, job, "failed")
    assert kept_for(tx, job) == "00:00:00"
    call(tx, "maintain")
    assert (job_row(tx, job), contents(tx)["attempt"][1:]) == (None, [])


def test_whoever_ends_a_job_gets_it_back_though_nothing_is_kept(tx: Conn) -> None:
    of_task(tx, "a", keep_completed="0", keep_failed="0")
    worker = register(tx)
    by_hand = (("complete_jobs", "completed"), ("permanently_fail_jobs", "failed"), ("cancel_jobs", "cancelled"))
    for function, ends in by_hand:
        job = add(tx)["id"]
        assert [(one["id"], one["state"]) for one in call(tx, function, [job])] == [(job, ends)]
    for function, arguments, ends in (("fail_job", ["broke"], "failed"), ("cancel_job", [], "cancelled")):
        job = add(tx, max_attempts=1)["id"]
        assert claim_ids(tx, worker) == [job]
        assert [(one["id"], one["state"]) for one in call(tx, function, worker, job, *arguments)] == [(job, ends)]
    job = add(tx, max_attempts=1)["id"]
    assert claim_ids(tx, worker) == [job]
    assert [(one["id"], one["state"]) for one in call(tx, "force_unlock_workers", [worker])] == [(job, "failed")]
    call(tx, "maintain")
    assert (rows(tx, "select id from pgworker.jobs"), contents(tx)["attempt"]) == ([], [])


def test_nobody_ends_what_somebody_holds_however_long_it_is_kept(tx: Conn) -> None:
    configure(tx, "keep_completed", "1 day")
    worker, job = register(tx), add(tx)["id"]
    assert claim_ids(tx, worker) == [job]
    for other in (None, worker + 1):
        assert [one["outcome"] for one in call(tx, "finish_jobs", other, [job], None, None, None)] == ["lost"]
    assert state(tx, job) == "running"


@WAYS
def test_a_task_has_its_own_word_and_leaves_others_theirs(tx: Conn, how: str) -> None:
    of_task(tx, "kept", keep_completed="3 hours", keep_failed="1 minute")
    of_task(tx, "gone", keep_completed="0", keep_failed="0")
    assert kept_for(tx, complete(tx, how, identifier="kept")) == "03:00:00"
    assert kept_for(tx, complete(tx, how, {"done": 1}, identifier="kept")) == "03:00:00"
    assert kept_for(tx, complete(tx, how, {"done": 1}, identifier="gone")) is None
    assert kept_for(tx, complete(tx, how, identifier="other")) is None
    configure(tx, "keep_completed", "1 hour")
    assert kept_for(tx, complete(tx, how, identifier="gone")) is None
    assert kept_for(tx, complete(tx, how, identifier="other")) == "01:00:00"
    for task, length in (("kept", "00:01:00"), ("gone", "00:00:00"), ("other", "30 days")):
        job = add(tx, task)["id"]
        bring(tx, job, "failed")
        assert kept_for(tx, job) == length
    by_hand = [add(tx, task)["id"] for task in ("kept", "gone")]
    call(tx, "complete_jobs", by_hand)
    assert [kept_for(tx, job) for job in by_hand] == ["03:00:00", "00:00:00"]


def test_a_failed_job_that_is_completed_by_hand_is_kept_like_a_completed_one(tx: Conn) -> None:
    of_task(tx, "t", keep_completed="3 hours")
    for task, length in (("t", "03:00:00"), ("other", "1 day")):
        job = add(tx, task)["id"]
        bring(tx, job, "failed")
        call(tx, "complete_jobs", [job])
        assert kept_for(tx, job) == length


def test_what_is_over_goes_in_small_batches_and_maintain_wants_to_come_again(db: Conn) -> None:
    ids = values(db, "select id from pgworker.add_jobs((select jsonb_agg(%s::jsonb) from generate_series(1, 2500)))",
                 '{"identifier": "t"}')  # fmt: skip
    call(db, "permanently_fail_jobs", ids)
    move_clock(db, value(db, "select (now() + interval '31 days')::text"))
    left, again = [], []
    for _ in range(4):
        again.append(value(db, "select pgworker.maintain() < '100 milliseconds'"))
        left.append(value(db, "select count(*) from pgworker.jobs"))
    assert (left, again) == ([1500, 500, 0, 0], [True, True, False, False])


def test_a_batch_is_ended_the_same_whether_it_is_kept_or_not(db: Conn) -> None:
    def outcomes() -> list[tuple[int, str]]:
        worker, other = register(db), register(db)
        ids = [add(db, queue_name="q" if n == 0 else None)["id"] for n in range(5)]
        assert claim_ids(db, worker, 4) == ids[:4]
        assert claim_ids(db, other, 1) == ids[4:]
        call(db, "cancel_jobs", [ids[1]])
        held = [ids[3], ids[0], ids[4], ids[1], ids[0]]
        ended = call(db, "finish_jobs", worker, held, None, [ids[2]], ["broke"], attempts=[9, 1, 1, 1, 1, 1])
        call(db, "finish_jobs", worker, ids, None, None, None)
        call(db, "finish_jobs", other, ids, None, None, None)
        assert values(db, "select job_id from pgworker.queue") == [None]
        return [(ids.index(row["job_id"]), row["outcome"]) for row in ended]

    plain = outcomes()
    assert plain == [(3, "lost"), (0, "completed"), (4, "lost"), (1, "cancelled"), (2, "scheduled")]
    configure(db, "keep_completed", "1 day")
    assert outcomes() == plain


@pytest.mark.parametrize("keep", ["0", "1 hour"])
def test_no_node_of_a_live_tree_is_ever_pruned_and_then_the_tree_goes_as_a_whole(tx: Conn, keep: str) -> None:
    move_clock(tx, "2030-01-01 12:00:00+00")
    for name in ("keep_completed", "keep_results", "keep_failed"):
        configure(tx, name, keep)
    worker = register(tx)
    root = call(tx, "add_job_tree", Jsonb({"identifier": "p", "children": [
        {"identifier": "c", "on_failure": "ignore"}, {"identifier": "d"}]}))[0]["id"]  # fmt: skip
    done, failed = claim_ids(tx, worker, 2)
    call(tx, "finish_jobs", worker, [failed], None, None, None)
    call(tx, "fail_job", worker, done, "broke", permanent=True)
    move_clock(tx, "2031-01-01 12:00:00+00")
    for _ in range(3):
        call(tx, "maintain")
    assert [state(tx, job) for job in (root, done, failed)] == ["ready", "failed", "completed"]
    assert claim_ids(tx, worker) == [root]
    assert value(tx, "select count(*) from pgworker.children(%s)", root) == 2
    value(tx, "select pgworker.complete_job(%s, %s)", worker, root)
    move_clock(tx, "2031-01-01 13:00:01+00")
    for _ in range(3):
        call(tx, "maintain")
    assert [job_row(tx, job) for job in (root, done, failed)] == [None, None, None]
    assert contents(tx)["attempt"] == []


def test_the_view_shows_every_setting_and_what_was_made_of_it(tx: Conn) -> None:
    configure(tx, "keep_failed", "1 week")
    configure(tx, "history", "off")
    configure(tx, "history", None)
    configure(tx, "publish_events", "on")
    assert value(tx, "select count(*) from pg_trigger where tgname = 'publish_added'") == 1
    configure(tx, "publish_events", None)
    assert value(tx, "select count(*) from pg_trigger where tgname = 'publish_added'") == 0
    shown = {row["name"]: (row["value"], row["default_value"]) for row in rows(tx, "select * from pgworker.settings")}
    assert shown.pop("allow_fake_now")[1] == "off"
    assert shown == {
        "rescue_grace": ("5 seconds", "5 seconds"), "timeout_grace": ("10 seconds", "10 seconds"),
        "keep_completed": ("0", "0"), "keep_results": ("1 day", "1 day"), "keep_failed": ("1 week", "30 days"),
        "history": ("on", "on"), "publish_events": ("off", "off"),
    }  # fmt: skip
    assert all(values(tx, "select meaning > '' from pgworker.settings"))


@pytest.mark.parametrize(
    ("name", "to", "sqlstate", "says", "hint"),
    [
        (None, "1", "22004", "name must not be null", "rescue_grace"),
        ("keep_all", "1 day", "22023", "there is no setting 'keep_all'", "keep_completed"),
        ("keep_failed", "soon", "22023", "an interval from 0 to 1000 years, got 'soon'", "default is 30 days"),
        ("keep_failed", "-1 day", "22023", "an interval from 0 to 1000 years, got '-1 day'", "null goes back"),
        ("keep_failed", "1001 years", "22023", "got '1001 years'", "default is 30 days"),
        ("history", "maybe", "22023", "must be on or off, got 'maybe'", "default is on"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(
    tx: Conn, name: str | None, to: str, sqlstate: str, says: str, hint: str
) -> None:
    with refused(tx, sqlstate, says, hint=hint):
        configure(tx, name, to)
