"""A generic step: sends a mail.

The demo's mail server is a directory: each mail is a file there, which any mail program opens.
"""

from __future__ import annotations

import re
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from pgworker_client import BlockingContext, Fail


def handle(payload: dict[str, Any], ctx: BlockingContext) -> dict[str, Any]:
    """``{"to", "subject", "text", "attach", "file"}``. An address that cannot be right fails the job for good."""
    if not re.fullmatch(r"[^@\s]+@[^@\s]+\.[^@\s]+", payload["to"]):
        raise Fail(f"{payload['to']!r} is not an e-mail address")
    attached = Path(payload["attach"])
    mail = EmailMessage()
    mail["From"] = "The shop <shop@example.com>"
    mail["To"] = payload["to"]
    mail["Subject"] = payload["subject"]
    mail["Message-ID"] = f"<{ctx.job.id}@shop.example.com>"
    mail.set_content(payload["text"])
    mail.add_attachment(attached.read_text(encoding="utf-8"), subtype="html", filename=attached.name)
    file = Path(payload["file"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(mail.as_bytes())
    return {"file": str(file)}
