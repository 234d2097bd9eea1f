"""Typed payloads: the annotation of a handler's first parameter says what its payload must be, and what it gets.

An annotation that holds a dataclass, a pydantic model or a msgspec Struct (by itself, in ``list[…]``, ``… | None`` and
the like) makes a converter; any other annotation means nothing here. pydantic and msgspec convert what is theirs,
whole. Neither is imported: whoever annotates with one of their types has imported it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

from pgworker_client.job import encode
from pgworker_client.outcome import Fail
from pgworker_client.shapes import Misfit, shape

Convert = Callable[[Any], Any]


def typed(handler: Callable[[Any, Any], Any], *, is_async: bool) -> Callable[[Any, Any], Any]:
    """The handler, made to get what its annotation says; itself if that says nothing.

    A payload that does not fit raises `Fail` with the validator's message, before the handler is called. TypeError for
    an annotation that cannot work.
    """
    annotation = _annotation(handler)
    convert = converter(annotation)
    if convert is None:
        return handler
    name = _name(annotation)

    def fit(payload: Any) -> Any:
        try:
            return convert(payload)
        except Misfit as exc:
            raise Fail(f"the payload does not fit {name}: {exc}") from None

    if is_async:

        @functools.wraps(handler)
        async def call_async(payload: Any, ctx: Any) -> Any:
            return await handler(fit(payload), ctx)

        return call_async

    @functools.wraps(handler)
    def call(payload: Any, ctx: Any) -> Any:
        return handler(fit(payload), ctx)

    return call


def converter(annotation: Any) -> Convert | None:
    """What makes the annotated value of a decoded JSON value, or raises `Misfit`; None if there is nothing to make.

    TypeError for what cannot be made.
    """
    libraries = {library for part in _parts(annotation) if (library := _library(part)) is not None}
    if len(libraries) > 1:
        raise TypeError(f"{_name(annotation)} mixes types of {' and '.join(sorted(libraries))}; use those of one")
    if "pydantic" in libraries:
        return _with_pydantic(annotation)
    if "msgspec" in libraries:
        return _with_msgspec(annotation)
    return shape(annotation, _foreign) if libraries else None


def _foreign(annotation: Any) -> Convert | None:
    """What converts a field of a dataclass, if that is of pydantic or msgspec."""
    library = _library(annotation)
    return None if library in (None, "dataclasses") else converter(annotation)


def _with_pydantic(annotation: Any) -> Convert:
    pydantic: Any = sys.modules["pydantic"]
    if not hasattr(pydantic, "TypeAdapter"):
        raise TypeError(f"{_name(annotation)}: pydantic {pydantic.VERSION} is too old, version 2 is needed")
    try:
        # As JSON, not as Python: strict models take their dates and tuples from it.
        validate = pydantic.TypeAdapter(annotation).validate_json
        with contextlib.suppress(pydantic.ValidationError):
            validate("null")  # whether its annotations can be looked up shows only now
    except (pydantic.errors.PydanticUserError, NameError) as exc:
        raise TypeError(f"{_name(annotation)}: {exc}") from exc

    def convert(value: Any) -> Any:
        try:
            return validate(encode(value))
        except pydantic.ValidationError as exc:
            raise Misfit(str(exc)) from None

    return convert


def _with_msgspec(annotation: Any) -> Convert:
    msgspec: Any = sys.modules["msgspec"]
    try:
        msgspec.json.Decoder(annotation)
    except (TypeError, NameError) as exc:
        raise TypeError(f"{_name(annotation)}: {exc}") from exc

    def convert(value: Any) -> Any:
        try:
            return msgspec.convert(value, annotation)
        except msgspec.ValidationError as exc:
            raise Misfit(str(exc)) from None

    return convert


def _library(part: Any) -> str | None:
    """Whose type it is; None for one that none of the three validates."""
    if not isinstance(part, type):
        return None
    pydantic, msgspec = sys.modules.get("pydantic"), sys.modules.get("msgspec")
    if pydantic is not None and (issubclass(part, pydantic.BaseModel) or hasattr(part, "__pydantic_validator__")):
        return "pydantic"
    if msgspec is not None and issubclass(part, msgspec.Struct):
        return "msgspec"
    return "dataclasses" if dataclasses.is_dataclass(part) else None


def _parts(annotation: Any) -> typing.Iterator[Any]:
    """The annotation and everything in its brackets."""
    yield annotation
    if typing.get_origin(annotation) is not None:
        yield typing.get_origin(annotation)
    if typing.get_origin(annotation) is not typing.Literal:
        for part in typing.get_args(annotation):
            yield from _parts(part)


def _annotation(handler: Callable[[Any, Any], Any]) -> Any:
    """The annotation of the handler's payload, None where there is none; text is looked up in the handler's module."""
    try:
        parameter = next(iter(inspect.signature(handler).parameters.values()), None)
    except ValueError:  # a builtin
        return None
    if parameter is None or parameter.annotation is parameter.empty or parameter.kind is parameter.VAR_POSITIONAL:
        return None
    holder = types.SimpleNamespace(__annotations__={"payload": parameter.annotation})
    try:
        # This one alone: what the context is annotated with may be there for type checkers only.
        return typing.get_type_hints(holder, _globals(handler), include_extras=True)["payload"]
    except NameError as exc:
        raise TypeError(
            f"the annotation {parameter.annotation!r} of its payload cannot be looked up: {exc}; import the type, and "
            "define it in the module rather than in a function"
        ) from None


def _globals(handler: Any) -> dict[str, Any]:
    while isinstance(handler, functools.partial):
        handler = handler.func
    handler = inspect.unwrap(handler)
    if not inspect.isroutine(handler) and not isinstance(handler, type):
        handler = type(handler).__call__  # an object that is called
    return getattr(handler, "__globals__", {})


def _name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)
