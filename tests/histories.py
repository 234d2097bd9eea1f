"""How many random histories are tried: PGWORKER_MODEL_EXAMPLES, without it a few, always the same ones."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

EXAMPLES = int(os.environ.get("PGWORKER_MODEL_EXAMPLES", "0"))


def histories(few: int, **more: Any) -> settings:
    """Settings for a test of histories; ``few``: how many without the variable. Making one shorter takes minutes."""
    given: dict[str, Any] = {
        "max_examples": EXAMPLES or few, "derandomize": not EXAMPLES, "database": None,
        "phases": [Phase.generate], "suppress_health_check": list(HealthCheck), **more,
    }  # fmt: skip
    return settings(**given)


def patience(seconds: int) -> pytest.MarkDecorator:
    """The timeout of such a test; ``seconds``: of a few histories."""
    return pytest.mark.timeout(600 + EXAMPLES * 2 if EXAMPLES else seconds)
