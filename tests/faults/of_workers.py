"""Faults of workers: they are killed, stand still past their lease, or have the wrong time."""

from __future__ import annotations

import time
from pathlib import Path

from tests.faults.fleet import ROOT
from tests.faults.ground import Ground
from tests.faults.proxy import Proxy
from tests.faults.trial import Trial
from tests.waiting import until

_SHIFTED = Path(__file__).parent / "shifted"


def shifted(**variables: str) -> dict[str, str]:
    """Return the environment of worker processes that `sitecustomize` changes."""
    return {"PYTHONPATH": f"{_SHIFTED}:{ROOT}", **variables}


def killed_workers(ground: Ground, trial: Trial) -> None:
    """Workers are killed with SIGKILL, one after the other."""
    with trial.fleet(trial.dsn(), 2) as fleet:
        trial.underway()
        for _ in range(10 if ground.patient else 2):
            with trial.fault():
                fleet.kill_one(trial.chance)
        trial.finish()


def frozen_past_its_lease(ground: Ground, trial: Trial) -> None:
    """A worker with a lease stands still (SIGSTOP) until its jobs are others', then goes on."""
    lease = "10" if ground.patient else "1.5"
    _frozen(trial, trial.dsn(), "--lease", lease)


def frozen_and_cut_off(_ground: Ground, trial: Trial) -> None:
    """A worker in session mode stands still, and is cut off from the server meanwhile."""
    with Proxy(trial.server) as proxy:
        _frozen(trial, proxy.dsn(trial.dbname, "worker"), cut=proxy)


def _frozen(trial: Trial, dsn: str, *arguments: str, cut: Proxy | None = None) -> None:
    with trial.connect() as conn:
        conn.execute("select pgworker.add_job('hold', to_jsonb(%s::int), priority => -1)", [trial.jobs + 1])
    trial.jobs += 1
    with trial.fleet(dsn, 1, "--name", "the frozen one", *arguments) as frozen:
        held_by = "select locked_by from pgworker.jobs where task_identifier = 'hold'"
        worker = until(lambda: trial.value(held_by), "it is held")
        with trial.fleet(trial.dsn(), 1):
            trial.underway()
            with trial.fault():
                frozen.freeze(True)
                if cut is not None:
                    cut.reset()
                query = "select count(*) from public.run where n = %s and attempt = 2"
                until(lambda: trial.value(query, trial.jobs), "another worker runs its job", timeout=60)
                assert trial.value("select count(*) from public.told") == 0
                frozen.freeze(False)
            # Its handler is told, and its late finish counts for nothing.
            until(lambda: trial.value("select count(*) from public.told") == 1, "ctx.cancelled is set")
            # It registers anew; or it came back just as it was to be forgotten, but somebody had a row of its locked.
            kept = "select count(*) from pgworker.presence where id = %s and present"
            until(lambda: frozen.all_say("registered anew") or trial.value(kept, worker), "it goes on")
            trial.finish()


def wrong_time(_ground: Ground, trial: Trial) -> None:
    """One worker's clock is an hour ahead, another's an hour behind: nothing may come of it."""
    with (
        trial.fleet(trial.dsn(), 1, environment=shifted(TRIAL_CLOCK_OFF="3600")) as ahead,
        trial.fleet(trial.dsn(), 1, environment=shifted(TRIAL_CLOCK_OFF="-3600")) as behind,
    ):
        for fleet, off in ((ahead, 3600), (behind, -3600)):  # as their logs show
            shown = time.mktime(time.strptime(fleet.said()[:19], "%Y-%m-%d %H:%M:%S"))
            assert abs(shown - time.time() - off) < 600
        trial.finish()
