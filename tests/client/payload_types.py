"""Types of payloads, in a module whose annotations are all text."""

from __future__ import annotations

import enum
from dataclasses import KW_ONLY, InitVar, dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import msgspec
import pydantic
import pydantic.dataclasses

if TYPE_CHECKING:
    from somewhere import Elsewhere  # type: ignore[import-not-found]

    from pgworker_client import Context


class Colour(enum.Enum):
    """Values, not names, are in payloads."""

    RED = "red"


@dataclass(frozen=True)
class Item:
    """Nested."""

    sku: str
    count: int = 1


@dataclass
class Order:
    """As people write them."""

    id: int
    items: list[Item]
    customer: str | None = None
    total: float = 0.0
    express: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    kind: Literal["web", "shop"] = "web"
    note: Any = None
    seen: bool = field(default=True, init=False)


@dataclass
class Rare:
    """What JSON has no type of its own for."""

    _: KW_ONLY
    at: datetime | None = None
    day: date | None = None
    key: UUID | None = None
    price: Decimal | None = None
    colour: Colour | None = None
    either: int | str = 0
    share: Annotated[float, "of one"] = 0.0
    anything: list = field(default_factory=list)  # type: ignore[type-arg]


@dataclass
class Folder:
    """Holds its like."""

    name: str
    folders: list[Folder] = field(default_factory=list)


@dataclass
class Checked:
    """Looks at itself."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError("n must not be negative")


class Mail(pydantic.BaseModel):
    """Of pydantic."""

    to: str
    at: datetime | None = None
    copies: int = pydantic.Field(default=1, ge=1)


@pydantic.dataclasses.dataclass
class Card:
    """Of pydantic, too."""

    number: int


class Point(msgspec.Struct, forbid_unknown_fields=True):
    """Of msgspec."""

    x: int
    at: datetime | None = None


@dataclass
class Mixed:
    """A dataclass with fields of the others."""

    mail: Mail
    points: Point | None = None


@dataclass
class Odd:
    """No JSON is a set."""

    tags: set[str]


@dataclass
class Lost:
    """Its field's type is there for type checkers only."""

    at: Elsewhere


@dataclass
class Initial:
    """Is given more than it keeps."""

    n: InitVar[int]


class LostModel(pydantic.BaseModel):
    """The same, of pydantic."""

    at: Elsewhere


class LostStruct(msgspec.Struct):
    """The same, of msgspec."""

    at: Elsewhere


async def order(payload: Order, ctx: Context) -> Any:
    """A handler whose context has an annotation that only type checkers can look up."""
    return repr(payload)


def orders(payload: list[Item], ctx: Context) -> Any:
    """A handler of batches, in a thread, of which a part may fail."""
    return [ValueError("sold out") if item.count > 9 else None for item in payload]


def unknown(payload: Elsewhere, ctx: Context) -> Any:
    """A handler that cannot work."""


class Handler:
    """An object that is called."""

    async def __call__(self, payload: Item, ctx: Context) -> Any:
        return payload.sku

    def method(self, payload: Item, ctx: Context) -> Any:
        """Do the same, bound."""
        return payload.sku


def with_option(option: str, payload: Item, ctx: Context) -> Any:
    """To be used through functools.partial."""
    return option + payload.sku
