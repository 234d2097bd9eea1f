"""The first step of a receipt: reads the order and hands over to `render`, which knows nothing of orders."""

from __future__ import annotations

from typing import Any

from pgworker_client import Context, Fail, add_job

_ORDER = """
select o.id, o.ordered_at::date::text, c.name, c.email,
       sum(i.quantity * i.price_cents),
       array_agg(array[i.article, i.quantity::text, (i.quantity * i.price_cents)::text] order by i.line)
from pgworker_demo.orders o
join pgworker_demo.customers c on c.id = o.customer_id
join pgworker_demo.order_items i on i.order_id = o.id
where o.id = %s
group by o.id, c.id
"""


async def handle(payload: dict[str, Any], ctx: Context) -> None:
    """``{"order": id}``. What is read, the next job and the end of this one are one transaction: exactly once."""
    async with ctx.transaction(result={"handed_over_to": "render"}) as conn:
        order = await (await conn.execute(_ORDER, [payload["order"]])).fetchone()
        if order is None:
            raise Fail(f"there is no order {payload['order']}")
        number, day, name, email, cents, items = order
        lines = [f"{quantity:>3} x {article:<24}{_money(int(price)):>10}" for article, quantity, price in items]
        values = {"number": number, "day": day, "name": name, "total": _money(cents), "lines": "\n".join(lines)}
        file = f"receipts/{number:06}.html"
        mail = {
            "to": email,
            "subject": f"Receipt for order {number}",
            "text": f"Dear {name},\n\nyour order of {day} comes to {values['total']}. The receipt is attached.\n",
            "attach": file,
            "file": f"mails/{number:06}.eml",
        }
        await add_job(
            conn,
            "render",
            {"template": "receipt.html", "values": values, "file": file, "then": {"task": "send", "payload": mail}},
            flags=ctx.job.flags,
        )


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02} EUR"
