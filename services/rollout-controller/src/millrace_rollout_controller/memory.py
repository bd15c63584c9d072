"""How much memory a version needs inside a running server, and how much is free there: asked before it is loaded, so that nothing is
killed for memory that others serve from.
"""

import re
from pathlib import Path

import psutil

from millrace_rollout_controller.server_block import Server
from millrace_rollout_controller.state import VersionRef

MIB = 1024 * 1024
_UNITS = {
    "": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50,
}  # fmt: skip
_CGROUP = Path("/sys/fs/cgroup")


def needed_bytes(ref: VersionRef, server: Server, *, factor: float, base_mib: int) -> int:
    """What one more version takes: as declared, else `base_mib` and `factor` times its files."""
    if server.memory_mib is not None:
        return server.memory_mib * MIB
    return base_mib * MIB + round(factor * sum(artifact.size_bytes for artifact in ref.artifacts))


def quantity_bytes(amount: str | int) -> int:
    """A Kubernetes quantity in bytes."""
    found = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(amount))
    if found is None:
        raise ValueError(f"{amount!r} is no quantity")
    return round(float(found[1]) * _UNITS[found[2]])


def free_bytes(pid: int, limit: str | int | None) -> int:
    """What the server `pid` and its children may still take: of its own limit, of this container's, and of the machine."""
    found = [int(psutil.virtual_memory().available)]
    if limit is not None:
        found.append(quantity_bytes(limit) - used_bytes(pid))
    if (container := _container_bytes()) is not None:
        found.append(container)
    return max(0, min(found))


def used_bytes(pid: int) -> int:
    """Memory in use by a process and its children."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for one in family:
        try:
            total += one.memory_info().rss
        except psutil.Error:
            continue
    return total


def _container_bytes() -> int | None:
    """What is left of the container's limit, by cgroups of version 2; files that are only cached may go."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        current = int((_CGROUP / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - current + (int(cached[1]) if cached else 0)
