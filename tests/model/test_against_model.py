"""pgworker does, call by call, what a model of a hundred lines does: the same claims in the same order, the same rows.

PGWORKER_MODEL_EXAMPLES sets how many random histories are tried; without it a few, always the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from psycopg.types.json import Jsonb

from tests.clock import move_clock
from tests.connections import Connections
from tests.cursors import sweeps_cost
from tests.histories import EXAMPLES, histories, patience
from tests.invariants import violations
from tests.model.queue_model import DEBOUNCE_MAX, Job, Model, Payload

Conn = psycopg.Connection[Any]

_SECOND = 1_000_000
_LIVE = """
select id, task_identifier, payload, (extract(epoch from run_at - %(start)s::timestamptz) * 1000000)::bigint,
       queue_name, max_attempts, key, priority, coalesce(flags, '{}'), attempts, revision, locked_by,
       exists (select from pgworker.job j where j.id = v.id and j.cancel_reason is not null)
from pgworker.jobs v where finished_at is null order by id
"""
_START = datetime(2031, 5, 17, 10, tzinfo=UTC)

tasks = st.sampled_from(["a", "b"])
queues = st.sampled_from([None, None, "p", "q"])
keys = st.sampled_from([None, None, "k", "l"])
modes = st.sampled_from(["replace", "preserve_run_at", "unsafe_dedupe", "debounce"])
flags = st.sampled_from([(), (), ("x",), ("x", "y")])
payloads = st.one_of(st.lists(st.integers(0, 9), max_size=2), st.dictionaries(st.just("n"), st.integers(0, 9)))
priorities = st.sampled_from([0, 0, 0, -1, 1])
delays = st.sampled_from([None, None, None, -3600, -2, 1, 5])  # seconds from now
picks = st.integers(0, 1_000)
several = st.lists(picks, min_size=1, max_size=4)
added = {
    "task": tasks, "queue": queues, "key": keys, "mode": modes, "flags": flags, "payload": payloads,
    "priority": priorities, "delay": delays, "most": st.sampled_from([25, 25, 2, 1]),
}  # fmt: skip


class Queue(RuleBasedStateMachine):
    """pgworker and its model side by side, with so many workers, each in a session of its own."""

    def __init__(self, connections: list[Conn]) -> None:
        super().__init__()
        self.connections = connections
        self.model = Model()
        self.workers: list[int] = []
        self.turn = 0
        self.claims = 0

    @initialize(specs=st.lists(st.fixed_dictionaries(added), min_size=4, max_size=12))
    def begin(self, specs: list[dict[str, Any]]) -> None:
        self.connections[0].execute(
            "truncate pgworker.job, pgworker.finished, pgworker.queue, pgworker.task, pgworker.worker, pgworker.notice"
        )
        for conn in self.connections:
            conn.execute("select set_config('pgworker.cursor', '', false)")
            move_clock(conn, self._time(0))
            self.workers.append(conn.execute("select pgworker.register_worker()").fetchone()[0])  # type: ignore[index]
        self._add(specs)

    def teardown(self) -> None:
        assert violations(self.connections[0]) == []
        for conn in self.connections:
            conn.execute("select pg_advisory_unlock_all()")

    def call(self, query: str, *parameters: Any, by: int | None = None) -> list[tuple[Any, ...]]:
        """Run a query a millisecond later than the last, as sessions by turns unless one is named."""
        self.turn += 1
        self.model.now += 1_000
        conn = self.connections[self.turn % len(self.connections) if by is None else by]
        for each in self.connections:
            each.execute("select set_config('pgworker.fake_now', %s, false)", [self._time(self.model.now)])
        cursor = conn.execute(query.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    @staticmethod
    def _time(at: int) -> str:
        return str(_START + timedelta(microseconds=at))

    def _at(self, delay: int | None, now: int) -> str | None:
        return None if delay is None else self._time(now + delay * _SECOND)

    def _pending(self, chosen: list[int]) -> list[int]:
        return self._of(sorted(self.model.live), chosen)

    @staticmethod
    def _of(ids: list[int], chosen: list[int]) -> list[int]:
        return sorted({ids[n % len(ids)] for n in chosen}) if ids else []

    def _held(self, worker: int, chosen: list[int]) -> list[int]:
        return self._of(sorted(id for id, job in self.model.live.items() if job.holder == self.workers[worker]), chosen)

    @staticmethod
    def _bound(spec: dict[str, Any]) -> str | None:
        return f"{DEBOUNCE_MAX} microseconds" if spec["mode"] == "debounce" else None

    def _added(self, id: int, spec: dict[str, Any]) -> int:
        now, delay = self.model.now, spec["delay"]
        payload: Payload = spec["payload"]
        job = Job(id, spec["task"], payload, now if delay is None else now + delay * _SECOND, spec["queue"],
                  spec["most"], spec["key"], spec["priority"], spec["flags"], created_at=now)  # fmt: skip
        return self.model.add(job, spec["mode"], run_at_given=delay is not None)

    @rule(spec=st.fixed_dictionaries(added))
    def add_job(self, spec: dict[str, Any]) -> None:
        ((id,),) = self.call(
            "select id from pgworker.add_job(%s, %s, %s, %s, %s, %s, %s, %s, %s, debounce_max => %s)",
            *(spec["task"], Jsonb(spec["payload"]), spec["queue"], self._at(spec["delay"], self.model.now + 1_000)),
            *(spec["most"], spec["key"], spec["priority"], list(spec["flags"]), spec["mode"], self._bound(spec)),
        )
        assert self._added(id, spec) == id

    @rule(specs=st.lists(st.fixed_dictionaries(added), min_size=3, max_size=8))
    def add_jobs(self, specs: list[dict[str, Any]]) -> None:
        self._add(specs)

    def _add(self, specs: list[dict[str, Any]]) -> None:
        asked = [
            {
                "identifier": spec["task"], "payload": spec["payload"], "queue_name": spec["queue"],
                "run_at": self._at(spec["delay"], self.model.now + 1_000), "max_attempts": spec["most"],
                "job_key": spec["key"], "priority": spec["priority"], "flags": spec["flags"],
                "job_key_mode": spec["mode"], "debounce_max": self._bound(spec),
            }
            for spec in specs
        ]  # fmt: skip
        got = self.call("select id from pgworker.add_jobs(%s)", Jsonb(asked))
        assert [self._added(id, spec) for (id,), spec in zip(got, specs, strict=True)] == [id for (id,) in got]

    @rule(worker=picks, most=st.sampled_from([1, 1, 2, 5]))
    def get_jobs(self, worker: int, most: int) -> None:
        self._claim(worker, most, None, [])

    @rule(worker=picks, most=st.sampled_from([1, 3]))
    def get_more_jobs(self, worker: int, most: int) -> None:
        self._claim(worker, most, None, [])
        self._claim(worker, most, None, [])

    @rule(
        worker=picks,
        most=st.sampled_from([1, 3]),
        tasks=st.sampled_from([None, ["a"], ["b", "a"], []]),
        forbidden=st.sampled_from([[], ["x"], ["y", "z"]]),
    )
    def get_some_jobs(self, worker: int, most: int, tasks: list[str] | None, forbidden: list[str]) -> None:
        self._claim(worker, most, tasks, forbidden)

    def _claim(self, worker: int, most: int, tasks: list[str] | None, forbidden: list[str]) -> None:
        worker %= len(self.workers)
        # Every other claim is to be right by the cursor, not by luck, as it was time for a sweep: there was one just
        # now. What remains are sweeps that somebody asked for, by the epoch, and those of a claim that found nothing.
        self.claims += 1
        sweeps_cost(self.connections[worker], 1000 * (self.claims % 2))
        got = self.call(
            "select id from pgworker.get_jobs(%s, %s, %s, %s)", self.workers[worker], most, tasks, forbidden, by=worker
        )
        assert [id for (id,) in got] == self.model.claim(self.workers[worker], most, tasks, forbidden)

    @rule(worker=picks, which=picks)
    def complete_job(self, worker: int, which: int) -> None:
        worker %= len(self.workers)
        for id in self._held(worker, [which]):
            self.call("select pgworker.complete_job(%s, %s)", self.workers[worker], id)
            self.model.end(id, "completed", kept=False)

    @rule(worker=picks, which=picks, delay=delays, permanent=st.sampled_from([False, False, True]))
    def fail_job(self, worker: int, which: int, delay: int | None, permanent: bool) -> None:
        worker %= len(self.workers)
        for id in self._held(worker, [which]):
            retry_at = None if delay is None else self.model.now + 1_000 + delay * _SECOND
            asked = self._at(delay, self.model.now + 1_000)
            self.call("select pgworker.fail_job(%s, %s, 'e', %s, %s)", self.workers[worker], id, asked, permanent)
            self.model.fail(id, retry_at, permanent=permanent)

    @rule(worker=picks, first=several, second=several)
    def finish_jobs(self, worker: int, first: list[int], second: list[int]) -> None:
        worker %= len(self.workers)
        completed = self._held(worker, first)
        failed = [id for id in self._held(worker, second) if id not in completed]
        self.call("select pgworker.finish_jobs(%s, %s, null, %s, null)", self.workers[worker], completed, failed)
        for id in completed:
            self.model.end(id, "completed", kept=False)
        for id in failed:
            self.model.fail(id, None, permanent=False)

    @rule(worker=picks, which=several)
    def release_jobs(self, worker: int, which: list[int]) -> None:
        worker %= len(self.workers)
        held = self._held(worker, which)
        self.call("select pgworker.release_jobs(%s, %s)", self.workers[worker], held)
        for id in held:
            self.model.release(id)

    @rule(key=st.sampled_from(["k", "l"]))
    def remove_job(self, key: str) -> None:
        self.call("select pgworker.remove_job(%s)", key)
        for id in [id for id, job in self.model.live.items() if job.key == key]:
            job = self.model.live[id]
            if job.holder is None:
                del self.model.live[id]
            else:
                job.key, job.max_attempts = None, job.attempts

    @rule(which=several)
    def cancel_jobs(self, which: list[int]) -> None:
        ids = self._pending(which)
        self.call("select pgworker.cancel_jobs(%s)", ids)
        for id in ids:
            if self.model.live[id].holder is None:
                self.model.end(id, "cancelled")
            else:
                self.model.live[id].stopping = True

    @rule(which=several)
    def retry_jobs(self, which: list[int]) -> None:
        ids = self._of(sorted(self.model.ended), which)
        self.call("select pgworker.retry_jobs(%s)", ids)
        self.model.revive(ids, ["failed", "cancelled"], self.model.now, None, 0)

    @rule(
        which=several,
        delay=delays,
        priority=st.sampled_from([None, None, -1, 1]),
        attempts=st.sampled_from([None, None, 0]),
    )
    def reschedule_jobs(self, which: list[int], delay: int | None, priority: int | None, attempts: int | None) -> None:
        ids = self._of(sorted([*self.model.live, *self.model.ended]), which)
        run_at = None if delay is None else self.model.now + 1_000 + delay * _SECOND
        asked = self._at(delay, self.model.now + 1_000)
        self.call("select pgworker.reschedule_jobs(%s, %s, %s, %s)", ids, asked, priority, attempts)
        for id in ids:
            job = self.model.live.get(id)
            if job and job.holder is None:
                job.run_at = job.run_at if run_at is None else run_at
                job.priority = job.priority if priority is None else priority
                job.attempts = job.attempts if attempts is None else attempts
        self.model.revive(ids, ["failed"], run_at, priority, attempts)

    @rule(what=st.sampled_from([("queue", "p"), ("task", "a")]), paused=st.sampled_from([False, False, True]))
    def pause_or_resume(self, what: tuple[str, str], paused: bool) -> None:
        self.call(f"select pgworker.{'pause' if paused else 'resume'}_{what[0]}(%s)", what[1])
        self.model.paused = self.model.paused | {what} if paused else self.model.paused - {what}

    @rule(seconds=st.sampled_from([1, 2, 10, 100_000]))
    def time_passes(self, seconds: int) -> None:
        self.model.now += seconds * _SECOND

    @invariant()
    def rows_are_the_models(self) -> None:
        if not self.workers:
            return
        rows = self.connections[0].execute(_LIVE, {"start": _START}).fetchall()
        expected = [
            (job.id, job.task, job.payload, job.run_at, job.queue, job.max_attempts, job.key, job.priority,
             list(job.flags), job.attempts, job.revision, job.holder, job.stopping)
            for _, job in sorted(self.model.live.items())
        ]  # fmt: skip
        assert rows == expected
        ended = self.connections[0].execute("select id, state from pgworker.finished").fetchall()
        assert dict(ended) == {id: state for id, (state, _) in self.model.ended.items()}


@pytest.mark.parametrize("workers", [1, 2])
@patience(300)
def test_no_history_of_calls_makes_it_differ_from_the_model(connect: Connections, workers: int) -> None:
    connections = [connect() for _ in range(workers)]
    phases = [Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate]
    profile = histories(20, stateful_step_count=50, phases=phases)
    make: Callable[[], RuleBasedStateMachine] = lambda: Queue(connections)  # noqa: E731
    run_state_machine_as_test(make, settings=profile)  # type: ignore[arg-type]
