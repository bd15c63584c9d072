"""Holds calls of versions that are asleep, and has the rollout controller start their servers.

However many calls wait for a version, there is one wake: the controller is asked once a second until the routes in force say that the
version is awake and Envoy finds one of its servers healthy. A wake goes on when its callers have gone; asking twice, or by two gateways,
is asking once.
"""

import asyncio
import logging
from collections import Counter as Counts
from collections.abc import Awaitable, Callable, Mapping

import grpc
import grpc.aio
from millrace_api.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from millrace_kit.call_door import DoorCall, Method
from millrace_kit.clock import Clock
from millrace_kit.errors import UnavailableError
from prometheus_client import Counter, Gauge, Histogram

from millrace_inference_gateway.envoy_control import POLL_S, Servers, servers
from millrace_inference_gateway.envoy_wake import WAKE_PATH
from millrace_inference_gateway.routes import RouteTable
from millrace_inference_gateway.settings import WakeSettings

log = logging.getLogger(__name__)

ASK_S = 1.0
"""Time between two questions to the controller while a version is still asleep, and deadline of each."""
WAKES = Counter("millrace_gateway_wakes_total", "Wakes of a version that was asleep.", ["model", "version", "outcome"])
WAKE_SECONDS = Histogram(
    "millrace_gateway_wake_seconds",
    "From the first call of a version that was asleep until its servers take calls.",
    ["model"],
    buckets=(0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600),
)
HELD = Gauge("millrace_gateway_held_calls", "Calls that wait for a version to wake.")
REFUSED = Counter(
    "millrace_gateway_held_calls_refused_total", "Calls of a version that was asleep, refused.", ["reason"]
)

_ASKED = ("model", "version", "protocol", "attempt")
Name = tuple[str, str]
"""Model and version."""


class Waker:
    """Wakes versions.

    Args:
        channel: to the rollout controller.
        in_force: the routes Envoy has.
        healthy: servers that take traffic, as Envoy says.
        clock: for waits.
        settings: how many calls may wait, and how long.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        in_force: Callable[[], RouteTable | None],
        healthy: Callable[[], Awaitable[Servers]],
        clock: Clock,
        settings: WakeSettings,
    ) -> None:
        self._stub = rollout_pb2_grpc.RolloutServiceStub(channel)
        self._in_force = in_force
        self._healthy = healthy
        self._clock = clock
        self._settings = settings
        self._wakes: dict[Name, asyncio.Task[None]] = {}
        self._held: Counts[Name] = Counts()
        self._reasons: dict[Name, str] = {}
        """What the controller says a wake waits for."""

    @property
    def held(self) -> Mapping[Name, int]:
        """Calls that wait now."""
        return self._held

    async def hold(self, model: str, version: str, *, http: bool = False) -> None:
        """Return when the version has a server that takes calls, those of V2 over HTTP if so asked.

        Raises:
            UnavailableError: too many calls are held, or it took too long.
        """
        limit = self._settings.max_held_calls
        if self._held.total() >= limit:
            REFUSED.labels("limit").inc()
            text = f"{limit} calls wait for versions to wake, which is the limit (wake.max_held_calls); retry later"
            raise UnavailableError("TOO_MANY_HELD_CALLS", text, {"model": model, "version": version})
        self._held[model, version] += 1
        HELD.inc()
        try:
            async with asyncio.timeout(self._settings.max_wait_s):
                # The wake is everybody's: one caller that goes away does not end it.
                await asyncio.shield(self.wake(model, version))
                while http and not await self._awake((model, version), http=True):  # noqa: ASYNC110 - Envoy has no event
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            REFUSED.labels("timeout").inc()
            reason = self._reasons.get((model, version), "")
            text = f"{version} of {model} did not wake within {self._settings.max_wait_s:g} s; retry later"
            text += f" ({reason})" if reason else ""
            raise UnavailableError("WAKE_TIMEOUT", text, {"model": model, "version": version}) from None
        finally:
            HELD.dec()
            self._held[model, version] -= 1
            if not self._held[model, version]:
                del self._held[model, version]

    def wake(self, model: str, version: str) -> "asyncio.Task[None]":
        """Begin to wake the version, if nobody does; it ends when the version is awake, or with UnavailableError."""
        name = model, version
        task = self._wakes.get(name)
        if task is None:
            task = self._wakes[name] = asyncio.create_task(self._wake(name), name=f"wake {model} {version}")
            task.add_done_callback(lambda done: self._ended(name, done))
        return task

    def _ended(self, name: Name, task: "asyncio.Task[None]") -> None:
        self._wakes.pop(name, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s of %s does not wake: %s", name[1], name[0], error)

    async def _wake(self, name: Name) -> None:
        started = self._clock.monotonic()
        outcome = "failed"
        try:
            async with asyncio.timeout(self._settings.max_wait_s):
                await self._until_awake(name)
            outcome = "awake"
            WAKE_SECONDS.labels(name[0]).observe(self._clock.monotonic() - started)
        finally:
            WAKES.labels(*name, outcome).inc()

    async def _until_awake(self, name: Name) -> None:
        asked_at: float | None = None
        while not await self._awake(name):
            now = self._clock.monotonic()
            if asked_at is None or now - asked_at >= ASK_S:
                asked_at = now
                await self._ask(name)
            await asyncio.sleep(POLL_S)

    async def _ask(self, name: Name) -> None:
        request = rollout_pb2.WakeVersionRequest(model=name[0], version=name[1])
        try:
            answer = await self._stub.WakeVersion(request, timeout=ASK_S)
            self._reasons = {each: why for each, why in self._reasons.items() if each in self._wakes}
            self._reasons[name] = answer.waiting
        except grpc.aio.AioRpcError as error:
            log.info("%s of %s cannot be woken now: %s", name[1], name[0], error.details() or error.code().name)

    async def _awake(self, name: Name, *, http: bool = False) -> bool:
        table = self._in_force()
        if table is None:
            return False
        route = table.routes.get(name[0])
        arm = next((arm for arm in route.arms if arm.version == name[1]), None) if route is not None else None
        if arm is None:
            text = f"{name[1]} of {name[0]} is not in the routes any more"
            raise UnavailableError("VERSION_GONE", text, {"model": name[0], "version": name[1]})
        if arm.asleep or not arm.endpoints:
            return False
        # Servers known by name only are not on Envoy's page under it; the route's retries cover what is left of the wait.
        if not all(each.is_ip for each in arm.endpoints):
            return True
        wanted = {(arm.http_cluster, f"{each.http.host}:{each.http.port}") for each in arm.endpoints}
        return bool((wanted if http else servers(arm.cluster, arm)) & await self._healthy())

    def close(self) -> None:
        """End what is under way."""
        for task in self._wakes.values():
            task.cancel()


def wake_methods(waker: Waker) -> dict[str, Method]:
    """What Envoy asks at the wake door: a message without fields, the version's name in the headers."""

    async def hold(call: DoorCall) -> bytes:
        model, version, protocol, attempt = (
            call.metadata.get(f"x-millrace-{name}".encode(), b"").decode() for name in _ASKED
        )
        if attempt != "0":
            # Envoy's main thread has the servers and one of its workers not yet.
            await asyncio.sleep(POLL_S)
        await waker.hold(model, version, http=protocol == "http")
        return b""

    return {WAKE_PATH: hold}
