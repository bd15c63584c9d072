"""Where the services are and what proves who is who: from the environment, else the ports of a local run in plain text."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from millrace_kit.settings import TlsSettings

PORT_BASE = 7400


@dataclass(frozen=True)
class Endpoints:
    """`host:port` of each service's gRPC server."""

    ingestion: str
    feature: str
    registry: str
    training: str
    drift: str
    rollout: str
    gateway: str
    """The gateway's public address: V2 inference and `Predict`."""
    gateway_admin: str
    """The gateway's own server: figures."""

    @classmethod
    def local(cls, port_base: int = PORT_BASE, host: str = "127.0.0.1") -> "Endpoints":
        """The ports of `millrace up` with this port base."""
        at = [f"{host}:{port_base + offset}" for offset in range(8)]
        return cls(
            gateway=at[0],
            ingestion=at[1],
            feature=at[2],
            registry=at[3],
            training=at[4],
            gateway_admin=at[5],
            drift=at[6],
            rollout=at[7],
        )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Endpoints":
        """`MILLRACE_<SERVICE>_ADDRESS` each, else the local port; `MILLRACE_PORT_BASE` moves those."""
        environment = os.environ if environment is None else environment
        local = cls.local(int(environment.get("MILLRACE_PORT_BASE", PORT_BASE)))
        names = (field.name for field in fields(cls))
        return cls(
            **{name: environment.get(f"MILLRACE_{name.upper()}_ADDRESS", getattr(local, name)) for name in names}
        )


def tls_from_environment(environment: Mapping[str, str] | None = None) -> TlsSettings | None:
    """`MILLRACE_TLS_CERT`, `MILLRACE_TLS_KEY` and `MILLRACE_TLS_CA` (PEM files) for mutual TLS with the services; None without them.

    Raises:
        ValueError: only some of the three are set; the message names the missing ones.
    """
    environment = os.environ if environment is None else environment
    names = ("MILLRACE_TLS_CERT", "MILLRACE_TLS_KEY", "MILLRACE_TLS_CA")
    missing = [name for name in names if not environment.get(name)]
    if len(missing) == len(names):
        return None
    if missing:
        raise ValueError(f"{', '.join(missing)}: mutual TLS needs certificate, key and authority")
    cert_file, key_file, ca_file = (environment[name] for name in names)
    return TlsSettings(cert_file=cert_file, key_file=key_file, ca_file=ca_file)
