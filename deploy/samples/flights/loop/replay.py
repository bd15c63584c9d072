"""Replays flights in event-time order: predictions at scheduled departure, outcomes when the flight has landed.

Time is cut into slices. The flights of a slice are asked for at once (bounded), most by `Predict`, a share by an unmodified
`tritonclient.grpc` client with the feature vector it looked up itself; then the slice's records (schedule, weather, outcomes of
flights that landed in it) are written, so that later predictions see them. An outcome is never written before its landing.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import flights as data
import grpc
import grpc.aio
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tritonclient.grpc.aio as triton
from millrace import Client
from millrace.areas.data import arrow_ipc
from millrace.values import to_timestamp, to_values
from millrace_api.feature.v1 import feature_pb2
from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub
from millrace_api.ingestion.v1 import ingestion_pb2
from millrace_api.ingestion.v1.ingestion_pb2_grpc import IngestionServiceStub
from millrace_api.prediction.v1 import prediction_pb2
from millrace_api.prediction.v1.prediction_pb2_grpc import PredictionServiceStub
from millrace_kit.client import open_channel
from millrace_kit.errors import MillraceError

MODEL = "flight-delay"
FEATURE_SERVICE = "flight_delay"
SLICE = timedelta(minutes=15)
# Calls under way at once: enough to keep two cores busy, few enough that latency is the servers', not the queue's.
CONCURRENCY = 8
CALL_TIMEOUT_S = 10.0
# One in this many flights is asked for by the plain Triton client.
TRITON_EVERY = 10

# An error is counted by its code and the beginning of its message.
MESSAGE_LIMIT = 160
CONTRACTS = data.EVENT_TIMES


@dataclass
class Tally:
    """What the clients of the replay saw."""

    predictions: int = 0
    by_triton_client: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    latency_ms: list[float] = field(default_factory=list)
    ids: list[tuple[str, str]] = field(default_factory=list)
    """(prediction id, version) in the order of answers."""
    seconds: float = 0.0
    records: int = 0

    def quantile_ms(self, q: float) -> float:
        """Client-side latency quantile in milliseconds."""
        return float(np.quantile(self.latency_ms, q)) if self.latency_ms else float("nan")


class Replay:
    """A position in the year and the clients that move it forward.

    Args:
        client: whose addresses and certificates the replay's own connections use.
        start: first instant to replay.
        end: where the data end.
        source: name the records are written under.
    """

    def __init__(self, client: Client, start: datetime, end: datetime, source: str = "replay") -> None:
        self.position = start
        self.answered: list[tuple[str, str]] = []
        """(prediction id, version) of every answered Predict, in order."""
        self._end = end
        self._source = source
        self._tables = {
            name: _sorted(getattr(data, name)(start - timedelta(days=1), end), column)
            for name, column in CONTRACTS.items()
        }
        self._at = {
            name: self._tables[name][column].to_numpy().astype("datetime64[us]") for name, column in CONTRACTS.items()
        }
        self._endpoints = client.endpoints
        self._tls = client.tls

    def run(self, until: Callable[["Replay", Tally], bool], on_slice: Callable[["Replay", Tally], None]) -> Tally:
        """Replay slices until `until` says so (asked after each slice) or the data ends; returns this stretch's tally."""
        return asyncio.run(self._run(until, on_slice))

    async def _run(
        self, until: Callable[["Replay", Tally], bool], on_slice: Callable[["Replay", Tally], None]
    ) -> Tally:
        tally = Tally()
        began = time.monotonic()
        async with (
            open_channel(self._endpoints.gateway, timeout_s=CALL_TIMEOUT_S) as gateway,
            open_channel(self._endpoints.ingestion, timeout_s=60, tls=self._tls) as ingestion,
            open_channel(self._endpoints.feature, timeout_s=CALL_TIMEOUT_S, tls=self._tls) as feature,
            triton.InferenceServerClient(self._endpoints.gateway) as plain,
        ):
            calls = _Calls(
                PredictionServiceStub(gateway),
                FeatureServiceStub(feature),
                plain,
                asyncio.Semaphore(CONCURRENCY),
                tally,
            )
            writer = IngestionServiceStub(ingestion)
            while self.position < self._end:
                finish = self.position + SLICE
                rows = self._rows("flights", self.position, finish).to_pylist()
                await asyncio.gather(*(calls.one(index, row) for index, row in enumerate(rows)))
                await asyncio.gather(*(self._write(writer, name, finish, tally) for name in CONTRACTS))
                self.position = finish
                tally.seconds = time.monotonic() - began
                on_slice(self, tally)
                if until(self, tally):
                    break
        self.answered.extend(tally.ids)
        return tally

    def _rows(self, name: str, start: datetime, end: datetime) -> pa.Table:
        low, high = np.searchsorted(self._at[name], [_np(start), _np(end)])
        return self._tables[name].slice(int(low), int(high - low))

    async def _write(self, stub: Any, name: str, finish: datetime, tally: Tally) -> None:
        table = self._rows(name, self.position, finish)
        if table.num_rows == 0:
            return
        # The slice's place in time is its offset: a replay that is run again is answered, not written again.
        offset = int(self.position.timestamp()) // 60
        batch = ingestion_pb2.RecordBatch(contract=name, source=self._source, offset=offset, arrow_ipc=arrow_ipc(table))
        for attempt in range(20):
            try:
                await stub.Write(ingestion_pb2.WriteRequest(batch=batch))
                tally.records += table.num_rows
                return
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or attempt == 19:
                    raise MillraceError.from_rpc(error) from None
                await asyncio.sleep(0.25)


