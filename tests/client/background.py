"""A worker that runs in a thread while the test looks on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from pgworker_client import Worker
from tests.waiting import until


class Background:
    """A worker in a thread of its own; ``error`` is what its ``run`` raised."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        until(lambda: worker._running is not None or not self._thread.is_alive(), "the worker runs")

    @property
    def ended(self) -> bool:
        """Whether ``run`` has returned."""
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait until ``run`` has returned; raise what it raised."""
        self._thread.join(60)
        assert self.ended, "the worker did not stop"
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            self.worker.run()
        except BaseException as error:
            self.error = error


@contextlib.contextmanager
def running(worker: Worker) -> Iterator[Background]:
    """The worker works inside the block and is stopped, in good order, at its end."""
    background = Background(worker)
    try:
        yield background
    except BaseException:
        worker.stop()
        worker.stop()
        raise
    worker.stop()
    background.join()


def stop(worker: Worker) -> None:
    """Stop the worker and wait until it has heard."""
    assert worker._running is not None
    engine = worker._running[1]
    worker.stop()
    until(engine._stopping.is_set, "the stop is heard")
