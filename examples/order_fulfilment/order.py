"""The tree of an order, and the worker that runs its jobs: ``pgworker run examples.order_fulfilment.order``.

Each step changes the shop's tables and ends its job in one transaction, so it is done once or not at all; and so is
what undoes it.
"""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from examples.order_fulfilment.shop import CHARGE, PRICE, REFUND, RELEASE, RESERVE
from pgworker_client import BlockingContext, Context, Fail, Node, Worker, children

worker = Worker()


def order_tree(item: str, quantity: int, customer: str, notify_url: str) -> Node:
    """An order, as ``add_job_tree`` takes it."""
    goods = {"item": item, "quantity": quantity}
    reserve = Node("reserve", goods, name="reserve", compensate=Node("release"))
    charge = Node("charge", {"customer": customer}, name="charge", after=[reserve], compensate=Node("refund"))
    notify = Node("notify", {"url": notify_url, "order": goods}, name="notify", after=[charge], max_attempts=1)
    return Node("fulfil-order", {**goods, "customer": customer}, children=[reserve, charge, notify])


@worker.task
async def reserve(payload: dict[str, Any], ctx: Context) -> None:
    """Take the goods out of the stock."""
    async with ctx.connection() as conn:
        price = await (await conn.execute(PRICE, payload)).fetchone()
    async with ctx.transaction(result={"amount": price[0] if price else 0}) as conn:
        if await (await conn.execute(RESERVE, payload)).fetchone() is None:
            raise Fail(f"there are not {payload['quantity']} of {payload['item']}")


@worker.task
async def charge(payload: dict[str, Any], ctx: Context) -> None:
    """Take the money, as much as the step before found out."""
    assert ctx.job.parent_id is not None
    async with ctx.connection() as conn:
        (reserved,) = [job for job in await children(conn, ctx.job.parent_id) if job.name == "reserve"]
    charged = {"customer": payload["customer"], "amount": reserved.result["amount"]}
    async with ctx.transaction(result=charged) as conn:
        if await (await conn.execute(CHARGE, charged)).fetchone() is None:
            raise Fail(f"{payload['customer']} cannot pay {charged['amount']}")


@worker.task(timeout=30)
def notify(payload: dict[str, Any], _ctx: BlockingContext) -> None:
    """Have the goods shipped, if the service is up."""
    body = json.dumps(payload["order"]).encode()
    request = urllib.request.Request(payload["url"], body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10):
        pass


@worker.task("fulfil-order")
async def fulfil_order(_payload: dict[str, Any], _ctx: Context) -> dict[str, Any]:
    """The root: every step has been done."""
    return {"shipped": True}


@worker.task
async def refund(payload: dict[str, Any], ctx: Context) -> None:
    """Undo a charge: give back what its result says."""
    async with ctx.transaction() as conn:
        await conn.execute(REFUND, payload["node"]["result"])


@worker.task
async def release(payload: dict[str, Any], ctx: Context) -> None:
    """Undo a reservation: put back what its payload says."""
    async with ctx.transaction() as conn:
        await conn.execute(RELEASE, payload["node"]["payload"])
