"""Logging: one logger, `pgworker`, whose records carry worker, task and job_id, and a format that shows them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

LOGGER = "pgworker"

#: logging.LoggerAdapter is generic only for the type checker of some Python versions.
Adapter = logging.LoggerAdapter[logging.Logger]


class Log(Adapter):
    """A logger that adds its own attributes to each record and leaves those of the caller (``extra=…``) in place."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        given: Mapping[str, Any] = kwargs.get("extra") or {}
        kwargs["extra"] = {**(self.extra or {}), **given}
        return msg, kwargs

    def of_job(self, task: str, job_id: int) -> Log:
        """The same logger for what concerns one job."""
        return Log(self.logger, {**(self.extra or {}), "task": task, "job_id": job_id})


class LineFormatter(logging.Formatter):
    """One line a record: time, level, what, and the job it is about; tracebacks follow below as usual.

    ``process``, a number, stands before what is said, where several processes write to one place.
    """

    def __init__(self, process: int | None = None) -> None:
        who = "" if process is None else f"process {process}: "
        super().__init__(f"%(asctime)s %(levelname)-7s {who}%(message)s%(about)s")

    def format(self, record: logging.LogRecord) -> str:
        task = getattr(record, "task", None)
        record.about = f" [{task} #{getattr(record, 'job_id', '?')}]" if task else ""
        return super().format(record)


def log_to_stderr(level: int = logging.INFO, process: int | None = None) -> None:
    """What the command line does: the records of `pgworker` go to standard error, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(process))
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
