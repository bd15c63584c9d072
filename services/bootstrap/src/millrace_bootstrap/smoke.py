"""What `helm test` runs: real calls to every service, over the network and the certificates that everything else uses.

It leaves one contract and one model behind, the same at every run; three records are written each time.
"""

import json
import logging
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from millrace_api.drift.v1 import drift_pb2, drift_pb2_grpc
from millrace_api.feature.v1 import feature_pb2, feature_pb2_grpc
from millrace_api.ingestion.v1 import ingestion_pb2, ingestion_pb2_grpc
from millrace_api.prediction.v1 import prediction_pb2, prediction_pb2_grpc
from millrace_api.registry.v1 import registry_pb2, registry_pb2_grpc
from millrace_api.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from millrace_api.training.v1 import training_pb2, training_pb2_grpc
from millrace_kit.client import channel_options, open_sync_channel
from millrace_kit.clock import uuid7
from millrace_kit.errors import MillraceError

from millrace_bootstrap.settings import SmokeSettings

log = logging.getLogger(__name__)
RECORDS = 3
RETRY_S = 0.5
GATEWAY_METHODS = "/inference.GRPCInferenceService/"


class UnexpectedAnswerError(Exception):
    """A service answered something else than it should."""


@dataclass(frozen=True)
class Result:
    """What one check found."""

    service: str
    call: str
    seconds: float
    said: str
    problem: str = ""


