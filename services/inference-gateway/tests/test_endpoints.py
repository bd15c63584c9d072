"""Which servers the EndpointSlices of a Service stand for; no cluster needed."""

from dataclasses import dataclass

import pytest
from gateway import arm, route
from millrace_api.rollout.v1 import rollout_pb2
from millrace_inference_gateway.endpoints import SliceEndpoints, pod_port, read_slice, resolved
from millrace_inference_gateway.routes import Arm, Endpoint, Service, check_routes
from millrace_kit.errors import InvalidArgumentError

SERVICE = Service("ml", "delay-1-0-0", 8001)


def slice_of(
    name: str, *endpoints: dict, service: str = "delay-1-0-0", family: str = "IPv4", ports=((("grpc"), 8001),)
):
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": [{"name": n, "port": p} for n, p in ports],
    }


LISTED = "10.9.9.99"


def pod(address: str, **conditions: bool) -> dict:
    return {"addresses": [address], "conditions": conditions}


def served(source: SliceEndpoints, *listed: str, service: Service | None = SERVICE) -> list[str]:
    endpoints = tuple(Endpoint(host, 8001) for host in listed)
    found = source.endpoints(Arm("delay", "1.0.0", "", False, 10_000, endpoints, service))
    return [f"{endpoint.host}:{endpoint.port}" for endpoint in found]


@pytest.mark.parametrize(
    ("endpoints", "wanted"),
    [
        ([pod("10.0.0.2"), pod("10.0.0.1")], ["10.0.0.1", "10.0.0.2"]),
        ([pod("10.0.0.1", ready=True), pod("10.0.0.2", ready=False, serving=False)], ["10.0.0.1"]),
        # One that ends leaves at once, even while it still serves.
        (
            [pod("10.0.0.1", ready=True), pod("10.0.0.2", ready=False, serving=True, terminating=True)],
            ["10.0.0.1"],
        ),
        # None is ready: those that still serve, and what the controller may have heard of first.
        (
            [
                pod("10.0.0.1", ready=False, serving=False),
                pod("10.0.0.2", ready=False, serving=True, terminating=True),
                pod("10.0.0.3", ready=False, serving=False, terminating=True),
            ],
            ["10.0.0.2", LISTED],
        ),
        # A node out of touch: all of it unready, and Envoy's health checks decide.
        ([pod("10.0.0.1", ready=False, serving=False), pod("10.0.0.2", ready=False)], ["10.0.0.1", "10.0.0.2", LISTED]),
        ([pod("10.0.0.3", ready=False, serving=False, terminating=True)], [LISTED]),
        # One that is known to end is not served because the route still lists it.
        ([pod(LISTED, ready=False, serving=False, terminating=True)], []),
        ([pod("nonsense"), {"addresses": []}, pod("10.0.0.1")], ["10.0.0.1"]),
        ([], [LISTED]),
    ],
)
def test_conditions(endpoints: list[dict], wanted: list[str]) -> None:
    source = SliceEndpoints("ml")
    source.put(slice_of("a", *endpoints))
    assert served(source, LISTED) == [f"{address}:8001" for address in wanted]


def test_a_service_of_two_families_has_every_pod_once() -> None:
    source = SliceEndpoints("ml")
    source.put(slice_of("six", pod("fd00::1"), pod("fd00::2"), family="IPv6"))
    assert served(source) == ["fd00::1:8001", "fd00::2:8001"]
    source.put(slice_of("four", pod("10.0.0.1"), pod("10.0.0.2")))
    source.put(slice_of("names", pod("x.example"), family="FQDN"))
    assert served(source) == ["10.0.0.1:8001", "10.0.0.2:8001"]


def test_many_slices_and_a_pod_that_moves_between_them() -> None:
    source = SliceEndpoints("ml")
    for number in range(3):
        source.put(slice_of(f"s{number}", *(pod(f"10.0.{number}.{host}") for host in range(100))))
    assert len(served(source)) == 300
    source.put(slice_of("s3", pod("10.0.0.5", ready=False, serving=False)))
    assert len(served(source)) == 300
    assert "10.0.0.5:8001" in served(source)
    source.remove(slice_of("s0"))
    assert len(served(source)) == 200
    source.remove(slice_of("s0"))


