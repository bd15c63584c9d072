"""Where the servers of an arm come from: what its route lists, or the EndpointSlices of the Service it names."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any, Protocol, TypeAlias

from millrace_inference_gateway.latency_weights import LatencyWeights
from millrace_inference_gateway.routes import MAX_ENDPOINTS, Arm, Endpoint, RouteTable, Service

IPV4, IPV6 = "IPv4", "IPv6"
GRPC_PORT = "grpc"
# Of the servers that a zone would have if all had as many.
LEAST_SHARE = 0.8
SERVICE_LABEL = "kubernetes.io/service-name"


class EndpointSource(Protocol):
    """Knows the servers of an arm now, and says when that changes."""

    def endpoints(self, arm: Arm) -> tuple[Endpoint, ...]:
        """The servers that should take traffic of `arm`."""
        ...

    def on_changed(self, listener: Callable[[], None]) -> None:
        """Have `listener` called, in the event loop, when any arm's servers may have changed."""
        ...


class ListedEndpoints:
    """The servers a route lists; they change only with the route."""

    def endpoints(self, arm: Arm) -> tuple[Endpoint, ...]:
        """As listed."""
        return arm.endpoints

    def on_changed(self, listener: Callable[[], None]) -> None:
        """Nothing ever changes."""


def resolved(table: RouteTable, source: EndpointSource, weights: LatencyWeights | None = None) -> RouteTable:
    """`table` with the servers `source` knows, and their weights where latency makes them."""
    routes = {}
    for model, route in table.routes.items():
        # What is left of a version that fell asleep is on its way out.
        arms = tuple(replace(arm, endpoints=() if arm.asleep else source.endpoints(arm)) for arm in route.arms)
        if weights is not None and route.balancing == "response_time":
            arms = tuple(weights.weighted(arm) for arm in arms)
        routes[model] = replace(route, arms=arms)
    return RouteTable(table.generation, routes)


@dataclass(frozen=True, slots=True)
class Pod:
    """One endpoint's conditions, as the EndpointSlice API means them: absent is ready, serving, not terminating."""

    ready: bool = True
    serving: bool = True
    terminating: bool = False
    zone: str = ""
    name: str = ""
    """Of the pod, where the slice says it."""


Ports: TypeAlias = tuple[tuple[str, int], ...]
"""Name and number of the ports of a slice's pods."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One EndpointSlice: the Service it belongs to, its pods by address, and their ports."""

    service: str
    family: str
    pods: Mapping[str, Pod]
    ports: Ports = ()


def read_slice(item: Mapping[str, Any]) -> Slice:
    """An EndpointSlice object (discovery.k8s.io/v1) as a value; an address that is no IP address is left out."""
    family = item.get("addressType", IPV4)
    pods: dict[str, Pod] = {}
    for endpoint in item.get("endpoints") or ():
        conditions = endpoint.get("conditions") or {}
        ready = conditions.get("ready") is not False
        serving = conditions.get("serving")
        pod = Pod(
            ready,
            ready if serving is None else bool(serving),
            bool(conditions.get("terminating")),
            endpoint.get("zone") or "",
            (endpoint.get("targetRef") or {}).get("name") or "",
        )
        # All addresses of one endpoint lead to the same pod; the API says to use the first.
        for address in (endpoint.get("addresses") or ())[:1]:
            if _is_ip(address):
                pods[address] = pod
    labels = item["metadata"].get("labels") or {}
    ports = tuple((port.get("name") or "", port["port"]) for port in item.get("ports") or () if port.get("port"))
    return Slice(labels.get(SERVICE_LABEL, ""), family, pods, ports)


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def pods_in_rotation(slices: Iterable[Slice]) -> tuple[tuple[str, Ports], ...]:
    """Addresses of a Service that should take new requests, with their ports, sorted.

    Ready pods. When there is none, those that still serve though they terminate. When there is none of them either, those that are
    not said to be ready: a node that lost the API server has all its pods unready there while they answer, and Envoy's own health
    checks know better.
    """
    ranks: dict[str, dict[tuple[str, Ports], int]] = {IPV4: {}, IPV6: {}}
    for each in slices:
        known = ranks.setdefault(each.family, {})
        for address, pod in each.pods.items():
            # A pod that moves between slices is in two of them for a moment, with what was known of it then and now.
            known[address, each.ports] = min(_rank(pod), known.get((address, each.ports), _UNUSABLE))
    # A Service of two families lists every pod twice.
    found = ranks[IPV4] or ranks[IPV6]
    best = min(found.values(), default=_UNUSABLE)
    return tuple(sorted(place for place, rank in found.items() if rank == best < _UNUSABLE)[:MAX_ENDPOINTS])


def pod_port(ports: Ports, wanted: int) -> int:
    """The port of a pod that `wanted`, a port of its Service, leads to.

    A Service may give its port another number at the pods; the model server's is then the one named `grpc`, or the only one.
    """
    numbers = dict(ports)
    if not ports or wanted in numbers.values():
        return wanted
    return numbers.get(GRPC_PORT, ports[0][1] if len(ports) == 1 else wanted)


_UNUSABLE = 3


def _rank(pod: Pod) -> int:
    if pod.ready and not pod.terminating:
        return 0
    if pod.serving:
        return 1
    return _UNUSABLE if pod.terminating else 2


