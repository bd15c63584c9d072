"""Feast's Spark offline store with our windows: where one machine is not enough for a training set, the same definitions run on the user's Spark.

```yaml
offline_store:
  type: millrace.feast_spark.MillraceSparkOfflineStore
  spark_conf: {spark.master: "yarn"}
```
Feast 0.67's own Spark store joins the raw columns of a StreamFeatureView and leaves its aggregations aside. Here a window of width w with slide s
holds the events in [floor_s(t) - w, floor_s(t)), as in the feature service; every row of the entity frame comes back, a count over nothing is
0, everything else of it is null. Views without aggregations are Feast's. Nothing is sampled and the driver collects nothing. Needs `feast` and
`pyspark`; sums of fractions are added in Spark's order, so they agree to within rounding, everything else to the bit.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any
from uuid import uuid4

from feast import OnDemandFeatureView
from feast.infra.offline_stores.contrib.spark_offline_store.spark import (
    SparkOfflineStore,
    SparkOfflineStoreConfig,
    SparkRetrievalJob,
    get_spark_session_or_start_new_with_repoconfig,
)
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.repo_config import RepoConfig
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F  # noqa: N812 - Spark's own custom

EVENT_TIMESTAMP = "event_timestamp"
DEFAULT_SLIDE = timedelta(minutes=5)
ROW, AT, END = "__millrace_row", "__millrace_at", "__millrace_event_at"

FUNCTIONS: Mapping[str, Callable[[Column], Column]] = {
    "count": F.count,
    "sum": F.sum,
    "mean": F.avg,
    "avg": F.avg,
    "min": F.min,
    "max": F.max,
    "std": F.stddev_samp,
    "stddev": F.stddev_samp,
    "stddev_samp": F.stddev_samp,
    "stddev_pop": F.stddev_pop,
    "var": F.var_samp,
    "variance": F.var_samp,
    "var_samp": F.var_samp,
    "var_pop": F.var_pop,
}
"""Functions that mean the same here and in the feature service; its sketches (distinct counts, percentiles) are its own."""


class MillraceSparkOfflineStoreConfig(SparkOfflineStoreConfig):  # type: ignore[misc]
    """Settings in `feature_store.yaml`: those of Feast's Spark store."""

    type: str = "millrace.feast_spark.MillraceSparkOfflineStore"
    """Chooses this store."""


class MillraceSparkOfflineStore(SparkOfflineStore):  # type: ignore[misc]
    """Historical features on Spark, windows included."""

    @staticmethod
    def get_historical_features(  # noqa: PLR0917 - Feast's signature
        config: RepoConfig,
        feature_views: list[Any],
        feature_refs: list[str],
        entity_df: Any,
        registry: Any,
        project: str,
        full_feature_names: bool = False,
        **options: Any,
    ) -> RetrievalJob:
        """See `feast.OfflineStore`; `entity_df` is a pandas or Spark frame with a column `event_timestamp`.

        Raises:
            ValueError: the frame is none of these, or an aggregation is not one of `FUNCTIONS`.
        """
        if entity_df is None or isinstance(entity_df, str) or EVENT_TIMESTAMP not in entity_df.columns:
            raise ValueError(f"entity_df must be a frame with a column {EVENT_TIMESTAMP!r}")
        spark = get_spark_session_or_start_new_with_repoconfig(config.offline_store)
        windowed = [view for view in feature_views if getattr(view, "aggregations", None)]
        plain = [view for view in feature_views if view not in windowed]
        frame = entity_df if isinstance(entity_df, DataFrame) else spark.createDataFrame(entity_df)
        frame = frame.withColumn(ROW, F.monotonically_increasing_id())
        names = {view.projection.name_to_use() for view in plain}
        if chosen := [ref for ref in feature_refs if ref.split(":", 1)[0] in names]:
            job = SparkOfflineStore.get_historical_features(
                config, plain, chosen, frame, registry, project, full_feature_names, **options
            )
            # Later joins would compute it again for each view, and row numbers with it.
            frame = job.to_spark_df().localCheckpoint()
        for view in windowed:
            alias = view.projection.name_to_use()
            wanted = [ref.split(":", 1)[1] for ref in feature_refs if ref.split(":", 1)[0] == alias]
            columns = {name: f"{alias}__{name}" if full_feature_names else name for name in wanted}
            events = spark.sql(f"SELECT * FROM {view.batch_source.get_table_query_string()}")
            frame = with_windows(frame, events, view, columns)
        kept = ", ".join(f"`{name}`" for name in frame.columns if name != ROW)
        place = f"millrace_{uuid4().hex}"
        frame.createOrReplaceTempView(place)
        return SparkRetrievalJob(
            spark_session=spark,
            query=f"SELECT {kept} FROM {place} ORDER BY {ROW}",
            full_feature_names=full_feature_names,
            config=config,
            on_demand_feature_views=OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
        )


