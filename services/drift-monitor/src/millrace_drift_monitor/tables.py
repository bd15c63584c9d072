"""Tables of the drift monitor. Times are microseconds since 1970 (UTC): event time and time of prediction are the data's own,
`stored_us` and the like are this machine's clock.
"""

from millrace_kit.outbox import outbox_table
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    false,
)

METADATA = MetaData()
_SEQUENCE = BigInteger().with_variant(Integer, "sqlite")

POSITION = Table(
    "position",
    METADATA,
    Column("topic", Text, primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("next_offset", BigInteger, nullable=False),
)
# Batches taken, to drop their second copy. `mark` tells a repeated batch from a producer that started counting anew.
SEEN_BATCH = Table(
    "seen_batch",
    METADATA,
    Column("seq", _SEQUENCE, primary_key=True, autoincrement=True),
    Column("topic", Text, nullable=False),
    Column("origin", Text, nullable=False),
    Column("place", BigInteger, nullable=False),
    Column("mark", Text, nullable=False),
    UniqueConstraint("topic", "origin", "place", "mark"),
)
# How outcomes are joined; empty contract: the model has none.
MODEL_INFO = Table(
    "model_info",
    METADATA,
    Column("model", Text, primary_key=True),
    Column("contract", Text, nullable=False),
    Column("subject_column", Text, nullable=False),
    Column("label_column", Text, nullable=False),
    Column("threshold", Double, nullable=False),
    Column("numeric", Boolean, nullable=False, server_default=false()),
)
VERSION_INFO = Table(
    "version_info",
    METADATA,
    Column("model", Text, primary_key=True),
    Column("version", Text, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("feature_names", Text, nullable=False),
)
REFERENCE = Table(
    "reference",
    METADATA,
    Column("model", Text, primary_key=True),
    Column("version", Text, primary_key=True),
    Column("training_set_digest", Text, nullable=False),
    Column("request_sha256", Text, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("features", Integer, nullable=False),
    Column("profile", LargeBinary, nullable=False),
    Column("stored_us", BigInteger, nullable=False),
)
PREDICTION = Table(
    "prediction",
    METADATA,
    Column("seq", _SEQUENCE, primary_key=True, autoincrement=True),
    Column("prediction_id", Text, nullable=False, unique=True),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("event_us", BigInteger, nullable=False),
    Column("predicted_us", BigInteger, nullable=False),
    # Little-endian float64.
    Column("features", LargeBinary, nullable=False),
    Column("outputs", LargeBinary, nullable=False),
    # First output; null when the payload was not sampled or is no number.
    Column("score", Double),
    Column("definitions_hash", Text, nullable=False),
    Column("trace_id", Text, nullable=False),
    Column("outcome", Boolean),
    Column("stored_us", BigInteger, nullable=False),
    Column("client", Text, nullable=False, server_default=""),
    # Neither of these is evidence about the version.
    Column("pinned", Boolean, nullable=False, server_default=false()),
    Column("cached", Boolean, nullable=False, server_default=false()),
    Index("prediction_subject", "subject"),
    Index("prediction_window", "model", "version", "event_us"),
    Index("prediction_since", "model", "predicted_us"),
)
OUTCOME = Table(
    "outcome",
    METADATA,
    Column("seq", _SEQUENCE, primary_key=True, autoincrement=True),
    Column("contract", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("label", Boolean, nullable=False),
    Column("stored_us", BigInteger, nullable=False),
    # Of a numeric label.
    Column("number", Double),
    # Tracked columns of its record as a JSON object; null for none.
    Column("columns", Text),
    UniqueConstraint("contract", "subject"),
)


def _figures(name: str, *key: Column[int]) -> Table:
    return Table(
        name,
        METADATA,
        Column("model", Text, primary_key=True),
        Column("version", Text, primary_key=True),
        *key,
        Column("predictions", BigInteger, nullable=False),
        Column("outcomes", BigInteger, nullable=False),
        Column("correct", BigInteger, nullable=False),
        Column("brier_sum", Double, nullable=False),
        Column("brier_square_sum", Double, nullable=False),
    )


# Sums over all time, and over short spans of the time of prediction.
FIGURE_TOTAL = _figures("figure_total")
FIGURE_SPAN = _figures("figure_span", Column("span_us", BigInteger, primary_key=True))

# Predictions by the bucket of their score, over all time.
SCORE_TOTAL = Table(
    "score_total",
    METADATA,
    Column("model", Text, primary_key=True),
    Column("version", Text, primary_key=True),
    Column("bucket", Integer, primary_key=True),
    Column("predictions", BigInteger, nullable=False),
)

# Values of outcomes whose sums gates want, and the sums; "" is the segment of all.
TRACKED = Table(
    "tracked",
    METADATA,
    Column("seq", _SEQUENCE, primary_key=True, autoincrement=True),
    Column("model", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("metric", Text, nullable=False),
    Column("lower", Double),
    Column("upper", Double),
    Column("segment", Text, nullable=False),
    UniqueConstraint("model", "key"),
)
VALUE_TOTAL = Table(
    "value_total",
    METADATA,
    Column("model", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("version", Text, primary_key=True),
    Column("segment", Text, primary_key=True),
    Column("n", BigInteger, nullable=False),
    Column("total", Double, nullable=False),
    Column("square", Double, nullable=False),
    Column("clipped", BigInteger, nullable=False),
)

EVENT_WINDOW = Table(
    "event_window",
    METADATA,
    Column("seq", _SEQUENCE, primary_key=True, autoincrement=True),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("start_us", BigInteger, nullable=False),
    Column("end_us", BigInteger, nullable=False),
    Column("max_event_us", BigInteger, nullable=False),
    Column("touched_us", BigInteger, nullable=False),
    Column("predictions", BigInteger, nullable=False),
    Column("outcomes", BigInteger, nullable=False),
    Column("positives", BigInteger, nullable=False),
    Column("correct", BigInteger, nullable=False),
    # Null until the version has a reference.
    Column("sketch", LargeBinary),
    Column("tests", Integer, nullable=False),
    # Null while open.
    Column("closed_us", BigInteger),
    UniqueConstraint("model", "version", "start_us"),
    Index("event_window_closed", "closed_us"),
)
FINDING = Table(
    "finding",
    METADATA,
    Column("seq", _SEQUENCE, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("start_us", BigInteger, nullable=False),
    Column("end_us", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("feature", Text, nullable=False),
    Column("test", Text, nullable=False),
    Column("statistic", Double, nullable=False),
    Column("p_value", Double, nullable=False),
    Column("effect", Double, nullable=False),
    Column("threshold", Double, nullable=False),
    Column("reference_count", BigInteger, nullable=False),
    Column("window_count", BigInteger, nullable=False),
    Column("found_us", BigInteger, nullable=False),
    Column("summary", Text, nullable=False),
    Index("finding_window", "model", "version", "start_us"),
)
OUTBOX = outbox_table(METADATA)
