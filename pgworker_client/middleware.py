"""Middleware: functions of the application around every handler of a worker, the first registered outermost."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from pgworker_client.context import Context

#: Goes on to the next middleware, at last to the handler; gives what that returned.
CallNext = Callable[[], Awaitable[Any]]
Middleware = Callable[[Context, CallNext], Awaitable[Any]]
M = TypeVar("M", bound=Middleware)

#: A run with everything around it: the context, and the call of the handler.
Around = Callable[[Context, CallNext], Awaitable[Any]]


def check_middleware(middleware: Any) -> None:
    """TypeError unless it is an async function of (ctx, call_next)."""
    called = middleware if inspect.isroutine(middleware) else getattr(middleware, "__call__", middleware)  # noqa: B004
    if not inspect.iscoroutinefunction(called):
        raise TypeError(f"middleware must be an async function of (ctx, call_next), not {middleware!r}")
    try:
        inspect.signature(middleware).bind(None, None)
    except TypeError as exc:
        raise TypeError(f"middleware must take (ctx, call_next): {exc}") from None


def compose(middleware: Sequence[Middleware]) -> Around | None:
    """All of them as one, the first outermost; None if there is none."""
    around: Around | None = None
    for one in reversed(middleware):
        around = one if around is None else _outside(one, around)
    return around


def _outside(outer: Middleware, inner: Around) -> Around:
    def call(ctx: Context, call_next: CallNext) -> Awaitable[Any]:
        return outer(ctx, partial(inner, ctx, call_next))

    return call
