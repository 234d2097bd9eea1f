"""What ``doctor`` finds, by subject."""

from __future__ import annotations

from tests.calling import Conn, rows


def found(conn: Conn, subject: str = "") -> list[tuple[str, str, str]]:
    """Return severity, subject and finding of what is found whose subject begins so; there is advice with each."""
    findings = rows(conn, "select * from pgworker.doctor()")
    assert all(each["advice"] for each in findings)
    return [(f["severity"], f["subject"], f["finding"]) for f in findings if f["subject"].startswith(subject)]
