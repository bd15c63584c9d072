"""Which answers are checked, and their way out of a read: one hash a row, then a bounded queue."""

import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from millrace_kit.clock import Clock

from millrace_feature.consistency.metrics import SAMPLES
from millrace_feature.rows import Scalar
from millrace_feature.serving import CompiledService, Entity
from millrace_feature.tiles import encode_key
from millrace_feature.training import carried_names
from millrace_feature.worker import to_us

AHEAD_US = 1_000_000
"""A read about an instant further ahead than this has no past to be compared with."""
_SPREAD = 2_654_435_761
"""Knuth's multiplier: neighbouring checksums come apart."""
_HASHES = 1 << 32


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to be checked."""

    digest: str
    """Hash of the definitions it was made with."""
    feature_service: str
    entity: tuple[Scalar, ...]
    """Values of `training.carried_names`."""
    asked_us: int
    """Instant the values were asked for, in microseconds since the epoch."""
    served_us: int
    values: tuple[float, ...]
    """The vector; NaN where missing."""


def is_sampled(key: str, threshold: int) -> bool:
    """Whether the entity with this encoded key is among those checked; `threshold` of 2^32 keys are, the same in every process."""
    return (zlib.crc32(key.encode()) * _SPREAD) % _HASHES < threshold


class Sampler:
    """Takes answers from reads without making them wait.

    Args:
        sample_rate: share of entities.
        max_queue: answers that may wait here; more are dropped and counted.
        clock: wall clock.
    """

    def __init__(self, *, sample_rate: float, max_queue: int, clock: Clock) -> None:
        self._threshold = round(sample_rate * _HASHES)
        self._max_queue = max_queue
        self._clock = clock
        self._names: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._queue: deque[Sample] = deque()
        self._lock = threading.Lock()

    def observe(
        self, service: CompiledService, rows: Sequence[Entity], at_us: int, values_of: Callable[[int], Sequence[float]]
    ) -> None:
        """Note the answers whose entity is sampled; see `serving.Observe`."""
        keys, carried = self._columns(service)
        threshold = self._threshold
        if len(keys) == 1:
            key = keys[0]
            chosen = [i for i, row in enumerate(rows) if is_sampled(str(row.get(key)), threshold)]
        else:
            texts = [encode_key([str(row.get(key)) for key in keys]) for row in rows]
            chosen = [i for i, text in enumerate(texts) if is_sampled(text, threshold)]
        if not chosen:
            return
        served_us = to_us(self._clock.now())
        if at_us > served_us + AHEAD_US:
            SAMPLES.labels("future").inc(len(chosen))
            return
        for i in chosen:
            row = rows[i]
            entity = tuple(row.get(name) for name in carried)
            self._offer(Sample(service.digest, service.plan.name, entity, at_us, served_us, tuple(values_of(i))))

    def _columns(self, service: CompiledService) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(join keys, carried names) of a service."""
        place = service.digest, service.plan.name
        found = self._names.get(place)
        if found is None:
            if len(self._names) > 1000:  # definitions come and go
                self._names.clear()
            found = self._names[place] = tuple(service.plan.join_keys), tuple(carried_names(service.plan))
        return found

    def _offer(self, sample: Sample) -> None:
        with self._lock:
            if len(self._queue) >= self._max_queue:
                SAMPLES.labels("dropped").inc()
                return
            self._queue.append(sample)

    def waiting(self, limit: int) -> list[Sample]:
        """The oldest samples; they stay until `forget`."""
        with self._lock:
            return [self._queue[i] for i in range(min(limit, len(self._queue)))]

    def forget(self, count: int) -> None:
        """Drop the oldest `count` samples, which are logged."""
        with self._lock:
            for _ in range(count):
                self._queue.popleft()
