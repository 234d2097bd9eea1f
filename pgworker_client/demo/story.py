"""What the demo does and says, step by step."""

from __future__ import annotations

import time
from pathlib import Path

from pgworker_client.demo.files import Files
from pgworker_client.demo.screen import ProgressBar, say, table
from pgworker_client.demo.shop import FLAG, Shop
from pgworker_client.demo.worker_process import TASKS, WorkerProcess

#: Seconds in which no job ends, after which something must be wrong.
_STALLED = 60.0
_LOOK_EVERY = 0.1


class DemoFailed(Exception):
    """Something did not go as it should; the text says what."""


def open_shop(shop: Shop) -> None:
    """Install pgworker if need be, and make the shop."""
    installed = shop.open()
    say(f"pgworker {'is installed' if installed else 'was installed already'}; the shop's tables are in schema {FLAG}.")


def take_orders(shop: Shop) -> float:
    """Have the orders come in; returns the database's time at their commit."""
    seconds, committed = shop.take_orders()
    say(
        f"{shop.orders:,} orders inserted by one statement, in {1000 * seconds:.0f} ms; "
        f"a trigger on the table queued a job for each."
    )
    return committed


def watch(shop: Shop, worker: WorkerProcess) -> None:
    """Show how the jobs get on, until all have ended."""
    say()
    bar = ProgressBar(shop.jobs)
    ended, moved = 0, time.monotonic()
    try:
        while ended < shop.jobs:
            looked = time.monotonic()
            now_ended = shop.ended()
            took = time.monotonic() - looked
            bar.show(now_ended)
            if now_ended > ended:
                ended, moved = now_ended, looked
            elif looked - moved > _STALLED:
                raise DemoFailed(f"no job has ended for {_STALLED:g} s: {ended} of {shop.jobs} have")
            worker.check()
            if ended < shop.jobs:
                time.sleep(max(_LOOK_EVERY, 5 * took))  # looking must not cost what is looked at
    finally:
        bar.close()


def tell(shop: Shop, files: Files, seconds: float) -> None:
    """Say what happened."""
    job, task, error = shop.failure()
    rows = [(one.task, one.done, one.failed, one.attempts, one.retried) for one in shop.tallies()]
    say()
    say(table(("task", "done", "failed", "attempts", "retried"), rows))
    say()
    pace = f"{shop.jobs / seconds:,.0f} jobs/s"
    say(f"{shop.jobs:,} jobs in {seconds:.2f} s: {pace}, from the orders' commit to the end of the last job.")
    say("Each of them read or wrote the database or a file, and kept its result.")
    say()
    say(f"Order {shop.by_card}: the card gateway did not answer twice; the third attempt charged the card.")
    say(
        f"Order {shop.misaddressed}: job {job}, task {task}, failed for good. Its last_error in the view pgworker.jobs:"
    )
    say(f"  {error}")
    say()
    counted = {name: f"{files.count(name):,} {name}" for name in ("receipts", "mails")}
    width = max(map(len, counted.values()))
    say("The files:")
    for name, text in counted.items():
        say(f"  {text.ljust(width)}  {files.path / name}")
    say(f"  {'worker log'.ljust(width)}  {files.log}")


def check(shop: Shop, files: Files, status: int) -> None:
    """Raise DemoFailed unless everything went as it should."""
    wrong = [f"the worker ended with status {status}; see {files.log}"] if status else []
    found = {one.task: one for one in shop.tallies()}
    wrong += [
        f"expected {wanted}, found {found.get(wanted.task)}"
        for wanted in shop.expected()
        if found.get(wanted.task) != wanted
    ]
    for name, number in (("receipts", shop.orders), ("mails", shop.orders - 1)):
        if files.count(name) != number:
            wrong.append(f"expected {number} {name}, found {files.count(name)}")
    if wrong:
        raise DemoFailed("not everything went as it should:\n  " + "\n  ".join(wrong))


def what_next(shop: Shop, dsn: str | None) -> str:
    """What to try now."""
    lines = ["", "What next:"]
    checkout = Path("run").is_file() and Path("pgworker.control").is_file()
    if dsn is None:
        lines += [
            f"  {'./run' if checkout else 'pgworker'} demo --dsn postgresql:///mydb",
            "      the same in a database of yours, where the shop and its jobs stay for you to look at",
        ]
    else:
        job, _, _ = shop.failure()
        lines += [
            "  select id, last_error from pgworker.jobs where state = 'failed';",
            "  update pgworker_demo.customers set email = 'kim.noat@example.com' where id = 100;",
            f"  select state from pgworker.retry_jobs(array[{job}]);",
            "      what SQL has to say about it",
        ]
    lines += [f"  {TASKS}", "      the four tasks, a file each"]
    if checkout:
        lines += [
            "  ./run bench",
            "      what the queue does when jobs do nothing themselves",
            "  README.md",
            "      your own first job in five minutes",
        ]
    return "\n".join(lines)
