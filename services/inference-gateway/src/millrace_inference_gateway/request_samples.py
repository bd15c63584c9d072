"""Some of the requests that models answered lately, in memory: what new servers are warmed up with. Bounded in every direction."""

from collections import deque

MAX_MODELS = 1000
MAX_SAMPLES = 64
"""Of one model."""
MAX_SAMPLE_BYTES = 256 * 1024
"""Of one request; larger ones are not kept."""
MAX_BYTES = 64 * 1024 * 1024
"""Of all together; the model that was asked longest ago gives way."""
SPACING_S = 0.1
"""Least time between two of one model, so that one caller's burst is not all there is."""


class RequestSamples:
    """The newest requests by model."""

    def __init__(self) -> None:
        self._kept: dict[str, deque[bytes]] = {}
        self._newest_s: dict[str, float] = {}
        self._bytes = 0

    def wants(self, model: str, at_s: float) -> bool:
        """Whether a request of the model that was answered at `at_s` would be kept."""
        return at_s - self._newest_s.get(model, -SPACING_S) >= SPACING_S

    def add(self, model: str, request: bytes, at_s: float) -> None:
        """Keep a serialized `ModelInferRequest` that was answered at `at_s` (any clock that rises), where there is room for it."""
        if not request or len(request) > MAX_SAMPLE_BYTES or not self.wants(model, at_s):
            return
        kept = self._kept.pop(model, None)
        if kept is None:
            kept = deque()
        self._kept[model] = kept
        self._newest_s[model] = at_s
        kept.append(request)
        self._bytes += len(request)
        while len(kept) > MAX_SAMPLES:
            self._bytes -= len(kept.popleft())
        while self._bytes > MAX_BYTES or len(self._kept) > MAX_MODELS:
            oldest = next(iter(self._kept))
            self._bytes -= sum(map(len, self._kept.pop(oldest)))
            self._newest_s.pop(oldest, None)

    def newest(self, model: str, limit: int) -> list[bytes]:
        """At most `limit` of a model, newest first."""
        return list(reversed(self._kept.get(model, ())))[:limit]