@dataclass
class _Calls:
    predictions: Any
    features: Any
    plain: Any
    limit: asyncio.Semaphore
    tally: Tally

    async def one(self, index: int, row: dict[str, Any]) -> None:
        """Ask for one flight; an error is counted, never raised."""
        async with self.limit:
            began = time.perf_counter()
            try:
                if index % TRITON_EVERY == TRITON_EVERY - 1:
                    await self._by_triton_client(row)
                else:
                    await self._by_predict(row)
            except (grpc.aio.AioRpcError, triton.InferenceServerException) as error:
                plain = isinstance(error, triton.InferenceServerException)
                said = f"{error.status()}: {error.message()}" if plain else f"{error.code().name}: {error.details()}"
                self.tally.errors[said[:MESSAGE_LIMIT]] += 1
                return
            self.tally.predictions += 1
            self.tally.latency_ms.append((time.perf_counter() - began) * 1e3)

    async def _by_predict(self, row: dict[str, Any]) -> None:
        request = prediction_pb2.PredictRequest(
            model=MODEL, inputs=to_values(row), subject=row["flight_id"], event_time=to_timestamp(row["sched_dep_at"])
        )
        answer = await self.predictions.Predict(request)
        self.tally.versions[answer.version] += 1
        self.tally.ids.append((answer.prediction_id, answer.version))

    async def _by_triton_client(self, row: dict[str, Any]) -> None:
        look_up = feature_pb2.GetOnlineFeaturesRequest(
            feature_service=FEATURE_SERVICE,
            rows=[feature_pb2.EntityRow(values=to_values(row))],
            event_time=to_timestamp(row["sched_dep_at"]),
        )
        vector = (await self.features.GetOnlineFeatures(look_up)).vectors[0].values
        tensor = triton.InferInput("features", [1, len(vector)], "FP32")
        tensor.set_data_from_numpy(np.array([vector], dtype=np.float32))
        headers = {"x-millrace-subject": row["flight_id"]}
        answer = await self.plain.infer(MODEL, [tensor], headers=headers, client_timeout=CALL_TIMEOUT_S)
        assert 0.0 <= float(answer.as_numpy("probability")[0, 0]) <= 1.0
        self.tally.by_triton_client += 1


def _sorted(table: pa.Table, column: str) -> pa.Table:
    return table.take(pc.sort_indices(table, [(column, "ascending")]))


def _np(instant: datetime) -> np.datetime64:
    return np.datetime64(instant.astimezone(UTC).replace(tzinfo=None), "us")


def months(first: int, last: int) -> Iterator[tuple[datetime, datetime]]:
    """Start and end of each month of 2013 (UTC), `first` to `last` inclusive."""
    for month in range(first, last + 1):
        start = datetime(2013, month, 1, tzinfo=UTC)
        yield start, datetime(2013 + month // 12, month % 12 + 1, 1, tzinfo=UTC)
