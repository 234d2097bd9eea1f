"""After each test of trees, every counter, state and link must be what it has to be."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _nothing_is_wrong_afterwards(consistent_afterwards: None) -> None: ...
