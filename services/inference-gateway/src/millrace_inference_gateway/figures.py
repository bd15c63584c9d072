"""Requests, errors and latency of every version, counted from this process's start."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

# Buckets from 0.1 ms to over 60 s, each 5 % wider than the one before: a quantile is known to 5 %.
FIRST_MS, GROWTH, LAST_MS = 0.1, 1.05, 60_000.0
BOUNDS_MS = tuple(FIRST_MS * GROWTH**i for i in range(math.ceil(math.log(LAST_MS / FIRST_MS) / math.log(GROWTH)) + 1))
# gRPC statuses that are the server's fault: UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE,
# DATA_LOSS.
SERVER_FAULTS = frozenset({2, 4, 8, 12, 13, 14, 15})
# Versions whose figures are kept; the one not seen for longest goes.
MAX_VERSIONS = 1000


@dataclass(slots=True)
class VersionCounts:
    """Counts of one version; `buckets[i]` has the requests up to `BOUNDS_MS[i]`, the last those above."""

    requests: int = 0
    errors: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_MS) + 1))

    def latency(self) -> Iterator[tuple[float, int]]:
        """Upper bound in ms and count of the buckets that are not empty; always ends with the unbounded one."""
        for bound, count in zip(BOUNDS_MS, self.buckets, strict=False):
            if count:
                yield bound, count
        yield math.inf, self.buckets[-1]


class Figures:
    """Counts by model and version."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], VersionCounts] = {}

    def record(self, model: str, version: str, status: int, latency_ms: float) -> None:
        """Count one finished request; `status` is its gRPC status."""
        counts = self._counts.pop((model, version), None) or VersionCounts()
        self._counts[(model, version)] = counts
        if len(self._counts) > MAX_VERSIONS:
            del self._counts[next(iter(self._counts))]
        counts.requests += 1
        counts.errors += status in SERVER_FAULTS
        counts.buckets[bisect_left(BOUNDS_MS, latency_ms)] += 1

    def versions(self, model: str = "") -> list[tuple[str, str, VersionCounts]]:
        """Model, version and counts, sorted; empty `model` gives all."""
        return [(m, v, counts) for (m, v), counts in sorted(self._counts.items()) if model in {"", m}]
