"""The tree of a report, and the worker that runs its jobs: ``pgworker run examples.monthly_report.report``."""

from __future__ import annotations

import json
import urllib.request
from datetime import date
from pathlib import Path
from typing import Any

from examples.monthly_report.page import render_page
from examples.monthly_report.sales import DAYS
from pgworker_client import BlockingContext, Context, Node, Worker, children

worker = Worker()


def report_tree(month: date, categories: list[str], rates_url: str, directory: Path) -> Node:
    """The report of a month, as ``add_job_tree`` takes it."""
    about = {"month": month.isoformat()}
    sums = [Node("sum-up", {**about, "category": category}, name=category) for category in categories]
    rates = Node("exchange-rates", {"url": rates_url}, name="rates", on_failure="ignore", max_attempts=1)
    file = directory / f"monthly-report-{month:%Y-%m}.html"
    page = Node("render", {**about, "file": str(file)}, name="page", after=[*sums, rates])
    return Node("monthly-report", about, children=[*sums, rates, page])


@worker.task("sum-up")
async def sum_up(payload: dict[str, Any], ctx: Context) -> dict[str, Any]:
    """One category: what was sold on each day. The database does the work."""
    async with ctx.connection() as conn:
        days = await (await conn.execute(DAYS, payload)).fetchall()
    return {
        "sales": sum(sales for _, sales, _ in days),
        "days": [{"day": day, "revenue": round(revenue, 2)} for day, _, revenue in days],
    }


@worker.task("exchange-rates", timeout=30)
def exchange_rates(payload: dict[str, Any], ctx: BlockingContext) -> dict[str, float]:
    """What a euro is worth elsewhere, if the service is up."""
    ctx.progress({"asked": payload["url"]})  # what is left to be seen when it fails
    with urllib.request.urlopen(payload["url"], timeout=10) as answer:
        return {str(currency): float(rate) for currency, rate in json.load(answer).items()}


@worker.task
def render(payload: dict[str, Any], ctx: BlockingContext) -> dict[str, Any]:
    """The page, from the results of the siblings that this job was to come after."""
    assert ctx.job.parent_id is not None
    with ctx.connection() as conn:
        siblings = children(conn, ctx.job.parent_id)
    results = {job.name: job.result for job in siblings if job.name and job.state == "completed"}
    rates = results.pop("rates", None)
    file = Path(payload["file"])
    unfinished = file.with_suffix(".part")  # nobody shall see half a page, and this job may run twice
    unfinished.write_text(render_page(date.fromisoformat(payload["month"]), results, rates), encoding="utf-8")
    unfinished.replace(file)
    return {"file": str(file), "revenue": round(sum(d["revenue"] for r in results.values() for d in r["days"]), 2)}


@worker.task("monthly-report")
async def monthly_report(_payload: dict[str, Any], ctx: Context) -> dict[str, Any]:
    """The root: its result is what somebody who added the tree asks for."""
    values = await ctx.children_values()
    missing = await ctx.failed_children_values()
    (page,) = [job.id for job in await ctx.children() if job.name == "page"]
    return {**values[page], "missing": list(missing.values())}
