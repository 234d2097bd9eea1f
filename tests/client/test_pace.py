"""How far ahead jobs are claimed: about a tenth of a second of work."""

from __future__ import annotations

import asyncio

import pytest

from pgworker_client.feed import Feed
from pgworker_client.pace import Pace


def steady(
    pace: Pace, per_second: float, seconds: float, *, done: int = 0, busy: float = 0.0
) -> tuple[int, int, float]:
    """Let jobs end at that pace, asked every 10 ms; returns the last answer and where the counters stand."""
    ahead = 0
    for _ in range(int(seconds / 0.01)):
        busy += 0.01
        done = int(per_second * busy)
        ahead = pace.ahead(done, busy)
    return ahead, done, busy


@pytest.mark.parametrize(("per_second", "expected"), [(100, 10), (3000, 300), (50_000, 1000), (5, 0), (0.2, 0)])
def test_a_tenth_of_a_second_of_work_is_claimed_ahead(per_second: float, expected: int) -> None:
    ahead, _, _ = steady(Pace(1000, 10), per_second, 10)
    assert expected * 0.6 <= ahead <= expected * 1.7


def test_the_buffer_is_never_exceeded() -> None:
    assert steady(Pace(7, 10), 50_000, 5)[0] == 7
    assert steady(Pace(0, 10), 50_000, 5)[0] == 0


def test_a_worker_starts_carefully() -> None:
    pace = Pace(1000, 4)
    assert pace.ahead(0, 0.0) == 0
    # Four jobs in no time at all prove little.
    assert pace.ahead(4, 0.000_01) <= 4
    assert pace.ahead(8, 0.000_02) <= 20


def test_after_quick_jobs_long_ones_stop_the_claiming_ahead() -> None:
    pace = Pace(1000, 10)
    _, done, busy = steady(pace, 20_000, 2)
    assert pace.ahead(done, busy) == 1000
    assert pace.ahead(done + 2, busy + 2.0) == 0


async def turns() -> None:
    """Give the event loop more turns than anything here needs."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_a_feed_wakes_one_runner_for_jobs_that_never_suspend() -> None:
    feed = Feed(asyncio.get_running_loop(), lambda: None)
    ran: list[int] = []

    async def runner(number: int) -> None:
        feed.join()
        while not feed.closed:
            while feed.jobs:
                feed.jobs.popleft()
                ran.append(number)
            await feed.park()

    tasks = [asyncio.create_task(runner(number)) for number in range(5)]
    await turns()
    assert (feed.idle, feed.quiet) == (5, True)
    feed.put([(n,) for n in range(100)])
    await turns()
    assert len(ran) == 100
    assert len(set(ran)) == 1
    feed.close()
    await asyncio.gather(*tasks)


async def test_a_feed_wakes_a_runner_for_each_job_that_suspends() -> None:
    feed = Feed(asyncio.get_running_loop(), lambda: None)
    go, inside = asyncio.Event(), list[int]()

    async def runner() -> None:
        feed.join()
        while not feed.closed:
            if not feed.jobs:
                await feed.park()
                continue
            inside.append(feed.jobs.popleft()[0])
            await go.wait()

    tasks = [asyncio.create_task(runner()) for _ in range(5)]
    await turns()
    feed.put([(n,) for n in range(4)])
    await turns()
    assert inside == [0, 1, 2, 3]
    assert feed.idle == 1
    go.set()
    feed.close()
    await asyncio.gather(*tasks)


async def test_what_waits_in_the_feed_can_be_taken_back() -> None:
    feed = Feed(asyncio.get_running_loop(), lambda: None)
    feed.put([(1,), (2,), (3,)])
    assert feed.take(2) == (2,)
    assert feed.take(2) is None
    assert feed.oldest() > 0
    assert feed.take_all() == [(1,), (3,)]
    assert feed.oldest() == 0
