"""Where services are looked for."""

from pathlib import Path

import pytest
from millrace.endpoints import Endpoints, tls_from_environment
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


def test_certificates_come_whole_or_not_at_all() -> None:
    whole = {"MILLRACE_TLS_CERT": "c", "MILLRACE_TLS_KEY": "k", "MILLRACE_TLS_CA": "a"}
    tls = tls_from_environment(whole)
    assert tls is not None
    assert (tls.cert_file, tls.key_file, tls.ca_file) == ("c", "k", "a")
    assert tls_from_environment({}) is None
    with pytest.raises(ValueError, match="MILLRACE_TLS_KEY"):
        tls_from_environment({"MILLRACE_TLS_CERT": "c", "MILLRACE_TLS_CA": "a"})
