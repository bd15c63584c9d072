"""The gateway as an xDS server (ADS, state of the world): gRPC clients with an `xds:///<model>` target follow its routes without a proxy."""

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

import grpc.aio
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from millrace_kit.errors import ResourceExhaustedError

from millrace_inference_gateway.envoy_clusters import packed
from millrace_inference_gateway.routes import RouteTable
from millrace_inference_gateway.zero_hop_resources import CLUSTER, ENDPOINTS, LISTENER, ROUTES, resources

log = logging.getLogger(__name__)

# How often a stream looks whether routes or servers have changed.
LOOK_S = 0.05
MAX_NAMES = 4096
_KINDS = (CLUSTER, ENDPOINTS, LISTENER, ROUTES)


@dataclass(slots=True)
class _Subscription:
    """What one stream asked of one type, and the version of what it was sent last."""

    names: frozenset[str] = frozenset()
    version: str = ""
    nonce: int = 0


@dataclass(slots=True)
class _Client:
    """One stream."""

    subscriptions: dict[str, _Subscription] = field(default_factory=dict)
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, request: discovery_pb2.DiscoveryRequest) -> None:
        """Remember what is asked; an acknowledgement changes nothing."""
        if len(request.resource_names) > MAX_NAMES:
            raise ResourceExhaustedError("resource_names", f"more than {MAX_NAMES} resources")
        if request.HasField("error_detail"):
            log.warning("a client refuses %s: %s", request.type_url, request.error_detail.message[:500])
        if request.type_url in _KINDS:
            wanted = self.subscriptions.setdefault(request.type_url, _Subscription())
            if wanted.names != frozenset(request.resource_names):
                wanted.names, wanted.version = frozenset(request.resource_names), ""
                self.asked.set()

    @property
    def models(self) -> frozenset[str]:
        """The models it follows."""
        found = self.subscriptions.get(LISTENER)
        return found.names if found is not None else frozenset()

    def news(self, table: RouteTable) -> list[discovery_pb2.DiscoveryResponse]:
        """What it has not been sent yet; clusters before the routes that name them."""
        found = []
        for kind in _KINDS:
            wanted = self.subscriptions.get(kind)
            if wanted is None or not wanted.names:
                continue
            response = discovery_pb2.DiscoveryResponse(
                type_url=kind, resources=[packed(one) for one in resources(table, kind, wanted.names).values()]
            )
            digest = hashlib.sha256(b"".join(one.value for one in response.resources)).hexdigest()[:16]
            if digest != wanted.version:
                wanted.version, wanted.nonce = digest, wanted.nonce + 1
                response.version_info, response.nonce = digest, str(wanted.nonce)
                found.append(response)
        return found


class ZeroHopServicer(ads_pb2_grpc.AggregatedDiscoveryServiceServicer):  # type: ignore[misc]
    """ADS; `in_force` gives the routes Envoy has, so that both ways change together."""

    def __init__(
        self, in_force: Callable[[], RouteTable | None], max_clients: int, wake: Callable[[str, str], object]
    ) -> None:
        self._in_force = in_force
        self._wake = wake
        self._max_clients = max_clients
        self._clients = 0
        self._followed: Counter[str] = Counter()

    @property
    def followers(self) -> Mapping[str, int]:
        """Clients by the model they follow."""
        return self._followed

    def _follow(self, table: RouteTable, before: frozenset[str], now: frozenset[str]) -> None:
        """Whoever follows a model may call it at any moment, unseen: it counts as used, and is woken where it sleeps."""
        self._followed.update(now - before)
        self._followed.subtract(before - now)
        self._followed = +self._followed
        routes = (table.routes[model] for model in now if model in table.routes)
        for arm in (arm for route in routes if route.asleep for arm in route.arms if arm.asleep and arm.weight):
            self._wake(arm.model, arm.version)

    async def StreamAggregatedResources(
        self, requests: AsyncIterator[discovery_pb2.DiscoveryRequest], _context: grpc.aio.ServicerContext
    ) -> AsyncIterator[discovery_pb2.DiscoveryResponse]:
        """What the client asks for, now and after every change."""
        if self._clients >= self._max_clients:
            raise ResourceExhaustedError("max_zero_hop_clients", f"{self._max_clients} clients follow already")
        self._clients += 1
        client = _Client()
        reading = asyncio.create_task(_read(requests, client))
        seen: RouteTable | None = None
        models: frozenset[str] = frozenset()
        try:
            while not reading.done():
                table = self._in_force()
                if table is not None and (table is not seen or client.asked.is_set()):
                    client.asked.clear()
                    seen = table
                    before, models = models, client.models
                    self._follow(table, before, models)
                    for response in client.news(table):
                        yield response
                asked = asyncio.ensure_future(client.asked.wait())
                await asyncio.wait({reading, asked}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                asked.cancel()
            await reading
        finally:
            reading.cancel()
            self._clients -= 1
            self._follow(RouteTable(), models, frozenset())


async def _read(requests: AsyncIterator[discovery_pb2.DiscoveryRequest], client: _Client) -> None:
    async for request in requests:
        client.take(request)
