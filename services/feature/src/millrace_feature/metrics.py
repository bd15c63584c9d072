"""Prometheus metrics of the feature service."""

from prometheus_client import Counter, Gauge, Histogram

READ_ROWS = Counter("millrace_feature_read_rows_total", "Entity rows answered online.", ["feature_service"])
READ_FEATURES = Counter(
    "millrace_feature_read_features_total", "Feature values answered online, by status.", ["feature_service", "status"]
)
CACHE_READS = Counter(
    "millrace_feature_cache_reads_total",
    "Reads of cached views: answered whole from what was kept, or not.",
    ["result"],
)
CACHE_ENTRIES = Gauge("millrace_feature_cache_entries", "Answers of the online store that are kept.")
APPLIED_RECORDS = Counter("millrace_feature_records_total", "Records applied to the online store.", ["contract"])
REPEATED_BATCHES = Counter(
    "millrace_feature_repeated_batches_total", "Batches delivered again and left out.", ["contract"]
)
LATE_RECORDS = Counter(
    "millrace_feature_late_records_total",
    "Records that came in later than the view's bound and do not count.",
    ["view"],
)
BAD_VECTORS = Counter(
    "millrace_feature_bad_vectors_total",
    "Values of embeddings that are no vectors of the field's length; they are missing.",
    ["view", "feature"],
)
BAD_MESSAGES = Counter(
    "millrace_feature_bad_messages_total", "Bus messages that could not be read and were passed over.", ["contract"]
)
WATERMARK = Gauge("millrace_feature_watermark_seconds", "Newest event time applied, Unix seconds.", ["contract"])
LAG = Gauge("millrace_feature_lag_messages", "Bus messages not yet applied, as of the last poll.", ["contract"])
FILL_SECONDS = Histogram(
    "millrace_feature_fill_seconds", "Time to fill a view from the lake.", buckets=(0.1, 0.5, 1, 5, 10, 60, 600)
)
BUILD_SECONDS = Histogram(
    "millrace_feature_build_seconds", "Time to build a training set.", buckets=(0.5, 1, 2, 5, 10, 20, 60, 600)
)
BUILD_ROWS = Counter("millrace_feature_build_rows_total", "Rows of training sets built.")