def _where_it_is(followed: tuple[Endpoint, ...], arm: Arm) -> tuple[Endpoint, ...]:
    """Of servers that hold several versions, those of which the route says that they hold this one.

    They are ready when they hold what stable needs, and one that joined may lack room for another version. Where none of those the route
    knows is left, the controller is late: a server tries everything it should hold before it is ready.
    """
    listed = {(endpoint.host, endpoint.port) for endpoint in arm.endpoints}
    return tuple(one for one in followed if (one.host, one.port) in listed) or followed


def near_first(endpoints: tuple[Endpoint, ...], zone: str) -> tuple[Endpoint, ...]:
    """Those of other zones marked as far, when the own zone has its share of them.

    A zone with fewer servers than its share would be given more than they take, for gateways are spread evenly: then all are near.
    """
    zones = {endpoint.zone for endpoint in endpoints}
    near = sum(endpoint.zone == zone for endpoint in endpoints)
    if not zone or "" in zones or near * len(zones) < len(endpoints) * LEAST_SHARE:
        return endpoints
    return tuple(replace(endpoint, far=endpoint.zone != zone) for endpoint in endpoints)


@dataclass(slots=True)
class SliceEndpoints:
    """What is known of the EndpointSlices of one namespace.

    A Service of which no slice was seen yet, or none is left, is served from what the route lists and from `remembered`, the servers
    of the last run: that is all there is while the API server is away, and Envoy's health checks sort out the dead. So are, besides what
    the slices say, Services that have no ready pod there.
    """

    namespace: str
    remembered: dict[Service, tuple[Endpoint, ...]] = field(default_factory=dict)
    synced: bool = False
    """Whether the API server has answered in this run."""
    _slices: dict[str, Slice] = field(default_factory=dict)
    _rotation: dict[str, tuple[tuple[str, Ports], ...]] = field(default_factory=dict)
    _listeners: list[Callable[[], None]] = field(default_factory=list)
    own_pod: str = ""
    """Name of this gateway's pod, where servers of its own zone shall come first."""
    _zones: dict[str, dict[tuple[str, Ports], str]] = field(default_factory=dict)

    def endpoints(self, arm: Arm) -> tuple[Endpoint, ...]:
        """Servers of the arm's Service."""
        service = arm.service
        if service is None or service.namespace != self.namespace:
            return arm.endpoints
        pods = self._rotation.get(service.name)
        if pods is not None:
            zones = self._zones.get(service.name, {})
            followed = tuple(
                Endpoint(address, pod_port(ports, service.port), zone=zones.get((address, ports), ""))
                for address, ports in pods
            )
            if arm.server_version and arm.candidate:
                followed = _where_it_is(followed, arm)
            found = tuple(dict.fromkeys((*followed, *self._unheard(service.name, arm))))
            return near_first(found, self._own_zone())
        remembered = () if self.synced else self.remembered.get(service, ())
        return tuple(dict.fromkeys((*arm.endpoints, *remembered)))

    def _own_zone(self) -> str:
        """The zone of this gateway's own pod; empty when it is not asked for or not known yet."""
        if not self.own_pod:
            return ""
        found = (pod.zone for each in self._slices.values() for pod in each.pods.values() if pod.name == self.own_pod)
        return next(found, "")

    def _unheard(self, service: str, arm: Arm) -> tuple[Endpoint, ...]:
        """What the route lists and no slice speaks of, while no pod of the slices is ready.

        The controller may have heard of new pods before this gateway did, and a route to a Service without servers fails its calls;
        Envoy's health checks sort out those that are long gone.
        """
        mine = [each for each in self._slices.values() if each.service == service]
        if any(_rank(pod) == 0 for each in mine for pod in each.pods.values()):
            return ()
        known = {address for each in mine for address in each.pods}
        return tuple(endpoint for endpoint in arm.endpoints if endpoint.host not in known)

    def on_changed(self, listener: Callable[[], None]) -> None:
        """Have `listener` called after a change."""
        self._listeners.append(listener)

    def replace(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Take a whole list in the place of what was known."""
        self._slices = {item["metadata"]["name"]: read_slice(item) for item in items}
        services = {each.service for each in self._slices.values()}
        for name in self._rotation.keys() - services:
            del self._rotation[name]
            self._zones.pop(name, None)
        self.synced = True
        self._refresh(services)

    def put(self, item: Mapping[str, Any]) -> None:
        """Take one slice that is new or has changed."""
        name = item["metadata"]["name"]
        before = self._slices.get(name)
        now = self._slices[name] = read_slice(item)
        self._refresh({now.service, before.service if before else now.service})

    def remove(self, item: Mapping[str, Any]) -> None:
        """Forget a slice."""
        before = self._slices.pop(item["metadata"]["name"], None)
        if before is not None:
            self._refresh({before.service})

    def _refresh(self, services: Iterable[str]) -> None:
        for name in services:
            slices = [each for each in self._slices.values() if each.service == name]
            if slices:
                self._rotation[name] = pods_in_rotation(slices)
                self._zones[name] = {
                    (address, each.ports): pod.zone for each in slices for address, pod in each.pods.items()
                }
            else:
                self._zones.pop(name, None)
                self._rotation.pop(name, None)
        for listener in self._listeners:
            listener()
