"""A task that meets trouble which passes: the card gateway answers at the third attempt only."""

from __future__ import annotations

from typing import Any

from pgworker_client import Context, Retry

_ANSWERS_AT = 3


async def handle(payload: dict[str, Any], ctx: Context) -> dict[str, Any]:
    """``{"order": id}``. Any exception would be retried; `Retry` says when, instead of the usual backoff."""
    if ctx.job.attempts < _ANSWERS_AT:
        raise Retry(in_=0.2 * ctx.job.attempts, reason="the card gateway did not answer")
    return {"order": payload["order"], "charged": True}
