"""Evidence bundles on their way to the registry, each sent until it is kept there."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from millrace_kit.clock import Clock

from millrace_rollout_controller.state import Bundle

RETRY_S = 5.0
"""Wait after the registry did not take a bundle."""
MAX_KEPT = 1000
"""Names of bundles the registry is known to have."""


class Archive:
    """Sends bundles in the background.

    Args:
        put: gives a bundle to the registry; says whether it is kept.
        clock: for the wait between two tries.
    """

    def __init__(self, put: Callable[[Bundle], Awaitable[bool]], clock: Clock) -> None:
        self._put = put
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._again_at: dict[str, float] = {}
        self._kept: dict[str, None] = {}

    def left(self, bundles: Iterable[Bundle]) -> list[Bundle]:
        """Those not kept yet; each is being sent, or will be when asked again."""
        waiting = [bundle for bundle in bundles if bundle.sha256 not in self._kept]
        for bundle in waiting:
            name = bundle.sha256
            if name not in self._tasks and self._clock.monotonic() >= self._again_at.get(name, 0.0):
                self._tasks[name] = asyncio.create_task(self._send(bundle))
        return waiting

    async def _send(self, bundle: Bundle) -> None:
        try:
            if await self._put(bundle):
                self._again_at.pop(bundle.sha256, None)
                self._kept = dict.fromkeys([*self._kept, bundle.sha256][-MAX_KEPT:])
            else:
                self._again_at[bundle.sha256] = self._clock.monotonic() + RETRY_S
        finally:
            del self._tasks[bundle.sha256]

    def close(self) -> None:
        """Stop sending; what is not kept is sent by the next start."""
        for task in self._tasks.values():
            task.cancel()
