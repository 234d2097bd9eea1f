"""pgworker: background jobs inside PostgreSQL. This is the client: it runs workers and adds jobs.

The queue's rules live in the database; the reference of the SQL functions says what they mean.
"""

from pgworker_client.administration import (
    allow_flag,
    cancel_jobs,
    complete_jobs,
    configure,
    forbid_flag,
    permanently_fail_jobs,
    reschedule_jobs,
    retry_jobs,
)
from pgworker_client.context import BlockingContext, Context
from pgworker_client.diagnosis import Finding, doctor, why
from pgworker_client.enqueue import JobOptions, JobSpec, add_job, add_jobs, remove_job
from pgworker_client.errors import JobLost, NotInstalled, PgworkerError, WorkerFailed
from pgworker_client.events import StateChange, Subscription, subscribe
from pgworker_client.hooks import JobEvent, WorkerEvent
from pgworker_client.job import Job, JobRow
from pgworker_client.node import Node
from pgworker_client.outcome import Cancel, Fail, Retry, WaitsForChildren
from pgworker_client.scheduling import (
    ScheduleOptions,
    ScheduleRow,
    cron_preview,
    load_crontab,
    pause_schedule,
    resume_schedule,
    schedule_job,
    schedules,
    unschedule_job,
)
from pgworker_client.task_settings import TaskOptions, TaskRow, configure_task
from pgworker_client.trees import (
    TreeRow,
    add_job_tree,
    children,
    get_children_values,
    get_failed_children_values,
    job_tree,
    tree_progress,
)
from pgworker_client.worker import Worker

__all__ = [
    "BlockingContext",
    "Cancel",
    "Context",
    "Fail",
    "Finding",
    "Job",
    "JobEvent",
    "JobLost",
    "JobOptions",
    "JobRow",
    "JobSpec",
    "Node",
    "NotInstalled",
    "PgworkerError",
    "Retry",
    "ScheduleOptions",
    "ScheduleRow",
    "StateChange",
    "Subscription",
    "TaskOptions",
    "TaskRow",
    "TreeRow",
    "WaitsForChildren",
    "Worker",
    "WorkerEvent",
    "WorkerFailed",
    "add_job",
    "add_job_tree",
    "add_jobs",
    "allow_flag",
    "cancel_jobs",
    "children",
    "complete_jobs",
    "configure",
    "cron_preview",
    "doctor",
    "forbid_flag",
    "configure_task",
    "get_children_values",
    "get_failed_children_values",
    "job_tree",
    "load_crontab",
    "pause_schedule",
    "permanently_fail_jobs",
    "remove_job",
    "reschedule_jobs",
    "resume_schedule",
    "retry_jobs",
    "schedule_job",
    "schedules",
    "subscribe",
    "tree_progress",
    "unschedule_job",
    "why",
]
