"""Failovers: a physical replica is promoted while jobs run, and workers meet servers that cannot be written to."""

from __future__ import annotations

from contextlib import AbstractContextManager

from psycopg.conninfo import make_conninfo

from tests.faults.fleet import Fleet
from tests.faults.ground import Ground
from tests.faults.proxy import Proxy
from tests.faults.standby import Standby
from tests.faults.trial import Trial
from tests.waiting import until


def promoted(_ground: Ground, trial: Trial) -> None:
    """The primary crashes, the replica is promoted; the workers know both and want the one that can be written to."""
    primary = trial.server
    with Standby(primary) as standby:
        standby.keep_up()  # else what was recorded might be lost with it, and its job reported to the replica
        dsn = make_conninfo(
            host=f"{standby.host},{primary.host}", port=f"{standby.port},{primary.port}", user="worker",
            dbname=trial.dbname, target_session_attrs="read-write",
        )  # fmt: skip
        with trial.fleet(dsn, 2) as fleet:
            trial.underway()
            with trial.fault():
                primary.stop("immediate")
                until(lambda: fleet.all_say("trying again"), "the workers notice", timeout=60)
                standby.promote()
                trial.server = standby
            trial.finish()


def switched(_ground: Ground, trial: Trial) -> None:
    """The same behind a proxy that leads to the replica before it is promoted."""
    primary = trial.server
    with Standby(primary) as standby, Proxy(primary) as proxy, _behind(proxy, trial) as fleet:
        trial.underway()
        standby.catch_up()
        with trial.fault():
            proxy.target = standby
            proxy.reset()
            primary.stop("fast")
            _meet_the_standby(fleet)
            standby.promote()
            trial.server = standby
        trial.finish()


def on_a_standby(_ground: Ground, trial: Trial) -> None:
    """For a while the workers' connections lead to a standby, while the primary lives on."""
    primary = trial.server
    with Standby(primary) as standby, Proxy(primary) as proxy, _behind(proxy, trial) as fleet:
        trial.underway()
        with trial.fault():
            proxy.target = standby
            proxy.reset()
            _meet_the_standby(fleet)
            proxy.target = primary
        trial.finish()


def _behind(proxy: Proxy, trial: Trial) -> AbstractContextManager[Fleet]:
    return trial.fleet(proxy.dsn(trial.dbname, "worker"), 2, "-v")


def _meet_the_standby(fleet: Fleet) -> None:
    until(lambda: fleet.all_say("standby"), "the workers meet the standby", timeout=60)
