"""Prometheus metrics of vector search."""

from prometheus_client import Counter, Gauge, Histogram

SEARCHES = Counter("millrace_feature_vector_searches_total", "Vector searches answered.", ["view"])
SEARCH_SECONDS = Histogram(
    "millrace_feature_vector_search_seconds",
    "Time of a vector search, its wait for a turn included.",
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)
INDEX_ROWS = Gauge("millrace_feature_vector_index_rows", "Entities with a vector in the index.", ["view"])
INDEX_AGE = Gauge("millrace_feature_vector_index_age_seconds", "How long ago the indexes were level with the bus.")
