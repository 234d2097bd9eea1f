"""What pgworker promises, in as few lines as it takes: lists, sorting, and no database."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

Payload = list[int] | dict[str, int]


@dataclass
class Job:
    """Times are microseconds since the beginning of the test."""

    id: int
    task: str
    payload: Payload
    run_at: int
    queue: str | None = None
    max_attempts: int = 25
    key: str | None = None
    priority: int = 0
    flags: tuple[str, ...] = ()
    attempts: int = 0
    revision: int = 0
    holder: int | None = None
    stopping: bool = False
    created_at: int = 0


DEBOUNCE_MAX = 3_000_000  # microseconds


@dataclass
class Model:
    now: int = 0
    live: dict[int, Job] = field(default_factory=dict)
    ended: dict[int, tuple[str, Job]] = field(default_factory=dict)
    paused: set[tuple[str, str | None]] = field(default_factory=set)

    def add(self, new: Job, mode: str, *, run_at_given: bool) -> int:
        old = next((job for job in self.live.values() if new.key and job.key == new.key), None)
        if old and mode == "unsafe_dedupe":
            old.revision += 1
            return old.id
        if mode == "debounce":
            new.run_at = min(new.run_at if run_at_given else self.now, self.now + DEBOUNCE_MAX)
        if old and old.holder is None:
            both = isinstance(old.payload, list) and isinstance(new.payload, list)
            payload = old.payload + new.payload if both else new.payload  # type: ignore[operator]
            stays = mode == "preserve_run_at" and old.attempts == 0
            run_at = old.run_at if stays else new.run_at if run_at_given else self.now
            if mode == "debounce" and old.attempts == 0:
                run_at = min(run_at, old.created_at + DEBOUNCE_MAX)
            self.live[old.id] = replace(
                new, id=old.id, payload=payload, run_at=run_at, revision=old.revision + 1, created_at=old.created_at
            )
            return old.id
        if old:
            old.key, old.max_attempts = None, old.attempts
        self.live[new.id] = new
        return new.id

    def claim(self, worker: int, most: int, tasks: list[str] | None, forbidden: list[str]) -> list[int]:
        busy = {job.queue for job in self.live.values() if job.holder is not None and job.queue}
        claimed: list[int] = []
        for job in sorted(self.live.values(), key=lambda job: (job.priority, job.run_at, job.id)):
            passed_over = job.queue in busy or {("queue", job.queue), ("task", job.task)} & self.paused
            unwanted = (tasks is not None and job.task not in tasks) or set(job.flags) & set(forbidden)
            if (
                len(claimed) < most
                and job.holder is None
                and job.run_at <= self.now
                and not passed_over
                and not unwanted
            ):
                job.holder, job.attempts = worker, job.attempts + 1
                claimed.append(job.id)
                busy |= {job.queue} if job.queue else set()
        return claimed

    def end(self, id: int, state: str, *, kept: bool = True) -> None:
        job = self.live.pop(id)
        if kept or job.stopping:
            self.ended[id] = ("cancelled" if job.stopping else state, replace(job, holder=None, stopping=False))

    def fail(self, id: int, retry_at: int | None, *, permanent: bool) -> None:
        job = self.live[id]
        if permanent or job.stopping or job.attempts >= job.max_attempts:
            return self.end(id, "failed")
        pause = round(math.exp(min(job.attempts, 10)) * 1_000_000)
        job.holder, job.run_at = None, max(self.now, job.run_at) + pause if retry_at is None else retry_at
        return None

    def release(self, id: int) -> None:
        if self.live[id].stopping:
            return self.end(id, "cancelled")
        self.live[id].holder, self.live[id].attempts = None, self.live[id].attempts - 1
        return None

    def revive(
        self, ids: list[int], states: list[str], run_at: int | None, priority: int | None, attempts: int | None
    ) -> None:
        for id in sorted(set(ids) & self.ended.keys()):
            state, job = self.ended[id]
            tries = job.attempts if attempts is None else attempts
            if state in states and tries < job.max_attempts:
                del self.ended[id]
                key = None if job.key in {other.key for other in self.live.values()} else job.key
                level = job.priority if priority is None else priority
                at = job.run_at if run_at is None else run_at
                self.live[id] = replace(job, run_at=at, priority=level, attempts=tries, key=key)
