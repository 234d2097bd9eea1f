"""What the numbers depend on besides the software: the machine, its disk, the server's settings."""

from __future__ import annotations

import os
import platform
import statistics
import time
from pathlib import Path

import psycopg

from pgworker_client.embedded import EmbeddedServer


def settings() -> dict[str, str]:
    """Return the server settings of the measurements; what is not named is PostgreSQL's default."""
    return {"shared_buffers": f"{min(1024, _memory() // 4)}MB", "max_connections": "200"}


def facts(server: EmbeddedServer) -> dict[str, str]:
    """Return what is worth knowing beside the numbers."""
    with psycopg.connect(server.dsn()) as conn:
        shown = conn.execute("""
            select current_setting('server_version'), current_setting('fsync'), current_setting('synchronous_commit'),
                   current_setting('shared_buffers')""").fetchone()
    assert shown is not None
    return {
        "machine": f"{os.cpu_count()} cores, {_processor()}, {_memory() / 1024:.0f} GiB, {platform.system()}",
        "PostgreSQL": f"{shown[0]}, fsync {shown[1]}, synchronous_commit {shown[2]}, shared_buffers {shown[3]}, "
        "all else default; reached by Unix socket",
        "disk": f"{server.directory.parent} ({_file_system(server.directory)}), writing and syncing 8 kB takes "
        f"{_sync_cost(server.directory) * 1000:.2f} ms",
    }


def load() -> str:
    """Return how busy the machine has been in the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def _memory() -> int:
    """Return the machine's memory in MB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _file_system(place: Path) -> str:
    """Return the type of the file system that ``place`` lies on."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return "unknown file system"
    over = [(len(mount[1]), mount[2]) for mount in mounts if place.resolve().is_relative_to(mount[1])]
    return max(over)[1] if over else "unknown file system"


def _sync_cost(place: Path, times: int = 200) -> float:
    """Return the median seconds of overwriting 8 kB and waiting until the disk has them, as a commit does."""
    sync = getattr(os, "fdatasync", os.fsync)
    path = place / "sync"
    with path.open("w+b", buffering=0) as file:
        file.write(bytes(8192))
        sync(file.fileno())
        costs = []
        for _ in range(times):
            begun = time.perf_counter()
            os.pwrite(file.fileno(), bytes(8192), 0)
            sync(file.fileno())
            costs.append(time.perf_counter() - begun)
    path.unlink()
    return statistics.median(costs)
