"""Quality figures as protobuf messages."""

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.ingestion.v1 import ingestion_pb2 as pb

from millrace_ingestion.quality import ColumnFigures
from millrace_ingestion.quality_monitor import Bucket


def bucket_to(bucket: Bucket) -> pb.QualityBucket:
    """A bucket as a message."""
    figures = bucket.figures
    return pb.QualityBucket(
        start=_timestamp(bucket.start),
        end=_timestamp(bucket.end),
        rows=figures.rows,
        batches=figures.batches,
        first_table_version=figures.first_version,
        last_table_version=figures.last_version,
        columns=[_column_to(name, column) for name, column in figures.columns.items()],
        failures=[
            pb.CheckFailures(
                subject=subject, check=check, policy=pb.CheckPolicy.Value(f"CHECK_POLICY_{policy}"), count=count
            )
            for (subject, check, policy), count in sorted(figures.failures.items())
        ],
    )


def _timestamp(value: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(value)
    return stamp


def _column_to(name: str, column: ColumnFigures) -> pb.ColumnQuality:
    return pb.ColumnQuality(
        column=name,
        values=column.values,
        nulls=column.nulls,
        min=column.minimum,
        max=column.maximum,
        mean=column.mean,
        distinct=column.distinct,
        sampled=column.sampled,
    )