def test_what_is_known_without_slices() -> None:
    source = SliceEndpoints("ml", {SERVICE: (Endpoint("10.9.9.9", 8001),)})
    # Before the API server answered: what the route lists and what served last time.
    assert served(source, "10.0.0.7") == ["10.0.0.7:8001", "10.9.9.9:8001"]
    source.replace([slice_of("a", pod("10.0.0.1"))])
    assert served(source, "10.0.0.7") == ["10.0.0.1:8001"]
    # Somebody deleted the Service: its pods may still be there.
    source.replace([])
    assert served(source, "10.0.0.7") == ["10.0.0.7:8001"]
    assert served(source, "10.0.0.7", service=Service("elsewhere", "delay-1-0-0", 8001)) == ["10.0.0.7:8001"]
    assert served(source, "10.0.0.7", service=None) == ["10.0.0.7:8001"]


def test_a_version_beside_others_is_where_the_route_has_it() -> None:
    source = SliceEndpoints("ml")
    source.put(slice_of("a", pod("10.0.0.1"), pod("10.0.0.2"), pod("10.0.0.3", ready=False)))

    def hosts(*listed: str, candidate: bool = True) -> list[str]:
        endpoints = tuple(Endpoint(host, 8001) for host in listed)
        arm = Arm("delay", "1.1.0", "", candidate, 0, endpoints, SERVICE, server_version="1000001000000")
        return [endpoint.host for endpoint in source.endpoints(arm)]

    assert hosts("10.0.0.2", "10.0.0.3", "10.0.0.9") == ["10.0.0.2"], "the other ready one does not hold it"
    assert hosts("10.0.0.9") == ["10.0.0.1", "10.0.0.2"], "all that the controller knew are gone"
    assert hosts("10.0.0.2", candidate=False) == ["10.0.0.1", "10.0.0.2"], "ready is to hold stable"


def test_listeners_hear_of_every_change() -> None:
    source, heard = SliceEndpoints("ml"), []
    source.on_changed(lambda: heard.append(served(source)))
    source.replace([slice_of("a", pod("10.0.0.1"))])
    source.put(slice_of("a", pod("10.0.0.1"), pod("10.0.0.2")))
    source.remove(slice_of("a"))
    assert heard == [["10.0.0.1:8001"], ["10.0.0.1:8001", "10.0.0.2:8001"], []]


def test_ports() -> None:
    assert pod_port((), 8001) == 8001
    assert pod_port((("http", 8000), ("grpc", 8001)), 8001) == 8001
    assert pod_port((("http", 8000), ("grpc", 9001)), 8001) == 9001
    assert pod_port((("", 9001),), 8001) == 9001
    assert pod_port((("a", 1), ("b", 2)), 8001) == 8001
    assert read_slice({"metadata": {"name": "x"}}).pods == {}


@dataclass
class Fixed:
    def endpoints(self, arm: Arm) -> tuple[Endpoint, ...]:
        return (Endpoint("10.1.1.1", 1),)

    def on_changed(self, listener: object) -> None: ...


def test_a_route_names_its_service() -> None:
    made = route(arm("1.0.0", "10.0.0.1:8001"))
    made.arms[0].service = "ml/delay-1-0-0:8001"
    table = check_routes(rollout_pb2.Routes(generation=3, models=[made]))
    (only,) = table.arms.values()
    assert only.service == SERVICE
    assert [a.endpoints for a in resolved(table, Fixed()).arms.values()] == [(Endpoint("10.1.1.1", 1),)]
    for wrong in ("delay:8001", "ml/delay", "ml/delay:0", "ml/delay:70000", "ML/delay:1", "ml/" + "x" * 64 + ":1"):
        made.arms[0].service = wrong
        with pytest.raises(InvalidArgumentError, match=r"arms\[0\]\.service"):
            check_routes(rollout_pb2.Routes(generation=3, models=[made]))
