"""The faults, and how one is tried."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

from tests.faults.ground import Ground
from tests.faults.of_failovers import on_a_standby, promoted, switched
from tests.faults.of_networks import black_hole, cut_off, pooler_restarted, slow
from tests.faults.of_servers import (
    burst,
    full_disk,
    full_of_connections,
    idle_in_transaction,
    restart,
    small_disk,
    storm,
    terminated_backends,
)
from tests.faults.of_workers import frozen_and_cut_off, frozen_past_its_lease, killed_workers, wrong_time
from tests.faults.trial import Outcome, Trial

FAULTS: dict[str, Callable[[Ground, Trial], None]] = {
    "server restarted (fast)": restart("fast"),
    "server crashed (immediate)": restart("immediate"),
    "backends terminated": terminated_backends,
    "workers killed (SIGKILL)": killed_workers,
    "all of these at random": storm,
    "worker frozen past its lease": frozen_past_its_lease,
    "worker frozen and cut off": frozen_and_cut_off,
    "connections reset": cut_off,
    "network a black hole": black_hole,
    "network slow": slow,
    "pgbouncer restarted": pooler_restarted,
    "idle in transaction": idle_in_transaction,
    "burst of jobs": burst,
    "no connection free": full_of_connections,
    "replica promoted": promoted,
    "replica promoted, by proxy": switched,
    "led to a standby": on_a_standby,
    "clocks an hour off": wrong_time,
    "disk full": full_disk,
}


def tried(ground: Ground, name: str, chance: random.Random) -> Outcome:
    """Try a fault. Raises CannotBeTried where that is impossible, AssertionError where somebody is stuck."""
    with contextlib.ExitStack() as stack:
        options = ""
        if FAULTS[name] is full_disk:
            stack.enter_context(small_disk(ground))
            options = "tablespace small"
        trial = stack.enter_context(ground.trial(name, chance, options=options))
        FAULTS[name](ground, trial)
        assert trial.outcome is not None
        return trial.outcome
