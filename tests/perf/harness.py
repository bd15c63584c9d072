"""What every measurement shares: the machine, processor time of processes, the table, and the file others read."""

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

FOLDER = Path("build/perf")


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to do the same work."""

    name: str
    requests_per_s: float
    cpu_ms_per_request: float
    """Processor time of everything on the serving side."""
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure with a goal."""

    name: str
    value: float
    goal: float
    holds: bool

    @classmethod
    def at_most(cls, name: str, value: float, goal: float) -> "Ratio":
        """Holds when the value is not above the goal."""
        return cls(f"{name} (at most)", value, goal, value <= goal)

    @classmethod
    def at_least(cls, name: str, value: float, goal: float) -> "Ratio":
        """Holds when the value is not below the goal."""
        return cls(f"{name} (at least)", value, goal, value >= goal)


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = psutil.virtual_memory().total
    return {"cpus": os.cpu_count(), "cpu": model, "memory_gib": round(memory / 2**30, 1), "system": platform.platform()}


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time of processes and their children so far."""
    total = 0.0
    for pid in pids:
        try:
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for process in family:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
    return total


def quantile(sorted_values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    return sorted_values[min(len(sorted_values) - 1, int(share * len(sorted_values)))]


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def report(area: str, contestants: Sequence[Contestant], ratios: Sequence[Ratio]) -> Path:
    """Write `build/perf/<area>.json` and print the table; returns the file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{area}.json"
    content = {
        "area": area,
        "machine": machine(),
        "contestants": [asdict(contestant) for contestant in contestants],
        "ratios": [asdict(ratio) for ratio in ratios],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    width = max(len(item.name) for item in (*contestants, *ratios))
    print(f"\n{area:<{width}}  requests/s  cpu ms/request   p50 ms   p99 ms")
    for one in contestants:
        print(
            f"{one.name:<{width}}  {one.requests_per_s:>10.0f}  {one.cpu_ms_per_request:>14.4f} {one.p50_ms:>8.2f} {one.p99_ms:>8.2f}"
        )
    print(f"\n{'figure':<{width}}  value      goal       holds")
    for ratio in ratios:
        print(f"{ratio.name:<{width}}  {ratio.value:<9.4g}  {ratio.goal:<9.4g}  {'yes' if ratio.holds else 'no'}")
    print(f"\n{path}")
    return path
