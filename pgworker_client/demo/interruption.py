"""Ctrl-C, SIGTERM and a closed terminal: one way out of the demo, at a moment when nothing is half made."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """The demo was told to stop; ``status`` is the exit status that says so.

    A KeyboardInterrupt, because those are what libraries are prepared for: psycopg then cancels its statement in order.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Interruption:
    """Inside its ``with`` block the first signal raises `Interrupted`; later ones, during the clean-up, do nothing."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._shielded = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over, except those that the caller (nohup) wants ignored."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Put a signal off until the end of the block, which makes something that must be made whole or not at all."""
        self._shielded = True
        try:
            yield
        except Exception:  # what a program that the same Ctrl-C reached had to say
            self.check()
            raise
        finally:
            self._shielded = False
        self.check()

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            if not self._shielded:
                raise Interrupted(number)
