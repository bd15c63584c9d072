"""Where services are looked for."""

from pathlib import Path

from millrace.endpoints import Endpoints
from millrace.local.processes import process_table


def test_local_ports() -> None:
    at = Endpoints.from_environment({})
    assert (at.gateway, at.ingestion, at.rollout) == ("127.0.0.1:7400", "127.0.0.1:7401", "127.0.0.1:7407")


def test_the_environment_wins() -> None:
    at = Endpoints.from_environment({"MILLRACE_PORT_BASE": "9000", "MILLRACE_REGISTRY_ADDRESS": "registry:443"})
    assert (at.ingestion, at.registry) == ("127.0.0.1:9001", "registry:443")


def test_no_two_processes_share_a_port() -> None:
    table = process_table(Path("/state"), 9000, Path("/lock"))
    ports = [port for process in table for port in process.ports]
    assert len(ports) == len(set(ports))
    assert len({process.name for process in table}) == len(table)
