"""Feast's online store on Millrace: `feature_store.yaml` names it by its dotted path, and `get_online_features` is one gRPC call to the feature service.

```yaml
online_store:
  type: millrace.feast_online.MillraceOnlineStore
  address: feature:7402        # or MILLRACE_FEATURE_ADDRESS
```
By feature service or by `view:feature`, blocking or not; on-demand views are computed by the service. Views are those that were applied to it
(`millrace features apply`). Nothing is written through here: records enter through ingestion, and views fill and follow by themselves. Needs Feast
(`pip install millrace[feast]`).
"""
# ruff: noqa: ARG002 - Feast's signatures

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NoReturn

import grpc
import grpc.aio
import numpy as np
from feast import FeatureService
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.supported_async_methods import SupportedAsyncMethods
from feast.online_response import OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import (
    FieldStatus,
    GetOnlineFeaturesRequest,
    GetOnlineFeaturesResponse,
)
from feast.protos.feast.serving.ServingService_pb2_grpc import ServingServiceStub
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import RepeatedValue, Value
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from millrace_kit.client import open_channel, open_sync_channel
from millrace_kit.errors import InvalidArgumentError, MillraceError
from pydantic import Field

from millrace.endpoints import Endpoints, tls_from_environment
from millrace.transport import call

ROWS = 1000
"""Entity rows of one call, the most the service takes; more are asked for in turn."""

Rows = list[dict[str, Any]] | Mapping[str, Any]
Read = tuple[datetime | None, dict[str, Value] | None]


class MillraceOnlineStoreConfig(FeastConfigBaseModel):  # type: ignore[misc]
    """Settings in `feature_store.yaml`."""

    type: Literal["millrace.feast_online.MillraceOnlineStore"] = "millrace.feast_online.MillraceOnlineStore"
    """Chooses this store."""
    address: str = ""
    """host:port of the feature service, or `dns:///host:port` for all its replicas in turn; empty takes MILLRACE_FEATURE_ADDRESS, else a
    local run's. Mutual TLS by MILLRACE_TLS_*."""
    timeout_s: float = Field(default=5.0, gt=0, le=300)
    """Longest wait for one call."""


