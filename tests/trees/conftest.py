"""After each test of trees, every counter, state and link must be what it has to be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.invariants import assert_consistent


@pytest.fixture(autouse=True)
def _nothing_is_wrong_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    # Asked for before the test, so that it is torn down after the look: a rolled back tree has nothing wrong with it.
    name = next((name for name in ("tx", "db") if name in request.fixturenames), None)
    conn = request.getfixturevalue(name) if name else None
    yield
    if conn is not None and not conn.closed:
        assert_consistent(conn)