class Smoke:
    """Every check, over channels that live as long as this.

    Raises:
        CertificateError: at construction, when the certificates cannot be used.
    """

    def __init__(self, settings: SmokeSettings, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._clock = clock
        self._open = ExitStack()

    def run(self, deadline: float) -> Sequence[Result]:
        """Run every check whose address is set; one that fails hides none of the others. `deadline` is of `time.monotonic`."""
        results = []
        with self._open:
            for service, call, check in self._checks():
                started = time.monotonic()
                said, problem = "", ""
                if started > deadline:
                    results.append(Result(service, call, 0.0, "", "the deadline of the whole test had passed"))
                    continue
                try:
                    said = self._patiently(check)
                except grpc.RpcError as error:
                    answer = MillraceError.from_rpc(error)
                    problem = f"{answer.code.name} {answer.reason}: {answer.message}"
                except Exception as error:
                    log.exception("%s %s", service, call)
                    problem = f"{type(error).__name__}: {error}"
                results.append(Result(service, call, time.monotonic() - started, said, problem))
        return results

    def _patiently(self, check: Callable[[], str]) -> str:
        """The check, again while a service is away: a test may come in the middle of a rollout."""
        end = time.monotonic() + self._settings.patience_s
        while True:
            try:
                return check()
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                    raise
                log.warning("not yet: %s", error.details())
            time.sleep(RETRY_S)

    def _checks(self) -> Sequence[tuple[str, str, Callable[[], str]]]:
        at = self._settings
        table = [
            ("ingestion", "RegisterContract", at.ingestion_address, self._contract),
            ("ingestion", "Write, GetTable", at.ingestion_address, self._records),
            ("feature", "GetProgress", at.feature_address, self._progress),
            ("feature", "GetDefinitions", at.feature_address, self._definitions),
            ("registry", "CreateModel, GetModel", at.registry_address, self._model),
            ("training-coordinator", "ListRuns", at.training_address, self._runs),
            ("drift-monitor", "ListFindings", at.drift_address, self._findings),
            ("rollout-controller", "ListDeployments", at.rollout_address, self._deployments),
            ("inference-gateway", "GetFigures", at.gateway_admin_address, self._figures),
            ("gateway (public)", "ServerLive, ServerMetadata", at.gateway_address, self._gateway),
            ("console", "/healthz, /api/loop", at.console_url, self._console),
        ]
        return [(service, call, check) for service, call, address, check in table if address]

    def _channel(self, address: str) -> grpc.Channel:
        return self._open.enter_context(open_sync_channel(address, self._settings.tls))

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        return method(request, timeout=self._settings.call_timeout_s, wait_for_ready=True)

    def _contract(self) -> str:
        column = ingestion_pb2.Column
        contract = ingestion_pb2.DataContract(
            name=self._settings.name,
            columns=[
                column(name="id", type=ingestion_pb2.COLUMN_TYPE_STRING),
                column(name="at", type=ingestion_pb2.COLUMN_TYPE_TIMESTAMP),
                column(name="value", type=ingestion_pb2.COLUMN_TYPE_DOUBLE),
            ],
            event_id_column="id",
            event_time_column="at",
            key_columns=["id"],
        )
        stub = ingestion_pb2_grpc.IngestionServiceStub(self._channel(self._settings.ingestion_address))
        answer = self._call(stub.RegisterContract, ingestion_pb2.RegisterContractRequest(contract=contract))
        return f"{answer.contract.name} version {answer.contract.version}"

    def _records(self) -> str:
        stub = ingestion_pb2_grpc.IngestionServiceStub(self._channel(self._settings.ingestion_address))
        run, now_us = uuid7(), int(self._clock() * 1_000_000)
        rows = [{"id": f"{run}-{number}", "at": now_us + number, "value": 0.5} for number in range(RECORDS)]
        lines = "\n".join(json.dumps(row) for row in rows).encode()
        batch = ingestion_pb2.RecordBatch(
            contract=self._settings.name, source=f"smoke-{run}", offset=1, json_lines=lines
        )
        written = self._call(stub.Write, ingestion_pb2.WriteRequest(batch=batch))
        if written.accepted != RECORDS:
            raise UnexpectedAnswerError(
                f"{written.accepted} of {RECORDS} records landed, {written.rejected} were rejected"
            )
        table = self._call(stub.GetTable, ingestion_pb2.GetTableRequest(contract=self._settings.name))
        if table.rows < RECORDS or table.table.version < written.table_version:
            raise UnexpectedAnswerError(f"the table has {table.rows} rows at version {table.table.version}")
        return f"{written.accepted} records landed, {table.rows} rows at version {table.table.version}"

    def _progress(self) -> str:
        stub = feature_pb2_grpc.FeatureServiceStub(self._channel(self._settings.feature_address))
        return f"follows {len(self._call(stub.GetProgress, feature_pb2.GetProgressRequest()).contracts)} contracts"

    def _definitions(self) -> str:
        stub = feature_pb2_grpc.FeatureServiceStub(self._channel(self._settings.feature_address))
        try:
            answer = self._call(stub.GetDefinitions, feature_pb2.GetDefinitionsRequest())
        except grpc.RpcError as error:
            if error.code() in {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION}:
                return "none applied yet"
            raise
        return f"{len(answer.feature_services)} feature services"

    def _model(self) -> str:
        stub = registry_pb2_grpc.RegistryServiceStub(self._channel(self._settings.registry_address))
        model = registry_pb2.Model(name=self._settings.name, description="Made by helm test; nothing serves it.")
        self._call(stub.CreateModel, registry_pb2.CreateModelRequest(model=model))
        found = self._call(stub.GetModel, registry_pb2.GetModelRequest(name=model.name)).model
        if (found.name, found.description) != (model.name, model.description):
            raise UnexpectedAnswerError(f"got {found.name!r}, {found.description!r}")
        return f"model {found.name}"

    def _runs(self) -> str:
        stub = training_pb2_grpc.TrainingServiceStub(self._channel(self._settings.training_address))
        return f"{len(self._call(stub.ListRuns, training_pb2.ListRunsRequest()).runs)} runs"

    def _findings(self) -> str:
        stub = drift_pb2_grpc.DriftServiceStub(self._channel(self._settings.drift_address))
        return f"{len(self._call(stub.ListFindings, drift_pb2.ListFindingsRequest()).findings)} findings"

    def _deployments(self) -> str:
        stub = rollout_pb2_grpc.RolloutServiceStub(self._channel(self._settings.rollout_address))
        answer = self._call(stub.ListDeployments, rollout_pb2.ListDeploymentsRequest())
        return f"{len(answer.deployments)} deployments"

    def _figures(self) -> str:
        stub = prediction_pb2_grpc.GatewayServiceStub(self._channel(self._settings.gateway_admin_address))
        answer = self._call(stub.GetFigures, prediction_pb2.GetFiguresRequest())
        return f"figures of {len(answer.versions)} versions, routes of generation {answer.routes_generation}"

    def _gateway(self) -> str:
        # As raw bytes: the messages are tritonclient's, which would bring numpy into this image.
        channel = self._public_channel()
        live = self._call(channel.unary_unary(f"{GATEWAY_METHODS}ServerLive"), b"")
        if live != b"\x08\x01":
            raise UnexpectedAnswerError("the gateway says that it is not live")
        metadata = self._call(channel.unary_unary(f"{GATEWAY_METHODS}ServerMetadata"), b"")
        if not metadata:
            raise UnexpectedAnswerError("the gateway's metadata is empty")
        return "live"

    def _public_channel(self) -> grpc.Channel:
        settings = self._settings
        if settings.gateway_tls == "server" and settings.tls is not None:
            credentials = grpc.ssl_channel_credentials(Path(settings.tls.ca_file).read_bytes())
            channel = grpc.secure_channel(settings.gateway_address, credentials, options=channel_options())
        else:
            tls = settings.tls if settings.gateway_tls == "mutual" else None
            channel = open_sync_channel(settings.gateway_address, tls)
        return self._open.enter_context(channel)

    def _console(self) -> str:
        url = self._settings.console_url.rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"console_url: {url!r} is no HTTP URL")
        for path in ("/healthz", "/api/loop"):
            with urllib.request.urlopen(f"{url}{path}", timeout=self._settings.call_timeout_s) as answer:  # noqa: S310 - checked above
                body = answer.read()
        json.loads(body)
        return f"{len(body)} bytes of page data"


def table(results: Sequence[Result]) -> str:
    """The results for people, one a line."""
    rows = [("SERVICE", "CALL", "TIME", "RESULT")]
    rows += [
        (r.service, r.call, f"{r.seconds * 1000:.0f} ms", f"FAILED {r.problem}" if r.problem else r.said)
        for r in results
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )
