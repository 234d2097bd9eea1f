"""A worker process under a supervisor: what it hears and says over the line that `supervisor` describes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator

from pgworker_client.stopping import on_signals


class Supervised:
    """The process's end of the line, whose file descriptor was inherited."""

    def __init__(self, line: int, logger: logging.Logger) -> None:
        os.set_inheritable(line, False)  # or what a handler starts would hold it open
        self._line = socket.socket(fileno=line)
        self._line.setblocking(False)
        self._log = logger
        self._signals = 0
        self._told = 0
        self._stops = 0

    @contextlib.contextmanager
    def stops(self, stop: Callable[[], None]) -> Iterator[None]:
        """Call ``stop`` as often as the supervisor wants it, and once for signals from elsewhere, or when it is gone.

        Signals may arrive from the supervisor and from whoever sent it one to all, and cannot be told apart. So only
        the supervisor's word makes a second stop.
        """

        def wanted() -> None:
            while self._stops < max(self._told, min(self._signals, 1)):
                self._stops += 1
                stop()

        def signalled() -> None:
            self._signals += 1
            wanted()

        def hear() -> None:
            try:
                said = self._line.recv(16)
            except OSError:
                said = b""
            self._told += len(said)
            if not said:
                loop.remove_reader(self._line)
                self._log.warning("the supervisor is gone; stopping")
                self._told = max(self._told, 1)
            wanted()

        loop = asyncio.get_running_loop()
        with on_signals(signalled):
            loop.add_reader(self._line, hear)
            try:
                yield
            finally:
                loop.remove_reader(self._line)

    def started(self) -> None:
        """Tell the supervisor that this process works."""
        with contextlib.suppress(OSError):
            self._line.send(b"w")
