"""Feast's offline store on Millrace: `feature_store.yaml` names it by its dotted path, and `get_historical_features` is answered by the feature service.

```yaml
offline_store:
  type: millrace.feast_offline.MillraceOfflineStore
  address: feature:7402        # or MILLRACE_FEATURE_ADDRESS
```
Windowed aggregations of stream views are computed as they are served, every row of the entity frame comes back, in its order, and the
tables' versions are pinned over the whole job. Views are those that were applied to the feature service (`millrace features apply`), used under
their own names. Needs Feast (`pip install millrace[feast]`).
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import grpc
import pyarrow as pa
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.type_map import feast_value_type_to_pa
from millrace_api.feature.v1.offline_pb2 import GetHistoricalFeaturesRequest
from millrace_api.feature.v1.offline_pb2_grpc import OfflineServiceStub
from millrace_kit.client import open_sync_channel

from millrace.areas.data import arrow_ipc
from millrace.endpoints import Endpoints, tls_from_environment
from millrace.transport import LONG_TIMEOUT_S, call

EVENT_TIMESTAMP = "event_timestamp"
CHUNK_ROWS = 100_000
"""Rows of one request."""


class MillraceOfflineStoreConfig(FeastConfigBaseModel):  # type: ignore[misc]
    """Settings in `feature_store.yaml`."""

    type: Literal["millrace.feast_offline.MillraceOfflineStore"] = "millrace.feast_offline.MillraceOfflineStore"
    """Chooses this store."""
    address: str = ""
    """host:port of the feature service; empty takes MILLRACE_FEATURE_ADDRESS, else a local run's. Mutual TLS by MILLRACE_TLS_*."""
    definitions_hash: str = ""
    """Definitions to compute with; empty takes those in force."""


class MillraceRetrievalJob(RetrievalJob):  # type: ignore[misc]
    """Features that are computed when they are asked for."""

    def __init__(
        self, compute: Callable[[], pa.Table], *, full_feature_names: bool, metadata: RetrievalMetadata
    ) -> None:
        self._compute = compute
        self._full_feature_names = full_feature_names
        self._metadata = metadata

    @property
    def full_feature_names(self) -> bool:
        """Whether columns are called "view__feature"."""
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[Any]:
        """None: the service computes them too."""
        return []

    @property
    def metadata(self) -> RetrievalMetadata:
        """What was asked for."""
        return self._metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:  # noqa: ARG002 - Feast's signature
        return self._compute()

    def _to_df_internal(self, timeout: int | None = None) -> Any:  # noqa: ARG002 - Feast's signature
        return self._compute().to_pandas()

    def persist(
        self,
        storage: Any,
        allow_overwrite: bool | None = False,
        timeout: int | None = None,  # noqa: ARG002
    ) -> None:
        """Write the result to a Parquet file."""
        import pyarrow.parquet as pq

        target = Path(storage.file_options.uri)
        if target.exists() and not allow_overwrite:
            raise FileExistsError(target)
        pq.write_table(self.to_arrow(), target)


class MillraceOfflineStore(OfflineStore):  # type: ignore[misc]
    """Historical features from the feature service."""

    @staticmethod
    def get_historical_features(  # noqa: PLR0917 - Feast's signature
        config: RepoConfig,
        feature_views: list[Any],
        feature_refs: list[str],
        entity_df: Any,
        registry: Any,
        project: str,
        full_feature_names: bool = False,
        **_options: Any,
    ) -> RetrievalJob:
        """See `feast.OfflineStore`; `entity_df` must be a pandas frame with a column `event_timestamp`."""
        return historical_job(
            config.offline_store, feature_views, feature_refs, entity_df, registry, project, full_feature_names
        )

    @staticmethod
    def pull_latest_from_table_or_query(  # noqa: PLR0917 - Feast's signature
        config: RepoConfig,
        data_source: Any,
        join_key_columns: Sequence[str],
        feature_name_columns: Sequence[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """Not needed: the feature service fills and keeps its online values by itself.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "the feature service keeps its online values by itself: there is nothing to materialize"
        )

    pull_all_from_table_or_query = pull_latest_from_table_or_query


def historical_job(  # noqa: PLR0917 - Feast's order
    config: MillraceOfflineStoreConfig,
    feature_views: list[Any],
    feature_refs: list[str],
    entity_df: Any,
    registry: Any,
    project: str,
    full_feature_names: bool,
) -> MillraceRetrievalJob:
    """The job behind `get_historical_features`, whoever of Feast's plug-ins is asked.

    Raises:
        ValueError: `entity_df` is no pandas frame with a column `event_timestamp`, or two columns would have one name.
    """
    import pandas as pd

    if not isinstance(entity_df, pd.DataFrame) or EVENT_TIMESTAMP not in entity_df.columns:
        raise ValueError(f"entity_df must be a pandas frame with a column {EVENT_TIMESTAMP!r}")
    names = {ref.replace(":", "__", 1): ref for ref in feature_refs}
    columns = [name if full_feature_names else ref.split(":", 1)[1] for name, ref in names.items()]
    if clash := {c for c in columns if columns.count(c) > 1 or c in entity_df.columns}:
        raise ValueError(f"columns {sorted(clash)} stand twice; use full_feature_names=True")
    types = _types(feature_views, registry, project)
    kinds = [types.get(name) for name in names]
    rows = pa.Table.from_pandas(entity_df, preserve_index=False)

    def compute() -> pa.Table:
        found = _fetch(config, list(names), rows)
        table = rows
        for column, name, kind in zip(columns, names, kinds, strict=True):
            content = found.column(name)
            table = table.append_column(column, content.cast(kind, safe=False) if kind is not None else content)
        return table

    times = pd.to_datetime(entity_df[EVENT_TIMESTAMP], utc=True)
    metadata = RetrievalMetadata(
        features=feature_refs,
        keys=[c for c in entity_df.columns if c != EVENT_TIMESTAMP],
        min_event_timestamp=times.min().to_pydatetime() if len(times) else None,
        max_event_timestamp=times.max().to_pydatetime() if len(times) else None,
    )
    return MillraceRetrievalJob(compute, full_feature_names=full_feature_names, metadata=metadata)


def _types(feature_views: list[Any], registry: Any, project: str) -> dict[str, pa.DataType]:
    """Arrow type of each "view__feature" as the definitions have it."""
    views = [*feature_views, *registry.list_on_demand_feature_views(project)]
    return {
        f"{view.projection.name_to_use()}__{field.name}": feast_value_type_to_pa(field.dtype.to_value_type())
        for view in views
        for field in view.features
    }


def _fetch(config: MillraceOfflineStoreConfig, names: list[str], rows: pa.Table) -> pa.Table:
    address = config.address or Endpoints.from_environment().feature
    request = GetHistoricalFeaturesRequest(
        features=names, event_time_column=EVENT_TIMESTAMP, definitions_hash=config.definitions_hash
    )
    parts = []
    channel: grpc.Channel = open_sync_channel(address, tls_from_environment())
    with channel:
        stub = OfflineServiceStub(channel)
        for start in range(0, max(1, rows.num_rows), CHUNK_ROWS):
            request.rows = arrow_ipc(rows.slice(start, CHUNK_ROWS))
            answer = call(stub.GetHistoricalFeatures, request, LONG_TIMEOUT_S)
            # The rest sees the same definitions and tables, whatever lands meanwhile.
            request.definitions_hash = answer.definitions_hash
            del request.table_versions[:]
            request.table_versions.extend(answer.table_versions)
            with pa.ipc.open_stream(answer.features) as stream:
                parts.append(stream.read_all())
    return pa.concat_tables(parts)
