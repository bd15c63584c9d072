"""Time and ids as arguments, so that tests decide both."""

import os
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """Where a service reads the time."""

    def now(self) -> datetime:
        """The wall clock, timezone-aware UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds that only rise, for measuring durations."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> datetime:
        """The wall clock, timezone-aware UTC."""
        return datetime.now(tz=UTC)

    def monotonic(self) -> float:
        """Seconds that only rise, for measuring durations."""
        return time.monotonic()


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._now = start
        self._monotonic = 0.0

    def now(self) -> datetime:
        """The time set so far."""
        return self._now

    def monotonic(self) -> float:
        """Seconds advanced so far."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Move both clocks forward by `seconds`."""
        self._now += timedelta(seconds=seconds)
        self._monotonic += seconds


class IdSource(Protocol):
    """Where a service takes new ids from."""

    def __call__(self) -> str:
        """A new id, unique and sortable by creation time."""
        ...


_lock = threading.Lock()
_last_ms_counter = [0, 0]


def uuid7() -> str:
    """A UUID version 7 (RFC 9562): 48 bits of Unix milliseconds, a 12-bit counter, 62 random bits.

    Ids of one process sort in the order they were made.
    """
    with _lock:
        now_ms = time.time_ns() // 1_000_000
        if now_ms > _last_ms_counter[0]:
            _last_ms_counter[0] = now_ms
            _last_ms_counter[1] = 0
        else:
            _last_ms_counter[1] += 1
            if _last_ms_counter[1] > 0xFFF:  # the counter is full: borrow the next millisecond
                _last_ms_counter[0] += 1
                _last_ms_counter[1] = 0
        stamp, counter = _last_ms_counter
    tail = int.from_bytes(os.urandom(8)) & ((1 << 62) - 1)
    digits = f"{(stamp << 80) | (0x7 << 76) | (counter << 64) | (0b10 << 62) | tail:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
