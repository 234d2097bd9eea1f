"""A handler gets what its annotation says, or the job fails for good with what does not fit; never a wrong payload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, TypedDict
from uuid import UUID

import msgspec
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgworker_client import Worker, add_job
from pgworker_client.loading import load_directory
from pgworker_client.payloads import converter
from pgworker_client.shapes import Misfit
from tests.calling import retry_in_an_hour
from tests.client import payload_types as types

Db = psycopg.Connection[Any]


def job(db: Db, columns: str) -> tuple[Any, ...]:
    """The only job that the database knows."""
    (row,) = db.execute(f"select {columns} from pgworker.jobs").fetchall()
    return tuple(row)


def made(annotation: Any, value: Any) -> Any:
    """What the annotation makes of a decoded value."""
    convert = converter(annotation)
    assert convert is not None
    return convert(value)


def test_the_handler_gets_an_instance(dsn: str, db: Db) -> None:
    add_job(db, "order", {"id": 7, "items": [{"sku": "a"}], "total": 3})
    Worker(dsn, tasks={"order": types.order}).run_once()
    assert job(db, "state, result") == (
        "completed",
        "Order(id=7, items=[Item(sku='a', count=1)], customer=None, total=3.0, express=False, tags={}, kind='web', "
        "note=None, seen=True)",
    )


def test_a_payload_that_does_not_fit_fails_for_good_and_says_each_field(dsn: str, db: Db) -> None:
    add_job(db, "order", {"id": "7", "items": [{"sku": 1}, {"sku": "b", "count": True}], "custommer": "Ada"})
    Worker(dsn, tasks={"order": types.order}).run_once()
    assert job(db, "state, attempts, last_error") == (
        "failed",
        1,
        "the payload does not fit Order: id must be an integer, not '7'; items[0].sku must be a text, not 1; "
        "items[1].count must be an integer, not True; custommer is unknown",
    )


def test_a_batch_is_a_list_of_instances_and_may_fail_in_part(dsn: str, db: Db) -> None:
    add_job(db, "orders", [{"sku": "a"}, {"sku": "b", "count": 10}])
    retry_in_an_hour(db, "orders")
    Worker(dsn, tasks={"orders": types.orders}).run_once()
    state, payload, error = job(db, "state, payload, last_error")
    assert (state, payload) == ("scheduled", [{"sku": "b", "count": 10}])
    assert error == "1 of 2 items failed\n[1] ValueError: sold out"


def test_a_batch_with_an_item_that_does_not_fit_is_not_begun(dsn: str, db: Db) -> None:
    add_job(db, "orders", [{"sku": "a"}, {"count": 2}])
    Worker(dsn, tasks={"orders": types.orders}).run_once()
    state, error = job(db, "state, last_error")
    assert state == "failed"
    assert error.endswith("list[tests.client.payload_types.Item]: [1].sku is missing")


def test_a_task_that_is_a_file_may_be_annotated(dsn: str, db: Db, tmp_path: Path) -> None:
    (tmp_path / "typed_file.py").write_text(
        "from tests.client.payload_types import Item\ndef handle(payload: Item, ctx): return payload.count\n"
    )
    add_job(db, "typed_file", {"sku": "a", "count": 3})
    Worker(dsn, tasks=load_directory(tmp_path)).run_once()
    assert job(db, "state, result") == ("completed", 3)


@pytest.mark.parametrize(
    "handler",
    [types.Handler(), types.Handler().method, partial(types.with_option, "")],
    ids=["object", "bound method", "partial"],
)
def test_whatever_is_called_may_be_annotated(dsn: str, db: Db, handler: Any) -> None:
    add_job(db, "t", {"sku": "a"})
    Worker(dsn, tasks={"t": handler}).run_once()
    assert job(db, "result") == ("a",)


class Loose(TypedDict):
    """A dict, at run time."""

    n: int


def _variadic(*both: types.Item) -> None:
    pass


@pytest.mark.parametrize("annotation", [dict, dict[str, Any], list, list[dict[str, Any]], Any, int, str | None, Loose])
def test_other_annotations_mean_what_they_did(dsn: str, db: Db, annotation: Any) -> None:
    def handler(payload: Any, ctx: Any) -> Any:
        return payload

    handler.__annotations__["payload"] = annotation
    worker = Worker(dsn, tasks={"t": handler, "variadic": _variadic, "builtin": max})
    assert worker.tasks.by_name["t"].handler is handler
    assert worker.tasks.by_name["variadic"].handler is _variadic
    add_job(db, "t", {"n": "x"})
    worker.run_once()
    assert job(db, "result") == ({"n": "x"},)


def test_pydantic_says_what_does_not_fit(dsn: str, db: Db) -> None:
    def handler(payload: Any, ctx: Any) -> Any:
        return None

    handler.__annotations__["payload"] = types.Mail
    add_job(db, "t", {"copies": 0})
    Worker(dsn, tasks={"t": handler}).run_once()
    state, attempts, error = job(db, "state, attempts, last_error")
    assert (state, attempts) == ("failed", 1)
    assert error.startswith("the payload does not fit Mail: 2 validation errors for Mail\nto\n  Field required")
    assert "copies\n  Input should be greater than or equal to 1" in error


def test_msgspec_says_what_does_not_fit(dsn: str, db: Db) -> None:
    def handler(payload: Any, ctx: Any) -> Any:
        return None

    handler.__annotations__["payload"] = types.Point
    add_job(db, "t", {"x": "1"})
    Worker(dsn, tasks={"t": handler}).run_once()
    assert job(db, "state, last_error") == (
        "failed", "the payload does not fit Point: Expected `int`, got `str` - at `$.x`",
    )  # fmt: skip


AT = "2031-05-17T10:00:00Z"


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (types.Mail, {"to": "ada", "at": AT}, types.Mail(to="ada", at=datetime(2031, 5, 17, 10, tzinfo=UTC))),
        (list[types.Mail], [{"to": "ada"}], [types.Mail(to="ada")]),
        (types.Mail | None, {"to": "ada"}, types.Mail(to="ada")),
        (types.Card, {"number": 1}, types.Card(1)),
        (types.Point, {"x": 1, "at": AT}, types.Point(1, datetime(2031, 5, 17, 10, tzinfo=UTC))),
        (dict[str, types.Point], {"a": {"x": 1}}, {"a": types.Point(1)}),
        (types.Mixed, {"mail": {"to": "a"}, "points": None}, types.Mixed(types.Mail(to="a"), None)),
        (types.Mixed, {"mail": {"to": "a"}, "points": {"x": 1}}, types.Mixed(types.Mail(to="a"), types.Point(1))),
        (types.Item | types.Checked, {"n": 1}, types.Checked(1)),
        (Sequence[types.Item], [{"sku": "a"}], [types.Item("a")]),
        (Mapping[str, types.Item], {"k": {"sku": "a"}}, {"k": types.Item("a")}),
        (types.Folder, {"name": "/", "folders": [{"name": "etc"}]}, types.Folder("/", [types.Folder("etc")])),
        (
            types.Rare,
            {
                "at": AT, "day": "2031-05-17", "key": "0" * 32, "price": "1.50", "colour": "red", "either": "x",
                "share": 1,
            },
            types.Rare(
                at=datetime(2031, 5, 17, 10, tzinfo=UTC), day=date(2031, 5, 17), key=UUID(int=0), price=Decimal("1.50"),
                colour=types.Colour.RED, either="x", share=1.0,
            ),
        ),
    ],
)  # fmt: skip
def test_what_fits_is_made(annotation: Any, value: Any, expected: Any) -> None:
    assert made(annotation, value) == expected


@pytest.mark.parametrize(
    ("annotation", "value", "says"),
    [
        (types.Order, [], "the payload must be an object, not an array"),
        (types.Order, {"id": 1}, "items is missing"),
        (types.Order, {"id": 1.0, "items": []}, "id must be an integer, not 1.0"),
        (types.Order, {"id": 1, "items": {}}, "items must be an array, not an object"),
        (types.Order, {"id": 1, "items": [None]}, "items[0] must be an object, not null"),
        (types.Order, {"id": 1, "items": [], "customer": 1}, "customer must be a text, not 1"),
        (types.Order, {"id": 1, "items": [], "total": "1"}, "total must be a number, not '1'"),
        (
            types.Order,
            {"id": 1, "items": [], "total": 10**400},
            "total must be a number that a float can hold, not 1000",
        ),
        (types.Order, {"id": 1, "items": [], "express": 1}, "express must be true or false, not 1"),
        (types.Order, {"id": 1, "items": [], "tags": {"a": 1}}, "tags.a must be a text, not 1"),
        (types.Order, {"id": 1, "items": [], "tags": []}, "tags must be an object, not an array"),
        (types.Order, {"id": 1, "items": [], "kind": "fax"}, "kind must be one of 'web', 'shop', not 'fax'"),
        (types.Order, {"id": 1, "items": [], "seen": False}, "seen is unknown"),
        (types.Rare, {"at": "noon"}, "at must be a time like 2031-05-17T10:00:00Z, not 'noon'"),
        (types.Rare, {"day": 7}, "day must be a date like 2031-05-17, not 7"),
        (types.Rare, {"price": "much"}, "price must be a decimal number, as text, not 'much'"),
        (types.Rare, {"colour": "RED"}, "colour must be Colour, not 'RED'"),
        (types.Rare, {"colour": []}, "colour must be Colour, not an array"),
        (types.Rare, {"either": None}, "either must be an integer, not null or either must be a text, not null"),
        (types.Checked, {"n": -1}, "n must not be negative"),
        (list[types.Checked], [{"n": 1}, {"n": -1}], "[1]: n must not be negative"),
        (types.Folder, {"name": "/", "folders": [{"name": 1}]}, "folders[0].name must be a text, not 1"),
        (types.Mixed, {"mail": {}}, "mail: 1 validation error for Mail"),
    ],
)
def test_what_does_not_fit_is_said_with_its_place(annotation: Any, value: Any, says: str) -> None:
    with pytest.raises(Misfit) as caught:
        made(annotation, value)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        (types.Odd, r"task 't': Odd.tags: no JSON is made a set\[str\]"),
        (types.Lost, "task 't': the annotations of Lost cannot be looked up: name 'Elsewhere' is not defined"),
        (types.Initial, "task 't': Initial has an InitVar"),
        (types.LostModel, "task 't': LostModel: .*not fully defined"),
        (types.LostStruct, "task 't': LostStruct: name 'Elsewhere' is not defined"),
        (types.Mail | types.Point, "task 't': .* mixes types of msgspec and pydantic"),
        (dict[int, types.Item], "task 't': no JSON is made a dict"),
        ("Nowhere", "task 't': the annotation 'Nowhere' of its payload cannot be looked up: name 'Nowhere'"),
    ],
)
def test_an_annotation_that_cannot_work_is_refused_at_registration(annotation: Any, says: str) -> None:
    def handler(payload: Any, ctx: Any) -> None:
        pass

    handler.__annotations__["payload"] = annotation
    with pytest.raises(TypeError, match=says):
        Worker().task("t")(handler)


def test_a_type_for_type_checkers_only_is_refused_at_registration() -> None:
    with pytest.raises(TypeError, match="task 'unknown': the annotation 'Elsewhere' of its payload"):
        Worker().task(types.unknown)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.integers(-5, 5) | st.text(max_size=2) | st.booleans() | st.none(),
            "items": st.lists(st.fixed_dictionaries({}, optional={"sku": st.text(max_size=1) | st.none(),
                                                                 "count": st.integers(0, 3) | st.floats(0, 1)}),
                              max_size=2) | st.none(),
            "customer": st.text(max_size=1) | st.none() | st.integers(),
            "total": st.floats(0, 1) | st.integers(0, 3) | st.booleans(),
            "express": st.booleans() | st.integers(0, 1),
            "tags": st.dictionaries(st.text(max_size=1), st.text(max_size=1) | st.integers(0, 1), max_size=2),
            "kind": st.sampled_from(["web", "shop", "fax", 1]),
        },
    )
)  # fmt: skip
def test_a_dataclass_fits_what_msgspec_says_it_fits(value: dict[str, Any]) -> None:
    try:
        expected = msgspec.convert(value, types.Order)
    except msgspec.ValidationError:
        with pytest.raises(Misfit):
            made(types.Order, value)
    else:
        assert made(types.Order, value) == expected
