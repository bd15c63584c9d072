"""Prometheus metrics of the consistency check."""

from prometheus_client import Counter, Gauge

SAMPLES = Counter(
    "millrace_feature_consistency_samples_total",
    "Sampled answers: logged, checked; future (asked ahead of time, not comparable), dropped (no room), unchecked (tables or "
    "definitions are gone).",
    ["result"],
)
VALUES = Counter(
    "millrace_feature_consistency_values_total",
    "Served values compared with the lake's: equal, mismatch, missing (only the lake has one) or extra (only the answer has one).",
    ["feature_service", "feature", "outcome"],
)
PAIRS = Counter(
    "millrace_feature_consistency_pairs_total", "Values that both sides have.", ["feature_service", "feature"]
)
ERROR = Counter(
    "millrace_feature_consistency_error_total",
    "Sum of 2|s-e| / (|s|+|e|) over the pairs; divided by their number it is SMAPE.",
    ["feature_service", "feature"],
)
WAITING = Gauge("millrace_feature_consistency_waiting", "Logged answers that are not checked yet.")
CHECK_LAG = Gauge(
    "millrace_feature_consistency_check_lag_seconds", "How long the oldest answer waits beyond its time to settle."
)
