"""Settings of tasks, kept in the database for all workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, TypedDict, Unpack

from pgworker_client.enqueue import span
from pgworker_client.job import to_json
from pgworker_client.on_connection import Request, on_connection


class TaskOptions(TypedDict, total=False):
    """The settings that `configure_task` changes; see the SQL function of that name."""

    max_attempts: int | None
    backoff: dict[str, Any] | Sequence[str | float] | None
    timeout: timedelta | None
    max_concurrency: int | None
    max_concurrency_per_key: int | None
    rate_limit: int | None
    rate_interval: timedelta | None
    rate_limit_per_key: int | None
    rate_interval_per_key: timedelta | None
    fair: bool | None
    keep_completed: timedelta | None
    keep_failed: timedelta | None
    paused: bool | None


@dataclasses.dataclass(frozen=True, slots=True)
class TaskRow:
    """A row of the view ``pgworker.tasks``; None is the default."""

    identifier: str
    paused: bool
    max_attempts: int | None
    backoff: dict[str, Any] | None
    timeout: timedelta | None
    max_concurrency: int | None
    max_concurrency_per_key: int | None
    rate_limit: int | None
    rate_interval: timedelta | None
    rate_limit_per_key: int | None
    rate_interval_per_key: timedelta | None
    fair: bool
    keep_completed: timedelta | None
    keep_failed: timedelta | None


_COLUMNS = ", ".join(field.name for field in dataclasses.fields(TaskRow))
_TYPES = {
    "max_attempts": "int", "backoff": "jsonb", "timeout": "interval", "max_concurrency": "int",
    "max_concurrency_per_key": "int", "rate_limit": "int", "rate_interval": "interval", "rate_limit_per_key": "int",
    "rate_interval_per_key": "interval", "fair": "boolean", "keep_completed": "interval", "keep_failed": "interval",
    "paused": "boolean",
}  # fmt: skip


@on_connection
def configure_task(
    identifier: str, *, reset: Iterable[str] | None = None, **settings: Unpack[TaskOptions]
) -> Request[TaskRow]:
    """Change settings of a task and return all of them.

    What is left out, or None, stays as it is; ``reset`` names settings that go back to their default (``"all"``: every
    one). TypeError for a setting that there is not, and for an interval that is no timedelta; the database refuses bad
    values with SQLSTATE 22023.
    """
    if unknown := settings.keys() - _TYPES.keys():
        raise TypeError(f"configure_task() has no setting {min(unknown)!r}; there are: {', '.join(_TYPES)}")
    params: dict[str, Any] = dict(settings)
    if params.get("backoff") is not None:
        params["backoff"] = to_json(f"backoff of task {identifier!r}", params["backoff"])
    for name in params:
        if _TYPES[name] == "interval":
            span(name, params[name])
    names = [reset] if isinstance(reset, str) else reset
    arguments = "".join(f", {name} => %s::{_TYPES[name]}" for name in params)
    return Request(
        f"select {_COLUMNS} from pgworker.configure_task(%s::text, reset => %s::text[]{arguments})",
        (identifier, None if names is None else list(names), *params.values()),
        _one_task,
    )


def _one_task(rows: list[tuple[Any, ...]]) -> TaskRow:
    return TaskRow(*rows[0])
