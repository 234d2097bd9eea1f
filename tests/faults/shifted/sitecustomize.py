"""For worker processes of trials: a clock that is off, and looks for silent peers at shorter intervals.

Python imports this at the start of every process that has this directory in PYTHONPATH.
"""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

_OFF = float(os.environ.get("TRIAL_CLOCK_OFF", "0"))
_TICK = os.environ.get("TRIAL_SILENCE_TICK")

if _OFF:
    _time = time.time

    class _Shifted(datetime.datetime):
        __slots__ = ()  # as large as the original, which extension modules look at

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + datetime.timedelta(seconds=_OFF)

    time.time = lambda: _time() + _OFF
    time.time_ns = lambda: int((_time() + _OFF) * 1e9)
    datetime.datetime = _Shifted  # type: ignore[misc]

if _TICK:
    from pgworker_client import silence

    silence.TICK = silence._QUESTION = float(_TICK)
    silence._POOLED = 2 * float(_TICK)
