"""What arrives, as plain values: predictions, outcomes and how they are joined."""

from collections.abc import Sequence
from dataclasses import dataclass

MICROS = 1_000_000


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answered prediction; features and outputs as little-endian float64 bytes, `score` is the first output."""

    prediction_id: str
    model: str
    version: str
    digest: str
    subject: str
    event_us: int
    predicted_us: int
    features: bytes
    outputs: bytes
    score: float | None
    definitions_hash: str
    trace_id: str


@dataclass(frozen=True, slots=True)
class PredictionBatch:
    """One message of the prediction log; `origin` and `place` identify it."""

    topic: str
    origin: str
    place: int
    predictions: Sequence[Prediction]


@dataclass(frozen=True, slots=True)
class OutcomeSpec:
    """How outcomes of a model are found; an empty contract says that it has none."""

    contract: str
    subject_column: str
    label_column: str
    threshold: float

    @property
    def source(self) -> str:
        """What the outcomes come from: models that share it share the outcomes."""
        return f"{self.contract}/{self.subject_column}/{self.label_column}" if self.contract else ""


@dataclass(frozen=True, slots=True)
class OutcomeBatch:
    """Labels of one records message, read for one `OutcomeSpec.source`."""

    topic: str
    origin: str
    place: int
    source: str
    subjects: Sequence[str]
    labels: Sequence[bool]


@dataclass(slots=True)
class Figures:
    """Sums over predictions and their outcomes."""

    predictions: int = 0
    outcomes: int = 0
    correct: int = 0
    brier_sum: float = 0.0
    brier_square_sum: float = 0.0

    def add_outcome(self, score: float, label: bool, is_correct: bool) -> None:
        """Count one scored outcome."""
        error = (score - label) ** 2
        self.outcomes += 1
        self.correct += is_correct
        self.brier_sum += error
        self.brier_square_sum += error * error
