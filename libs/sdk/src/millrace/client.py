"""`Client`: every service of one Millrace installation, by area, with the same typed messages the services speak."""

import os
from types import TracebackType
from typing import Self

from millrace_kit.client import open_sync_channel
from millrace_kit.settings import TlsSettings

from millrace.areas.data import FeatureArea, IngestionArea
from millrace.areas.definitions import DefinitionsArea
from millrace.areas.lifecycle import RegistryArea, TrainingArea
from millrace.areas.serving import DriftArea, GatewayArea, PredictionArea, RolloutArea
from millrace.areas.sources import SourcesArea
from millrace.areas.transformers import TransformerArea
from millrace.areas.vectors import VectorArea
from millrace.endpoints import Endpoints, tls_from_environment


class Client:
    """A blocking client; close it or use it as a context manager. Channels connect on first use.

    Args:
        endpoints: where the services are.
        tls: certificates for mutual TLS with the services; None connects in plain text (one machine).
        gateway_tls: the same for the gateway's public address, which has its own mode of TLS; None connects in plain text.
    """

    def __init__(
        self,
        endpoints: Endpoints | None = None,
        tls: TlsSettings | None = None,
        gateway_tls: TlsSettings | None = None,
    ) -> None:
        self.endpoints = endpoints or Endpoints.from_environment()
        self.tls = tls
        self._channels = {
            name: open_sync_channel(getattr(self.endpoints, name), gateway_tls if name == "gateway" else tls)
            for name in ("ingestion", "feature", "registry", "training", "drift", "rollout", "gateway", "gateway_admin")
        }
        self.ingestion = IngestionArea(self._channels["ingestion"])
        self.sources = SourcesArea(self._channels["ingestion"])
        self.features = FeatureArea(self._channels["feature"])
        self.transformers = TransformerArea(self._channels["feature"])
        self.definitions = DefinitionsArea(self._channels["feature"])
        self.vectors = VectorArea(self._channels["feature"])
        self.registry = RegistryArea(self._channels["registry"])
        self.training = TrainingArea(self._channels["training"])
        self.drift = DriftArea(self._channels["drift"])
        self.rollout = RolloutArea(self._channels["rollout"])
        self.predictions = PredictionArea(self._channels["gateway"])
        self.gateway = GatewayArea(self._channels["gateway_admin"])

    @classmethod
    def from_environment(cls) -> "Client":
        """A client of the addresses in `MILLRACE_*_ADDRESS`, else of a local run; mutual TLS by `MILLRACE_TLS_*`, and with
        `MILLRACE_GATEWAY_TLS=mutual` for the gateway's public address too.
        """
        tls = tls_from_environment()
        mutual = os.environ.get("MILLRACE_GATEWAY_TLS", "none") == "mutual"
        return cls(Endpoints.from_environment(), tls, tls if mutual else None)

    def close(self) -> None:
        """Close every channel."""
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
