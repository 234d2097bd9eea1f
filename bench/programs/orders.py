"""What a producer process is told on standard input, and answers: the producer's half of the protocol.

``single N BYTES`` adds N jobs, each in a transaction of its own; ``bulk N BYTES`` adds N at once; ``timed N MS`` adds N
that say when they were sent, pausing MS milliseconds after each. ``steady N MS`` adds N a second, with a pause of MS
milliseconds after each call, until there is another line, which is not obeyed, and says ``@ added N``. Each is answered
by ``@ took NS``. Payloads are ``{"id": 1}``, with BYTES other than 0 and a text of that many bytes, which do not
compress.
"""

from __future__ import annotations

import asyncio
import base64
import os
import select
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

WARMING_UP = 20

Payload = dict[str, Any]


async def obey(
    add: Callable[[Payload], Awaitable[object]], add_many: Callable[[list[Payload]], Awaitable[object]]
) -> None:
    """Obey until the input ends.

    Nothing else runs meanwhile: reading the input blocks the event loop.

    Args:
        add: adds one job of task noop.
        add_many: adds many with one call, or as few as the queue's library takes.

    """

    async def single(count: int, size: int) -> None:
        more = padding(size)
        for number in range(count):
            await add({"id": number, **more})

    async def bulk(count: int, size: int) -> None:
        more = padding(size)
        await add_many([{"id": number, **more} for number in range(count)])

    async def timed(count: int, pause: int) -> None:
        for _ in range(count):
            await add({"sent": str(time.monotonic_ns())})
            await asyncio.sleep(pause / 1000)

    async def steady(rate: int, pause: int) -> None:
        begun, added = time.monotonic(), 0
        while not select.select([sys.stdin], [], [], 0)[0]:  # the order is all that was sent, so no line is in a buffer
            if late := int((time.monotonic() - begun) * rate) - added:
                await add_many([{"id": added + number} for number in range(late)])
                added += late
            await asyncio.sleep(pause / 1000)
        sys.stdin.readline()
        print("@ added", added, flush=True)

    ways: dict[str, Callable[[int, int], Awaitable[None]]] = {
        "single": single, "bulk": bulk, "timed": timed, "steady": steady,
    }  # fmt: skip
    await single(WARMING_UP, 0)  # the connection is there and its statements are prepared
    print("@ ready", flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        count, other = map(int, numbers)
        begun = time.monotonic_ns()
        await ways[what](count, other)
        print("@ took", time.monotonic_ns() - begun, flush=True)


def padding(size: int) -> Payload:
    """Return what makes a payload larger by about ``size`` bytes."""
    return {"text": base64.b64encode(os.urandom(size)).decode()[:size]} if size else {}
