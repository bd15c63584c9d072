"""Prometheus metrics of the ingestion service."""

from prometheus_client import Counter, Gauge, Histogram

RECORDS = Counter(
    "millrace_ingestion_records_total",
    "Records of landed batches by what became of them: accepted, duplicate, rejected or quarantined.",
    ["contract", "result"],
)
REJECTED = Counter("millrace_ingestion_rejected_total", "Dead letters by reason.", ["contract", "reason"])
BATCHES = Counter(
    "millrace_ingestion_batches_total", "Batches answered: landed, replayed or failed.", ["contract", "result"]
)
REPLAYED_LETTERS = Counter(
    "millrace_ingestion_dead_letters_replayed_total", "Dead letters that a replay landed.", ["contract"]
)
COMMIT_SECONDS = Histogram(
    "millrace_ingestion_commit_seconds",
    "Time from taking a group of batches to its answers.",
    ["contract"],
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
COMMIT_ROWS = Histogram(
    "millrace_ingestion_commit_rows",
    "Records of one Delta commit.",
    ["contract"],
    buckets=(1, 10, 100, 1_000, 10_000, 50_000, 100_000, 200_000, 500_000),
)
QUEUED_BATCHES = Gauge("millrace_ingestion_queued_batches", "Batches accepted and not yet answered.")
QUEUED_BYTES = Gauge("millrace_ingestion_queued_bytes", "Payload bytes of these batches.")
TABLE_VERSION = Gauge("millrace_ingestion_table_version", "Newest Delta version.", ["contract"])
COLUMN_VALUES = Counter(
    "millrace_ingestion_column_values_total", "Landed values of a column, without nulls.", ["contract", "column"]
)
COLUMN_NULLS = Counter("millrace_ingestion_column_nulls_total", "Landed nulls of a column.", ["contract", "column"])
COLUMN_MIN = Gauge(
    "millrace_ingestion_column_min",
    "Smallest number of the newest commit; microseconds since the epoch of an instant.",
    ["contract", "column"],
)
COLUMN_MAX = Gauge("millrace_ingestion_column_max", "Largest number of the newest commit.", ["contract", "column"])
COLUMN_MEAN = Gauge("millrace_ingestion_column_mean", "Mean of the newest commit's numbers.", ["contract", "column"])
COLUMN_DISTINCT = Gauge(
    "millrace_ingestion_column_distinct",
    "Different values among at most 1000 records of the newest commit, estimated.",
    ["contract", "column"],
)
CHECK_FAILURES = Counter(
    "millrace_ingestion_check_failures_total",
    "Records that failed a check, by column or rule, check and policy.",
    ["contract", "subject", "check", "policy"],
)
VACUUMED_FILES = Counter("millrace_ingestion_vacuumed_files_total", "Data files that a vacuum deleted.", ["contract"])
MAINTENANCE_SECONDS = Histogram(
    "millrace_ingestion_maintenance_seconds",
    "Time of a scheduled round over one table; its batches wait.",
    ["contract"],
    buckets=(0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800),
)
MAINTENANCE_FAILURES = Counter(
    "millrace_ingestion_maintenance_failures_total", "Scheduled rounds over one table that failed.", ["contract"]
)
IGNORED_COLUMNS = Counter(
    "millrace_ingestion_ignored_columns_total",
    "Columns of Arrow batches that their contract does not have.",
    ["contract"],
)
LETTERS_PUBLISHED = Counter(
    "millrace_ingestion_dead_letters_published_total", "Dead letters that the bus acknowledged on their topic."
)
LETTER_FAILURES = Counter(
    "millrace_ingestion_dead_letter_publish_failures_total",
    "Times that dead letters could not be published; tried again.",
)
SOURCE_RECORDS = Counter(
    "millrace_ingestion_source_records_total",
    "Records of sources by what became of them: accepted, duplicates or rejected.",
    ["source", "result"],
)
SOURCE_LAG = Gauge(
    "millrace_ingestion_source_lag",
    "Messages of a source that have not landed; of a join the versions of its inputs' tables that are not joined.",
    ["source"],
)
SOURCE_TROUBLES = Counter(
    "millrace_ingestion_source_troubles_total",
    "Attempts of a source that ended with an error, by its reason.",
    ["source", "reason"],
)
JOIN_ROWS = Counter(
    "millrace_ingestion_join_rows_total",
    "What steps of a join made: rows matched and unmatched, and pairs left out because the left record's time was over (late).",
    ["source", "result"],
)
JOIN_FRESHNESS = Histogram(
    "millrace_ingestion_join_freshness_seconds",
    "From the oldest commit of the inputs that a step of a join took in to the landing of its rows.",
    ["source"],
    buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800),
)


def count_source(source: str, accepted: int, duplicates: int, rejected: int) -> None:
    """Count what became of a batch of a source."""
    for result, count in (("accepted", accepted), ("duplicates", duplicates), ("rejected", rejected)):
        SOURCE_RECORDS.labels(source, result).inc(count)
