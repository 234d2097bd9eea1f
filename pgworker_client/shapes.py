"""Shapes: checks that make dataclasses of decoded JSON, and say of what does not fit where and why.

JSON's own types are taken strictly: no text for a number, no true for 1; an int where a float is wanted is made one.
Times and dates are ISO 8601, enumerations their values, UUIDs and decimals text.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

#: Makes a value of a decoded one; the text says where in the payload that was.
Check = Callable[[Any, str], Any]


class Misfit(Exception):
    """A value is not what it must be. Each of ``problems`` names the field."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def shape(annotation: Any, other: Callable[[Any], Callable[[Any], Any] | None]) -> Callable[[Any], Any]:
    """What makes the annotated value of a decoded JSON value, or raises `Misfit`.

    ``other`` makes converters of fields that are annotated with types of other libraries. TypeError, naming the field,
    for types that JSON has nothing for.
    """
    check = _Shapes(other).check(annotation)
    return lambda value: check(value, "")


class _Shapes:
    """Checks by type: a dataclass may have fields of its own type."""

    def __init__(self, other: Callable[[Any], Callable[[Any], Any] | None]) -> None:
        self._other = other
        self._dataclasses: dict[type, _Dataclass] = {}

    def check(self, wanted: Any) -> Check:
        origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
        if origin is typing.Annotated:
            return self.check(inner[0])
        if wanted in (Any, object):
            return lambda value, where: value
        if wanted in _PLAIN:
            return _PLAIN[wanted]
        if origin in (typing.Union, types.UnionType):
            return _union([self.check(one) for one in inner if one is not type(None)], type(None) in inner)
        if origin is typing.Literal:
            return _literal(inner)
        if origin in (list, Sequence):
            return _list(self.check(inner[0]))
        if origin in (dict, Mapping) and inner[0] is str:
            return _dict(self.check(inner[1]))
        if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
            return _made(wanted, wanted.__name__, lambda value: wanted(value))
        convert = self._other(wanted)
        if convert is not None:
            return _foreign(convert)
        if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
            return self._dataclass(wanted)
        raise TypeError(f"no JSON is made a {wanted!r}; pydantic and msgspec know more types")

    def _dataclass(self, wanted: type) -> Check:
        known = self._dataclasses.get(wanted)
        if known is None:
            known = self._dataclasses[wanted] = _Dataclass(wanted)
            known.learn(self)
        return known


class _Dataclass:
    def __init__(self, wanted: type) -> None:
        self._wanted = wanted
        self._fields: dict[str, Check] = {}
        self._needed: list[str] = []

    def learn(self, shapes: _Shapes) -> None:
        name = self._wanted.__name__
        try:
            hints = typing.get_type_hints(self._wanted, include_extras=True)
        except NameError as exc:
            raise TypeError(f"the annotations of {name} cannot be looked up: {exc}") from None
        if any(isinstance(hint, dataclasses.InitVar) for hint in hints.values()):
            raise TypeError(f"{name} has an InitVar, which no payload can give")
        for field in dataclasses.fields(self._wanted):
            if not field.init:
                continue
            try:
                self._fields[field.name] = shapes.check(hints[field.name])
            except TypeError as exc:
                raise TypeError(f"{name}.{field.name}: {exc}") from None
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                self._needed.append(field.name)

    def __call__(self, value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise _misfit(where, "an object", value)
        inside = f"{where}." if where else ""
        problems = [f"{inside}{name} is missing" for name in self._needed if name not in value]
        given = {}
        for name, one in value.items():
            check = self._fields.get(name)
            if check is None:
                problems.append(f"{inside}{name} is unknown")
                continue
            try:
                given[name] = check(one, inside + name)
            except Misfit as misfit:
                problems += misfit.problems
        if problems:
            raise Misfit(*problems)
        try:
            return self._wanted(**given)
        except (TypeError, ValueError) as exc:  # its __post_init__ says no
            raise Misfit(f"{where}: {exc}" if where else str(exc)) from exc


def _misfit(where: str, wanted: str, value: Any) -> Misfit:
    got = {dict: "an object", list: "an array", type(None): "null"}.get(type(value)) or repr(value)
    got = got if len(got) <= 100 else got[:100] + "…"
    return Misfit(f"{where or 'the payload'} must be {wanted}, not {got}")


def _of_type(wanted: type | tuple[type, ...], name: str) -> Check:
    def check(value: Any, where: str) -> Any:
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise _misfit(where, name, value)
        return value

    return check


def _float(value: Any, where: str) -> float:
    number = _of_type((int, float), "a number")(value, where)
    try:
        return float(number)
    except OverflowError:
        raise _misfit(where, "a number that a float can hold", value) from None


def _made(source: Any, name: str, make: Callable[[Any], Any]) -> Check:
    """``make`` makes it of text, or of what an enumeration has for values."""

    def check(value: Any, where: str) -> Any:
        if isinstance(value, str) or isinstance(source, enum.EnumMeta):
            try:
                return make(value)
            except (ValueError, ArithmeticError):
                pass
        raise _misfit(where, name, value)

    return check


def _union(checks: list[Check], nullable: bool) -> Check:
    def check(value: Any, where: str) -> Any:
        if value is None and nullable:
            return None
        problems: list[str] = []
        for one in checks:
            try:
                return one(value, where)
            except Misfit as misfit:
                problems += misfit.problems
        raise Misfit(" or ".join(problems)) if len(checks) > 1 else Misfit(*problems)

    return check


def _literal(allowed: tuple[Any, ...]) -> Check:
    def check(value: Any, where: str) -> Any:
        for one in allowed:
            if type(one) is type(value) and one == value:
                return one
        raise _misfit(where, "one of " + ", ".join(map(repr, allowed)), value)

    return check


def _list(item: Check) -> Check:
    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise _misfit(where, "an array", value)
        return _each(((f"{where}[{index}]", one) for index, one in enumerate(value)), item)

    return check


def _dict(item: Check) -> Check:
    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _misfit(where, "an object", value)
        inside = f"{where}." if where else ""
        return dict(zip(value, _each(((inside + key, one) for key, one in value.items()), item), strict=True))

    return check


def _each(places: typing.Iterable[tuple[str, Any]], item: Check) -> list[Any]:
    made: list[Any] = []
    problems: list[str] = []
    for where, value in places:
        try:
            made.append(item(value, where))
        except Misfit as misfit:
            problems += misfit.problems
    if problems:
        raise Misfit(*problems)
    return made


def _foreign(convert: Callable[[Any], Any]) -> Check:
    def check(value: Any, where: str) -> Any:
        try:
            return convert(value)
        except Misfit as misfit:
            raise Misfit(f"{where}: {misfit}") from None

    return check


_PLAIN: dict[Any, Check] = {
    str: _of_type(str, "a text"),
    int: _of_type(int, "an integer"),
    float: _float,
    bool: _of_type(bool, "true or false"),
    type(None): _of_type(type(None), "null"),
    list: _of_type(list, "an array"),
    dict: _of_type(dict, "an object"),
    datetime: _made(datetime, "a time like 2031-05-17T10:00:00Z", datetime.fromisoformat),
    date: _made(date, "a date like 2031-05-17", date.fromisoformat),
    UUID: _made(UUID, "a UUID", UUID),
    Decimal: _made(Decimal, "a decimal number, as text", Decimal),
}
