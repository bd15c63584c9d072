"""Ingestion and features."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
from millrace_api.common.v1.common_pb2 import TableVersion
from millrace_api.feature.v1 import feature_pb2 as feature
from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub
from millrace_api.ingestion.v1 import ingestion_pb2 as ingestion
from millrace_api.ingestion.v1.ingestion_pb2_grpc import IngestionServiceStub
from millrace_kit.content import ContentStore

from millrace.transport import LONG_TIMEOUT_S, call, stream
from millrace.values import to_range, to_timestamp


def arrow_ipc(table: pa.Table) -> bytes:
    """`table` as one Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


class IngestionArea:
    """Writes records and looks after dead letters."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = IngestionServiceStub(channel)

    def register_contract(self, contract: ingestion.DataContract) -> ingestion.DataContract:
        """Register a data contract, or find the equal one."""
        answer: ingestion.RegisterContractResponse = call(
            self.stub.RegisterContract, ingestion.RegisterContractRequest(contract=contract)
        )
        return answer.contract

    def write(self, batch: ingestion.RecordBatch) -> ingestion.WriteResponse:
        """Write one batch; returns once it is durable."""
        answer: ingestion.WriteResponse = call(self.stub.Write, ingestion.WriteRequest(batch=batch))
        return answer

    def write_table(
        self, contract: str, table: pa.Table, *, source: str, first_offset: int = 1, batch_rows: int = 10_000
    ) -> Iterator[ingestion.WriteResponse]:
        """Stream `table` in batches of `batch_rows`; yields each batch's answer in order."""

        def batches() -> Iterable[ingestion.WriteStreamRequest]:
            for index, start in enumerate(range(0, table.num_rows, batch_rows)):
                payload = arrow_ipc(table.slice(start, batch_rows))
                batch = ingestion.RecordBatch(
                    contract=contract, source=source, offset=first_offset + index, arrow_ipc=payload
                )
                yield ingestion.WriteStreamRequest(batch=batch)

        for answer in stream(self.stub.WriteStream, batches(), timeout_s=LONG_TIMEOUT_S):
            yield answer.result

    def count_dead_letters(self, contract: str = "") -> Sequence[ingestion.DeadLetterCount]:
        """Dead letters by contract and reason."""
        answer: ingestion.CountDeadLettersResponse = call(
            self.stub.CountDeadLetters, ingestion.CountDeadLettersRequest(contract=contract)
        )
        return answer.counts

    def dead_letters(self, contract: str, reason: str = "") -> Iterator[ingestion.DeadLetter]:
        """Every dead letter, page by page."""
        token = ""
        while True:
            request = ingestion.ListDeadLettersRequest(
                contract=contract, reason=reason, page_size=500, page_token=token
            )
            answer: ingestion.ListDeadLettersResponse = call(self.stub.ListDeadLetters, request)
            yield from answer.dead_letters
            token = answer.next_page_token
            if not token:
                return

    def replay_dead_letters(self, contract: str, reason: str = "") -> ingestion.ReplayDeadLettersResponse:
        """Send dead letters through the present contract again."""
        answer: ingestion.ReplayDeadLettersResponse = call(
            self.stub.ReplayDeadLetters,
            ingestion.ReplayDeadLettersRequest(contract=contract, reason=reason),
            LONG_TIMEOUT_S,
        )
        return answer

    def table(self, contract: str) -> ingestion.GetTableResponse:
        """Version, place and row count of a contract's lake table."""
        answer: ingestion.GetTableResponse = call(self.stub.GetTable, ingestion.GetTableRequest(contract=contract))
        return answer


class FeatureArea:
    """Definitions, online values, training sets."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = FeatureServiceStub(channel)

    def apply(self, project: str, feast_registry: bytes) -> feature.ApplyDefinitionsResponse:
        """Make these definitions the current ones; see `millrace.feast_repo.registry_from_repo`."""
        request = feature.ApplyDefinitionsRequest(project=project, feast_registry=feast_registry)
        answer: feature.ApplyDefinitionsResponse = call(self.stub.ApplyDefinitions, request, LONG_TIMEOUT_S)
        return answer

    def definitions(self, definitions_hash: str = "") -> feature.GetDefinitionsResponse:
        """The current definitions, or those with this hash."""
        answer: feature.GetDefinitionsResponse = call(
            self.stub.GetDefinitions, feature.GetDefinitionsRequest(definitions_hash=definitions_hash)
        )
        return answer

    def online(self, request: feature.GetOnlineFeaturesRequest) -> feature.GetOnlineFeaturesResponse:
        """Online values of 1 to 1000 entity rows."""
        answer: feature.GetOnlineFeaturesResponse = call(self.stub.GetOnlineFeatures, request)
        return answer

    def progress(self) -> feature.GetProgressResponse:
        """How far the online store has followed the records."""
        answer: feature.GetProgressResponse = call(self.stub.GetProgress, feature.GetProgressRequest())
        return answer

    def consistency(
        self,
        feature_service: str = "",
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        max_findings: int = 0,
    ) -> feature.GetConsistencyResponse:
        """How far served values are from the lake's, per feature and window of time; an empty name takes every service."""
        request = feature.GetConsistencyRequest(
            feature_service=feature_service, time_range=to_range(start, end), max_findings=max_findings
        )
        answer: feature.GetConsistencyResponse = call(self.stub.GetConsistency, request)
        return answer

    def build_training_set(
        self,
        *,
        feature_service: str = "",
        features: Sequence[str] = (),
        entity_contract: str,
        label_contract: str,
        join_column: str,
        label_column: str,
        start: datetime | None = None,
        end: datetime | None = None,
        known_at: datetime | None = None,
        table_versions: Sequence[TableVersion] = (),
        definitions_hash: str = "",
    ) -> feature.TrainingSet:
        """Build a point-in-time training set; the same arguments and table versions give the same bytes.

        With `features` (`view__feature`) it holds these instead of a feature service's, texts among them.
        """
        request = feature.BuildTrainingSetRequest(
            feature_service=feature_service,
            features=features,
            entity_contract=entity_contract,
            label_contract=label_contract,
            join_column=join_column,
            label_column=label_column,
            time_range=to_range(start, end),
            known_at=to_timestamp(known_at) if known_at else None,
            table_versions=table_versions,
            definitions_hash=definitions_hash,
        )
        return self.rebuild_training_set(request)

    def rebuild_training_set(self, request: feature.BuildTrainingSetRequest) -> feature.TrainingSet:
        """Build the set of an earlier request (`TrainingSet.request` with its `table_versions`)."""
        answer: feature.BuildTrainingSetResponse = call(self.stub.BuildTrainingSet, request, LONG_TIMEOUT_S)
        return answer.training_set

    def training_set(self, digest: str) -> feature.TrainingSet:
        """A training set by its digest."""
        answer: feature.GetTrainingSetResponse = call(
            self.stub.GetTrainingSet, feature.GetTrainingSetRequest(digest=digest)
        )
        return answer.training_set

    def load_training_set(self, training_set: feature.TrainingSet) -> pa.Table:
        """The rows of a training set; the content's digest is checked before a row is decoded.

        Raises:
            MillraceError: DATA_LOSS when the stored bytes are not what the digest says.
        """
        content = ContentStore(training_set.store_url).read(training_set.data.sha256)
        return pq.read_table(pa.BufferReader(content))
