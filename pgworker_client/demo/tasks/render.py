"""A generic step: fills in a template, writes the file, and hands over to whatever task it was told."""

from __future__ import annotations

import html
from pathlib import Path
from string import Template
from typing import Any

from pgworker_client import BlockingContext, add_job

_TEMPLATES = Path(__file__).parent / "templates"


def handle(payload: dict[str, Any], ctx: BlockingContext) -> None:
    """``{"template", "values", "file", "then": {"task", "payload"}}``; not async, so it runs in a thread.

    The worker's directory is where files go. Rendering twice writes the same file, so a second attempt does no harm.
    """
    template = Template((_TEMPLATES / payload["template"]).read_text(encoding="utf-8"))
    values = {name: html.escape(str(value)) for name, value in payload["values"].items()}
    file = Path(payload["file"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(template.substitute(values), encoding="utf-8")
    with ctx.transaction(result={"file": str(file)}) as conn:
        add_job(conn, payload["then"]["task"], payload["then"]["payload"], flags=ctx.job.flags)
