"""Faults of what is between worker and server: a network that cuts, swallows or delays, a pooler that is restarted."""

from __future__ import annotations

from psycopg.conninfo import make_conninfo

from tests.faults.ground import Ground
from tests.faults.of_servers import CannotBeTried
from tests.faults.of_workers import shifted
from tests.faults.proxy import Proxy
from tests.faults.trial import Trial
from tests.pooler.bouncer import PROGRAM, Bouncer
from tests.waiting import until


def cut_off(ground: Ground, trial: Trial) -> None:
    """All connections are reset, again and again."""
    with Proxy(trial.server) as proxy, trial.fleet(proxy.dsn(trial.dbname, "worker"), 2):
        trial.underway()
        for _ in range(20 if ground.patient else 4):
            with trial.fault():
                proxy.reset()
        trial.finish()


def black_hole(ground: Ground, trial: Trial) -> None:
    """Everything is swallowed, while the network goes on to acknowledge it; after a while new connections pass."""
    environment, timeout = ({}, "10") if ground.patient else (shifted(TRIAL_SILENCE_TICK="1"), "3")
    with (
        Proxy(trial.server) as proxy,
        trial.fleet(
            make_conninfo(proxy.dsn(trial.dbname, "worker"), connect_timeout=timeout), 2, environment=environment
        ) as fleet,
    ):
        trial.underway()
        with trial.fault():
            proxy.swallow(True)
            until(lambda: fleet.all_say("trying again"), "the workers notice", timeout=60)
            proxy.swallow(False)
        trial.finish()


def slow(ground: Ground, trial: Trial) -> None:
    """Everything takes long, in either direction."""
    with Proxy(trial.server) as proxy, trial.fleet(proxy.dsn(trial.dbname, "worker"), 2):
        trial.underway()
        with trial.fault():
            before = trial.value("select count(*) from public.run")
            proxy.delay = trial.chance.uniform(0.1, 0.5) if ground.patient else 0.05
            until(lambda: trial.value("select count(*) from public.run") > before + 20, "some runs", timeout=120)
            proxy.delay = 0.0
        trial.finish()


def pooler_restarted(ground: Ground, trial: Trial) -> None:
    """pgbouncer, in transaction mode, is killed and started again."""
    if PROGRAM is None:
        raise CannotBeTried("pgbouncer is not installed")
    with (
        Bouncer(trial.server, 6, user="worker") as bouncer,
        trial.fleet(bouncer.dsn(trial.dbname), 2, "--lease", "10") as fleet,
    ):
        for share in (0.05, 0.3, 0.6) if ground.patient else (0.05,):
            trial.underway(share)
            with trial.fault():
                bouncer.kill()
                until(lambda: fleet.all_say("trying again"), "the workers notice", timeout=60)
                bouncer.start()
        trial.finish()
