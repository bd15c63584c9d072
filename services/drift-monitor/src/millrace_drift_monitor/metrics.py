"""Prometheus metrics of the drift monitor."""

from prometheus_client import Counter, Gauge

PREDICTIONS = Counter("millrace_drift_predictions_total", "Predictions taken in.")
NOT_EVIDENCE = Counter(
    "millrace_drift_not_evidence_total",
    "Predictions kept that count for nothing: their caller chose the version, or the answer was given again.",
)
DUPLICATES = Counter("millrace_drift_duplicates_total", "What came a second time and was dropped.", ["what"])
MALFORMED = Counter("millrace_drift_malformed_total", "What could not be used and was left out.", ["what"])
OUTCOMES = Counter("millrace_drift_outcomes_total", "Outcomes taken in.")
JOINED = Counter("millrace_drift_outcomes_joined_total", "Predictions that got their outcome.")
LATE = Counter("millrace_drift_late_total", "Predictions that came after their window had closed.")
WINDOWS = Counter("millrace_drift_windows_closed_total", "Windows closed.")
FINDINGS = Counter("millrace_drift_findings_total", "Findings, by kind.", ["kind"])
REMOVED = Counter("millrace_drift_removed_total", "Rows removed by retention.", ["what"])
UNJOINED_REMOVED = Counter("millrace_drift_unjoined_removed_total", "Predictions removed before their outcome came.")
UNJOINED = Gauge("millrace_drift_unjoined", "Predictions that wait for an outcome.")
LAG = Gauge("millrace_drift_lag", "Bus messages not taken in yet.", ["topic"])
RETRIES = Counter(
    "millrace_drift_retries_total", "Times the bus or the database failed and the work was tried again.", ["what"]
)
