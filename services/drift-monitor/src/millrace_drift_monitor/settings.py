"""Settings of the drift monitor."""

from millrace_kit.settings import ServiceSettings, Settings
from pydantic import Field


class Thresholds(Settings):
    """When a change counts: it must be significant after false-discovery control AND at least this large.

    An effect threshold is raised, feature by feature, to what the reference's own windows show as natural (`natural_margin`).
    """

    false_discovery_rate: float = Field(default=0.01, gt=0, lt=0.5)
    """Expected share of false findings among the significant tests of one window (Benjamini-Hochberg)."""
    ks_distance: float = Field(default=0.2, ge=0, le=1)
    """Kolmogorov-Smirnov distance of a numeric feature or of the predictions."""
    cramers_v: float = Field(default=0.2, ge=0, le=1)
    """Cramer's V of a categorical feature."""
    psi: float = Field(default=0.25, ge=0)
    """Population stability index; 0.25 is the usual border of a major change."""
    rate_difference: float = Field(default=0.1, ge=0, le=1)
    """Difference of the label rate, of a feature's null rate or of its share of values outside the reference's range."""
    accuracy_drop: float = Field(default=0.1, ge=0, le=1)
    """How far accuracy may fall below the reference's."""
    natural_margin: float = Field(default=0.1, ge=0, le=1)
    """The reference is cut into windows of the same length; an effect must exceed the largest of theirs by this share of
    what is left to its maximum (of itself, for PSI). Days differ from each other: without it every storm is a finding."""
    natural_min_windows: int = Field(default=10, ge=2)
    """Fewer reference windows than this say nothing about what is natural; then the plain thresholds hold."""


class Retention(Settings):
    """How much is kept; the oldest goes first and is counted. Sums and findings are not affected by lost rows."""

    max_predictions: int = Field(default=5_000_000, ge=1000)
    """Predictions kept for look-ups and for outcomes still to come."""
    max_outcomes: int = Field(default=5_000_000, ge=1000)
    """Outcomes kept for predictions still to come."""
    max_age_s: float = Field(default=90 * 86_400.0, gt=0)
    """Rows older than this (by arrival) go, whatever their number."""
    max_seen_batches: int = Field(default=1_000_000, ge=1000)
    """Batches remembered to drop duplicates."""
    max_windows: int = Field(default=20_000, ge=100)
    """Closed windows kept with their sketches."""
    max_findings: int = Field(default=100_000, ge=100)
    """Findings kept."""
    figures_age_s: float = Field(default=30 * 86_400.0, gt=60)
    """How far back `predicted_since` is exact; before it, only the sum over all time is known."""
    interval_s: float = Field(default=30.0, gt=0)
    """Time between two clean-ups."""


class DriftSettings(ServiceSettings):
    """What the drift monitor needs."""

    database_url: str = "sqlite:///.millrace/drift/drift.sqlite"
    """Where everything is kept: SQLite on one machine, `postgresql+psycopg://…` in a cluster."""
    registry_address: str = "127.0.0.1:7403"
    """Model registry: outcome specifications and feature names come from there."""
    registry_timeout_s: float = Field(default=5.0, gt=0, le=60)
    """Deadline of one call to the registry."""
    registry_retry_s: float = Field(default=2.0, gt=0, le=600)
    """Wait before the registry is asked again about a model it did not know or could not answer for."""
    window_s: int = Field(default=86_400, ge=60, le=366 * 86_400)
    """Length of a window of event time; windows start at multiples of it since 1970."""
    lateness_s: int = Field(default=43_200, ge=0, le=366 * 86_400)
    """How long after its end a window waits for late predictions and outcomes, in event time."""
    watermark_horizon_s: int = Field(default=30 * 86_400, ge=60)
    """A prediction closes windows only if its event time is at most this far past their end, so that a replay of last year
    and live traffic can run side by side."""
    idle_close_s: float = Field(default=3600.0, gt=0)
    """A window that is over and got nothing for this long (wall clock) is closed even without a later prediction."""
    max_ahead_s: float = Field(default=86_400.0, ge=0)
    """Predictions whose event time lies further in the future are refused as malformed."""
    min_count: int = Field(default=200, ge=20)
    """Rows a window needs before it is tested; a smaller one is reported without tests."""
    max_reference_rows: int = Field(default=20_000_000, ge=1000)
    """Largest training set taken as a reference."""
    store_schemes: tuple[str, ...] = ("file", "memory", "s3", "gs", "gcs", "abfs", "abfss", "az")
    """URL schemes a training-set store may have."""
    fetch_messages: int = Field(default=500, ge=1, le=10_000)
    """Bus messages handled in one transaction."""
    thresholds: Thresholds = Thresholds()
    retention: Retention = Retention()
