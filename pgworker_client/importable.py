"""Handlers that another process can find: by the name of their module and their own."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a handler is defined."""

    module: str
    name: str


def place_of(handler: Callable[[Any, Any], Any]) -> Place:
    """Where the handler will be found. TypeError, saying what to do, if it can't be."""
    if not inspect.isfunction(handler):
        raise TypeError(f"executor='process' needs a function, defined with def in a module, not {handler!r}")
    place = Place(handler.__module__, handler.__qualname__)
    if "<" in place.name:  # <lambda>, <locals>
        raise TypeError(
            f"executor='process' needs a function that another process can import; {place.name} is made while the "
            "program runs: define it with def at the top level of a module"
        )
    if place.module == "__main__" and not _main_is_a_file():
        raise TypeError(
            f"executor='process' needs a function that another process can import; {place.name} was typed in or is in "
            "a __main__.py: put it into a module"
        )
    return place


def find(place: Place) -> Any:
    """What is there. ImportError or AttributeError if nothing is."""
    found: Any = importlib.import_module(place.module)
    for name in place.name.split("."):
        found = getattr(found, name)
    return found


def check_found(identifier: str, place: Place, handler: Callable[[Any, Any], Any]) -> None:
    """TypeError if something else than the handler will be found: then it was wrapped, or replaced, afterwards."""
    try:
        found = find(place)
    except (ImportError, AttributeError):
        found = None
    if found is not handler and found is not getattr(handler, "__wrapped__", None):
        raise TypeError(
            f"task {identifier!r}: executor='process' imports its handler as {place.module}.{place.name}, and finds "
            f"{found!r} there; make @worker.task the outermost decorator, and the name its own"
        )


def _main_is_a_file() -> bool:
    """Whether a new process can import the main module: a script, or a module run by ``python -m``."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return not spec.name.endswith("__main__")
    return Path(getattr(main, "__file__", None) or "").is_file()
