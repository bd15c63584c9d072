"""What is tuned of `spec.server`, and the steps from one configuration to its neighbours. Pure."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from millrace_kit.errors import InvalidArgumentError

from millrace_rollout_controller.server_block import Server, check_server

MAX_BATCH_SIZE = 4096
MAX_INSTANCES = 16
DELAYS_US = (0, 200, 1000, 5000, 20_000)
"""Waits that are tried: each about five times the one before, for less is lost in noise."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The fields of `spec.server` that are tuned."""

    instances: int
    max_batch_size: int
    queue_delay_us: int
    preferred_sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, server: Server) -> "Configuration":
        """Those of a manifest's block."""
        return cls(
            server.instances, server.max_batch_size, server.queue_delay_us, tuple(server.batching.preferred_sizes)
        )

    def applied(self, server: Server) -> Server:
        """The block with these fields; all others stay."""
        return server.model_copy(
            update={
                "instances": self.instances,
                "max_batch_size": self.max_batch_size,
                "queue_delay_us": self.queue_delay_us,
                "batching": server.batching.model_copy(update={"preferred_sizes": self.preferred_sizes}),
            }
        )

    @property
    def size(self) -> tuple[int, ...]:
        """Smaller is simpler: fewer copies of the model first, then smaller batches, then shorter waits."""
        return (self.instances, self.max_batch_size, self.queue_delay_us, len(self.preferred_sizes))

    @property
    def words(self) -> str:
        """As people write it in a manifest."""
        words = f"instances: {self.instances}, maxBatchSize: {self.max_batch_size}, queueDelayUs: {self.queue_delay_us}"
        sizes = ", ".join(map(str, self.preferred_sizes))
        return f"{words}, preferredSizes: [{sizes}]" if sizes else words


Line = Callable[[Configuration], Iterator[Configuration]]
"""A direction: ever further configurations from one."""


@dataclass(frozen=True, slots=True)
class Space:
    """Where configurations are looked for."""

    server: Server
    """The manifest's block: rules of several fields hold for every configuration."""
    p99_ms: float
    max_instances: int = MAX_INSTANCES
    min_batch_size: int = 1
    """A smaller maxBatchSize refuses requests of more rows, so callers decide it, not speed."""
    rows: float = 1.0
    """Mean rows of a request."""

    def holds(self, one: Configuration) -> bool:
        """Whether it may be tried."""
        if not 1 <= one.instances <= self.max_instances or one.max_batch_size > MAX_BATCH_SIZE:
            return False
        if one.max_batch_size < self.min_batch_size or one.queue_delay_us / 1000.0 >= self.p99_ms:
            return False
        try:
            check_server(one.applied(self.server))
        except InvalidArgumentError:
            return False
        return True

    def lines(self, concurrency: int) -> tuple[Line, ...]:
        """Directions to go in, in the order in which they promise most.

        Args:
            concurrency: calls at once at which the best configuration so far did best; a batch cannot grow beyond it.
        """
        return (
            _no_wait,
            _more_instances,
            _fewer_instances,
            lambda one: _larger_batches(one, int(concurrency * self.rows)),
            _smaller_batches,
            lambda one: _longer_wait(one, int(concurrency * self.rows)),
            _shorter_wait,
            _any_size,
        )


def _no_wait(one: Configuration) -> Iterator[Configuration]:
    if one.queue_delay_us:
        yield replace(one, queue_delay_us=0, preferred_sizes=())


def _more_instances(one: Configuration) -> Iterator[Configuration]:
    while one.instances < MAX_INSTANCES:
        one = replace(one, instances=one.instances * 2)
        yield one


def _fewer_instances(one: Configuration) -> Iterator[Configuration]:
    while one.instances > 1:
        one = replace(one, instances=one.instances // 2)
        yield one


def _larger_batches(one: Configuration, rows: int) -> Iterator[Configuration]:
    # More than all rows under way are in no batch.
    while one.max_batch_size < min(rows, MAX_BATCH_SIZE):
        one = replace(one, max_batch_size=one.max_batch_size * 2)
        yield one


def _smaller_batches(one: Configuration) -> Iterator[Configuration]:
    while one.max_batch_size > 1:
        size = one.max_batch_size // 2
        one = replace(
            one, max_batch_size=size, preferred_sizes=tuple(kept for kept in one.preferred_sizes if kept <= size)
        )
        yield one


def _longer_wait(one: Configuration, rows: int) -> Iterator[Configuration]:
    """With a size at which a batch waits no longer: without it all calls under way can wait for one that never comes."""
    share = max(1, rows // one.instances)
    size = min(1 << (share.bit_length() - 1), one.max_batch_size)
    sizes = (size,) if size > 1 else ()
    for delay_us in DELAYS_US:
        if delay_us > one.queue_delay_us and sizes:
            yield replace(one, queue_delay_us=delay_us, preferred_sizes=sizes)


def _shorter_wait(one: Configuration) -> Iterator[Configuration]:
    for delay_us in reversed(DELAYS_US):
        if 0 < delay_us < one.queue_delay_us:
            yield replace(one, queue_delay_us=delay_us)


def _any_size(one: Configuration) -> Iterator[Configuration]:
    if one.preferred_sizes:
        yield replace(one, preferred_sizes=())


def milliseconds(text: str, where: str) -> float:
    """Length of a short time like 20ms, 1.5s or 800us; `where` is named when it is none."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)(us|ms|s)", text)
    value = float(match[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[match[2]] if match else 0.0
    if not 0 < value <= 600_000:
        raise InvalidArgumentError(where, "needs a time like 20ms, 1.5s or 800us, at most 600s")
    return value