class MillraceOnlineStore(OnlineStore):  # type: ignore[misc]
    """Online features from the feature service. One channel a process, one more for each event loop that reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._aio_channel: grpc.aio.Channel | None = None

    @property
    def async_supported(self) -> SupportedAsyncMethods:
        """Reads only."""
        return SupportedAsyncMethods(read=True)

    def get_online_features(  # noqa: PLR0917 - Feast's signature
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: Rows,
        registry: Any,
        project: str,
        full_feature_names: bool = False,
        include_feature_view_version_metadata: bool = False,
    ) -> OnlineResponse:
        """See `feast.FeatureStore.get_online_features`.

        Raises:
            MillraceError: the service refused or did not answer within `timeout_s`.
        """
        requests = _requests(features, entity_rows, full_feature_names, include_feature_view_version_metadata)
        return OnlineResponse(_joined([self._ask(config, request) for request in requests]))

    async def get_online_features_async(  # noqa: PLR0917 - Feast's signature
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: Rows,
        registry: Any,
        project: str,
        full_feature_names: bool = False,
        include_feature_view_version_metadata: bool = False,
    ) -> OnlineResponse:
        """`get_online_features` without blocking the event loop."""
        requests = _requests(features, entity_rows, full_feature_names, include_feature_view_version_metadata)
        return OnlineResponse(_joined([await self._ask_async(config, request) for request in requests]))

    def online_read(
        self,
        config: RepoConfig,
        table: Any,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Read]:
        """The features of one view, (event time, values) a key; (None, None) where nothing is known or all is too old."""
        found: list[Read] = []
        for start in range(0, len(entity_keys), ROWS):
            request = _view_request(table, entity_keys[start : start + ROWS], requested_features)
            found += _rows(request, self._ask(config, request))
        return found

    async def online_read_async(
        self,
        config: RepoConfig,
        table: Any,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Read]:
        """`online_read` without blocking the event loop."""
        found: list[Read] = []
        for start in range(0, len(entity_keys), ROWS):
            request = _view_request(table, entity_keys[start : start + ROWS], requested_features)
            found += _rows(request, await self._ask_async(config, request))
        return found

    def online_write_batch(
        self,
        config: RepoConfig,
        table: Any,
        data: list[tuple[EntityKey, dict[str, Value], datetime, datetime | None]],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Refused: a view's row lacks what its contract's records hold, and a window's values are not records at all.

        Raises:
            NotImplementedError: always.
        """
        _refuse(table)

    async def online_write_batch_async(
        self,
        config: RepoConfig,
        table: Any,
        data: list[tuple[EntityKey, dict[str, Value], datetime, datetime | None]],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """See `online_write_batch`."""
        _refuse(table)

    def update(  # noqa: PLR0917 - Feast's signature
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[Any],
        tables_to_keep: Sequence[Any],
        entities_to_delete: Sequence[Any],
        entities_to_keep: Sequence[Any],
        partial: bool,
    ) -> None:
        """Nothing: the service makes and drops its tables when definitions are applied to it."""

    def teardown(self, config: RepoConfig, tables: Sequence[Any], entities: Sequence[Any]) -> None:
        """Close the channel; what the service keeps is the service's, other clients read it."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    async def close(self) -> None:
        """Close the channel of the running event loop."""
        channel, self._aio_channel, self._loop = self._aio_channel, None, None
        if channel is not None:
            await channel.close()

    def _ask(self, config: RepoConfig, request: GetOnlineFeaturesRequest) -> GetOnlineFeaturesResponse:
        settings = config.online_store
        with self._lock:
            if self._channel is None:
                self._channel = open_sync_channel(_address(settings), tls_from_environment())
            channel = self._channel
        answer: GetOnlineFeaturesResponse = call(
            ServingServiceStub(channel).GetOnlineFeatures, request, settings.timeout_s
        )
        return answer

    async def _ask_async(self, config: RepoConfig, request: GetOnlineFeaturesRequest) -> GetOnlineFeaturesResponse:
        settings, loop = config.online_store, asyncio.get_running_loop()
        if self._aio_channel is None or self._loop is not loop:
            # A channel belongs to its event loop; one of a loop that has ended goes with it.
            self._loop, self._aio_channel = loop, open_channel(_address(settings), tls=tls_from_environment())
        try:
            stub = ServingServiceStub(self._aio_channel)
            answer: GetOnlineFeaturesResponse = await stub.GetOnlineFeatures(request, timeout=settings.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise MillraceError.from_rpc(error) from None
        return answer


def _address(settings: MillraceOnlineStoreConfig) -> str:
    return settings.address or Endpoints.from_environment().feature


def _refuse(table: Any) -> NoReturn:
    raise NotImplementedError(
        f"{table.name}: the online store is written by the feature service alone, from the records of the view's source; send records to "
        "ingestion (`millrace ingest`, or IngestionService), and wait for them with `feast materialize` and batch_engine "
        "millrace.feast_engine.MillraceComputeEngine"
    )


def _requests(
    features: list[str] | FeatureService, entity_rows: Rows, full_names: bool, with_versions: bool
) -> list[GetOnlineFeaturesRequest]:
    """One request for each `ROWS` rows."""
    columns = {name: _column(name, values) for name, values in _columns(entity_rows).items()}
    lengths = {len(values) for values in columns.values()}
    if len(lengths) > 1:
        raise InvalidArgumentError("entity_rows", "all columns need the same length")
    made = []
    for start in range(0, max([1, *lengths]), ROWS):
        request = GetOnlineFeaturesRequest(
            full_feature_names=full_names, include_feature_view_version_metadata=with_versions
        )
        if isinstance(features, FeatureService):
            request.feature_service = features.name
        else:
            request.features.val.extend(features)
        for name, values in columns.items():
            request.entities[name].val.extend(values[start : start + ROWS])
        made.append(request)
    return made


def _columns(entity_rows: Rows) -> Mapping[str, Sequence[Any]]:
    if isinstance(entity_rows, Mapping):
        return {name: v.val if isinstance(v, RepeatedValue) else v for name, v in entity_rows.items()}
    names = list(entity_rows[0]) if entity_rows else []
    if any(row.keys() != entity_rows[0].keys() for row in entity_rows):
        raise InvalidArgumentError("entity_rows", "all rows need the same keys")
    return {name: [row[name] for row in entity_rows] for name in names}


def _column(name: str, values: Sequence[Any]) -> list[Value]:
    return [_value(name, row, value) for row, value in enumerate(values)]


def _value(name: str, row: int, value: Any) -> Value:
    """A join key or request field by its own kind; the service takes it as the definitions say."""
    if isinstance(value, Value):
        return value
    if value is None:
        return Value()
    if isinstance(value, np.datetime64):
        value = value.astype("datetime64[us]").item()
    elif isinstance(value, np.generic):
        value = value.item()
    try:
        if isinstance(value, bool):
            return Value(bool_val=value)
        if isinstance(value, int):
            return Value(int64_val=value)
        if isinstance(value, float):
            return Value(double_val=value)
        if isinstance(value, str):
            return Value(string_val=value)
        if isinstance(value, datetime):
            return Value(unix_timestamp_val=int(_aware(value).timestamp()))
    except ValueError as error:
        raise InvalidArgumentError(f"entity_rows.{name}[{row}]", str(error)) from None
    raise InvalidArgumentError(
        f"entity_rows.{name}[{row}]", f"{type(value).__name__} is neither text, number, boolean nor time"
    )


def _aware(instant: datetime) -> datetime:
    """Feast takes an instant without a zone as UTC."""
    return instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)


def _view_request(
    table: Any, entity_keys: Sequence[EntityKey], requested: Sequence[str] | None
) -> GetOnlineFeaturesRequest:
    request = GetOnlineFeaturesRequest()
    names = requested or [field.name for field in table.features]
    request.features.val.extend(f"{table.projection.name}:{name}" for name in names)
    for key in entity_keys:
        for name, value in zip(key.join_keys, key.entity_values, strict=True):
            request.entities[name].val.append(value)
    return request


def _rows(request: GetOnlineFeaturesRequest, answer: GetOnlineFeaturesResponse) -> list[Read]:
    """Answers of one view as Feast's stores give them."""
    keys = len(request.entities)  # the answer repeats them before the features
    names, vectors = answer.metadata.feature_names.val[keys:], answer.results[keys:]
    # Features of a view share statuses and times.
    statuses, times = vectors[0].statuses, vectors[0].event_timestamps
    found: list[Read] = []
    for row, status in enumerate(statuses):
        if status in {FieldStatus.NOT_FOUND, FieldStatus.OUTSIDE_MAX_AGE}:
            found.append((None, None))
        else:
            values = {name: vector.values[row] for name, vector in zip(names, vectors, strict=True)}
            found.append((times[row].ToDatetime(UTC), values))
    return found


def _joined(answers: Sequence[GetOnlineFeaturesResponse]) -> GetOnlineFeaturesResponse:
    first, *others = answers
    for other in others:
        for vector, more in zip(first.results, other.results, strict=True):
            vector.values.extend(more.values)
            vector.statuses.extend(more.statuses)
            vector.event_timestamps.extend(more.event_timestamps)
    return first
