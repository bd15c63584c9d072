"""Wakes those who wait for runs to change. It carries no data: a waiter reads the store, so a slow one misses nothing."""

import asyncio


class Changes:
    """One counter and those who wait for it to rise; used on the event loop."""

    def __init__(self) -> None:
        self._count = 0
        self._event = asyncio.Event()

    @property
    def count(self) -> int:
        """Changes so far; take it before reading what may change."""
        return self._count

    def bump(self) -> None:
        """Something changed."""
        self._count += 1
        self._event.set()
        self._event = asyncio.Event()

    async def after(self, count: int, timeout_s: float) -> bool:
        """Wait until there are more changes than `count`; False when none came within `timeout_s`."""
        if self._count > count:
            return True
        try:
            await asyncio.wait_for(self._event.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
