"""How much memory a version needs inside a running server, and how much is free there: asked before it is loaded, so that nothing is
killed for memory that others serve from.

Of a server on GPUs their memory is meant, by the server's own metrics, else that of its process.
"""

import re
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from millrace_rollout_controller.server_block import Server
from millrace_rollout_controller.state import VersionRef

MIB = 1024 * 1024
_UNITS = {
    "": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50,
}  # fmt: skip
_CGROUP = Path("/sys/fs/cgroup")
_GPU_TOTAL, _GPU_USED = "nv_gpu_memory_total_bytes", "nv_gpu_memory_used_bytes"


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


def free_bytes(pid: int, limit: str | int | None, *, own_container: bool = True) -> int:
    """What the server `pid` and its children may still take: of its own limit, of the machine, and of this process's container where the
    server runs in it too (`own_container`).
    """
    found = [int(psutil.virtual_memory().available)]
    if limit is not None:
        found.append(quantity_bytes(limit) - used_bytes(pid))
    if own_container and (container := _container_bytes()) is not None:
        found.append(container)
    return max(0, min(found))


def gpu_free_bytes(metrics: str) -> int:
    """Free memory of the fullest GPU that a Triton sees, from the text of its metrics: an instance on each of them needs room on each.

    Raises:
        ValueError: the text says nothing of GPUs.
    """
    found: dict[str, dict[str, float]] = {_GPU_TOTAL: {}, _GPU_USED: {}}
    lines = [line for line in metrics.splitlines() if line.startswith((_GPU_TOTAL, _GPU_USED))]
    for family in text_string_to_metric_families("\n".join([*lines, ""])):
        for sample in family.samples:
            found[sample.name][sample.labels.get("gpu_uuid", "")] = sample.value
    used = found[_GPU_USED]
    free = [total - used[gpu] for gpu, total in found[_GPU_TOTAL].items() if gpu in used]
    if not free:
        raise ValueError(f"the server's metrics have no {_GPU_TOTAL} and {_GPU_USED}")
    return max(0, round(min(free)))


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
