"""pgworker: background jobs inside PostgreSQL. This is the client: it runs workers and adds jobs.

The queue's rules live in the database; the reference of the SQL functions says what they mean.
"""

from pgworker_client.administration import (
    cancel_jobs,
    complete_jobs,
    permanently_fail_jobs,
    reschedule_jobs,
    retry_jobs,
)
from pgworker_client.context import BlockingContext, Context
from pgworker_client.enqueue import JobOptions, JobSpec, add_job, add_jobs, remove_job
from pgworker_client.errors import JobLost, NotInstalled, PgworkerError, WorkerFailed
from pgworker_client.job import Job, JobRow
from pgworker_client.outcome import Cancel, Fail, Retry
from pgworker_client.worker import Worker

__all__ = [
    "BlockingContext",
    "Cancel",
    "Context",
    "Fail",
    "Job",
    "JobLost",
    "JobOptions",
    "JobRow",
    "JobSpec",
    "NotInstalled",
    "PgworkerError",
    "Retry",
    "Worker",
    "WorkerFailed",
    "add_job",
    "add_jobs",
    "cancel_jobs",
    "complete_jobs",
    "permanently_fail_jobs",
    "remove_job",
    "reschedule_jobs",
    "retry_jobs",
]
