"""Tasks: the handlers that a worker knows, by the identifier that jobs carry."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal, TypeVar, overload

from pgworker_client.importable import Place, check_found, place_of
from pgworker_client.payloads import typed
from pgworker_client.settings import seconds

Handler = Callable[[Any, Any], Any]
#: Where a plain handler runs: in a process of its own. Without it, in a thread.
Executor = Literal["process"]
H = TypeVar("H", bound=Handler)


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A handler, which takes the decoded payload, under its identifier; ``timeout`` in seconds, None for no limit."""

    identifier: str
    handler: Handler
    timeout: float | None
    is_async: bool
    #: Where a process that is to run it finds it; None: no process is.
    place: Place | None


def make_task(
    identifier: str,
    handler: Handler,
    timeout: float | timedelta | None = None,
    executor: Executor | None = None,
) -> Task:
    """The task of that name. TypeError or ValueError, naming it, when the handler or a setting is of no use."""
    if not identifier or not isinstance(identifier, str):
        raise TypeError(f"a task's identifier must be a text that is not empty, not {identifier!r}")
    if not callable(handler):
        raise TypeError(f"task {identifier!r}: the handler must be a function of (payload, ctx), not {handler!r}")
    if inspect.isasyncgenfunction(handler) or inspect.isgeneratorfunction(handler):
        raise TypeError(f"task {identifier!r}: the handler has a yield in it; a handler returns its result")
    try:
        inspect.signature(handler).bind(None, None)
    except TypeError as exc:
        raise TypeError(f"task {identifier!r}: the handler must take (payload, ctx): {exc}") from None
    except ValueError:  # builtins without a signature; the call will tell
        pass
    limit = None if timeout is None else seconds(f"timeout of task {identifier!r}", timeout, least=0.001)
    is_async = _is_async(handler)
    if executor not in (None, "process"):
        raise ValueError(f"task {identifier!r}: executor must be 'process' or None, not {executor!r}")
    if executor is not None and is_async:
        raise TypeError(
            f"task {identifier!r}: an async handler runs in the worker's event loop; executor='process' is for plain "
            "functions"
        )
    try:
        place = None if executor is None else place_of(handler)
        fitted = typed(handler, is_async=is_async)
    except TypeError as exc:
        raise TypeError(f"task {identifier!r}: {exc}") from exc
    return Task(identifier, fitted, limit, is_async, place)


class Tasks:
    """The tasks of a worker, and the decorator that adds to them."""

    def __init__(self, handlers: Mapping[str, Handler] | None = None) -> None:
        self.by_name: dict[str, Task] = {}
        for identifier, handler in (handlers or {}).items():
            self.add(make_task(identifier, handler))

    def add(self, task: Task) -> None:
        """Add a task; ValueError if there is one of that name already."""
        known = self.by_name.get(task.identifier)
        if known is not None:
            raise ValueError(
                f"task {task.identifier!r} exists already ({_where(known.handler)}); give one of the two another name"
            )
        self.by_name[task.identifier] = task

    def check_places(self) -> None:
        """TypeError for a handler that a process would not find where it was defined. Once all modules are loaded."""
        for task in self.by_name.values():
            if task.place is not None:
                check_found(task.identifier, task.place, task.handler)

    @overload
    def task(self, handler: H, /) -> H: ...

    @overload
    def task(
        self,
        identifier: str | None = None,
        /,
        *,
        timeout: float | timedelta | None = None,
        executor: Executor | None = None,
    ) -> Callable[[H], H]: ...

    def task(
        self, given: Any = None, /, *, timeout: float | timedelta | None = None, executor: Executor | None = None
    ) -> Any:
        """Make a function the handler of a task: ``@task``, ``@task("name")``, ``@task("name", timeout=60)``."""
        if callable(given):
            self.add(make_task(_name(given), given))
            return given

        def decorate(handler: H) -> H:
            self.add(make_task(_name(handler) if given is None else given, handler, timeout, executor))
            return handler

        return decorate


def _is_async(handler: Handler) -> bool:
    """Whether calling it makes a coroutine: async functions, partials of them, objects with an async ``__call__``."""
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004


def _name(handler: Handler) -> str:
    name = getattr(handler, "__name__", "")
    if not name or name == "<lambda>":
        raise ValueError(f'{handler!r} has no name that could be the task\'s; write task("name")')
    return str(name)


def _where(handler: Handler) -> str:
    return f"{getattr(handler, '__module__', '?')}.{getattr(handler, '__qualname__', handler)}"
