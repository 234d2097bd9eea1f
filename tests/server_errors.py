"""What a server's log says that it must never say."""

from __future__ import annotations

import re

from pgworker_client.embedded import EmbeddedServer


def log_length(server: EmbeddedServer) -> int:
    """Return the length of the server's log in bytes: what is in it so far is not the fault of what comes."""
    return server.log.stat().st_size


def errors(server: EmbeddedServer, since: int = 0) -> list[str]:
    """Return what the log says, from that byte on, of deadlocks and of anything that is no fault of a client.

    With each, what is said of the processes that it names while they waited (``log_lock_waits``).
    """
    text = server.log.read_bytes()[since:].decode(errors="replace")
    entries = re.split(r"^(?=\S+ \S+ \S+ \[\d+\] )", text, flags=re.M)
    found = []
    for n, entry in enumerate(entries):
        if re.search("deadlock detected|PANIC:|violates|XX000", entry):
            pids = set(re.findall(r"[Pp]rocess (\d+)", entry + entries[min(n + 1, len(entries) - 1)]))
            pids |= set(re.findall(r"^\S+ \S+ \S+ \[(\d+)\]", entry))
            about = [e for e in entries[max(0, n - 60) : n + 12] if any(f"[{pid}]" in e for pid in pids)]
            # Of statements the first line says enough.
            found.append(re.sub(r"^\t +.*\n", "", "".join(about), flags=re.M)[-12000:])
    return found
