"""Functions that run one statement on whatever psycopg connection or cursor the caller has, sync or async.

A function is written once, as what it asks of the database; `on_connection` makes of it one that takes a connection
first and returns the value, or for an async connection an awaitable of it. The caller's transaction is joined and never
ended, and a cursor of our own with rows as tuples leaves the caller's cursor and row factory alone.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast, overload

import psycopg
from psycopg.rows import tuple_row

SyncSource = psycopg.Connection[Any] | psycopg.Cursor[Any]
AsyncSource = psycopg.AsyncConnection[Any] | psycopg.AsyncCursor[Any]

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Request(Generic[R]):
    """A statement, its parameters, and how its rows become the value."""

    query: str
    params: tuple[Any, ...]
    read: Callable[[list[tuple[Any, ...]]], R]


class OnConnection(Protocol[P, R_co]):
    """What `on_connection` returns, as a type checker sees it."""

    __name__: str

    @overload
    def __call__(self, conn: SyncSource, /, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    @overload
    def __call__(self, conn: AsyncSource, /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[R_co]: ...


def on_connection(build: Callable[P, Request[R]]) -> OnConnection[P, R]:
    """The function that builds the request with ``build`` and runs it on the connection given first."""

    @functools.wraps(build)
    def run(conn: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        source = conn.connection if isinstance(conn, (psycopg.Cursor, psycopg.AsyncCursor)) else conn
        if isinstance(source, psycopg.AsyncConnection):
            return _run_async(source, build(*args, **kwargs))
        if isinstance(source, psycopg.Connection):
            return _run_sync(source, build(*args, **kwargs))
        raise TypeError(f"{build.__name__}: conn must be a psycopg connection or cursor, not {conn!r}")

    signature = inspect.signature(build)
    first = inspect.Parameter("conn", inspect.Parameter.POSITIONAL_ONLY, annotation="SyncSource | AsyncSource")
    cast(Any, run).__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])
    return cast("OnConnection[P, R]", run)


def _run_sync(conn: psycopg.Connection[Any], request: Request[R]) -> R:
    with psycopg.Cursor(conn, row_factory=tuple_row) as cur:
        return request.read(cur.execute(request.query, request.params).fetchall())


async def _run_async(conn: psycopg.AsyncConnection[Any], request: Request[R]) -> R:
    async with psycopg.AsyncCursor(conn, row_factory=tuple_row) as cur:
        await cur.execute(request.query, request.params)
        return request.read(await cur.fetchall())