def with_windows(frame: DataFrame, events: DataFrame, view: Any, columns: Mapping[str, str]) -> DataFrame:
    """`frame` with windowed features of `view` as further columns.

    Args:
        frame: rows with `event_timestamp`, join keys and the row's number.
        events: the view's rows.
        view: a `StreamFeatureView` with aggregations.
        columns: feature -> name of its column.
    """
    aggregations = {_name(a): a for a in view.aggregations}
    time = view.timestamp_field or view.batch_source.timestamp_field
    renamed = dict(view.projection.join_key_map)
    keys = [column.name for column in view.entity_columns]
    asked = [renamed.get(key, key) for key in keys]
    rows = frame.select(
        ROW, F.unix_micros(EVENT_TIMESTAMP).alias(AT), *[F.col(name).alias(f"{name}_") for name in asked]
    )
    needed = sorted({aggregations[name].column for name in columns})
    found = events.select(F.unix_micros(time).alias(END), *keys, *[c for c in needed if c not in keys])
    widest = max(_us(aggregations[name].time_window) + _slide(aggregations[name]) for name in columns)
    near = (F.col(END) < F.col(AT)) & (F.col(END) >= F.col(AT) - F.lit(widest))
    same = [F.col(f"{name}_") == found[key] for name, key in zip(asked, keys, strict=True)]
    joined = rows.join(found, [*same, near], "left")
    features = [_feature(aggregations[name], name, joined) for name in columns]
    unknown = [F.max(F.col(f"{name}_").isNull()).alias(f"{name}_") for name in asked]
    made = joined.groupBy(ROW).agg(*features, *unknown)
    # An event of no entity is in no window: the features of a row without a key are missing, counts too.
    missing = F.greatest(F.lit(False), *[F.col(f"{name}_") for name in asked])
    chosen = [F.when(~missing, F.col(name)).alias(column) for name, column in columns.items()]
    return frame.join(made.select(ROW, *chosen), ROW, "left")


def _feature(aggregation: Any, name: str, rows: DataFrame) -> Column:
    function = FUNCTIONS.get(aggregation.function)
    if function is None:
        known = ", ".join(FUNCTIONS)
        raise ValueError(f"aggregation {name!r}: {aggregation.function!r} is none of those that run on Spark: {known}")
    end = F.col(AT) - F.pmod(F.col(AT), F.lit(_slide(aggregation)))
    inside = (F.col(END) < end) & (F.col(END) >= end - F.lit(_us(aggregation.time_window)))
    value = F.col(aggregation.column)
    if dict(rows.dtypes)[aggregation.column] in {"float", "double"}:
        value = F.when(~F.isnan(value), value)
    return function(F.when(inside, value)).alias(name)


def _name(aggregation: Any) -> str:
    """What the feature is called, as the feature service names it."""
    seconds = _us(aggregation.time_window) // 1_000_000
    return str(aggregation.name or f"{aggregation.function}_{aggregation.column}_{seconds}s")


def _slide(aggregation: Any) -> int:
    return _us(aggregation.slide_interval or DEFAULT_SLIDE)


def _us(width: timedelta) -> int:
    return width // timedelta(microseconds=1)
