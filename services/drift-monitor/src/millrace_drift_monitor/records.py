"""What arrives, as plain values: predictions, outcomes and how they are joined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    client: str = ""
    pinned: bool = False
    cached: bool = False

    @property
    def is_evidence(self) -> bool:
        """Whether it says anything about its version: not where the caller chose it, or the model was not asked."""
        return not (self.pinned or self.cached)


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
    numeric: bool = False
    """The label is a number (regression), true where it reaches the threshold."""

    @property
    def source(self) -> str:
        """What the outcomes come from: models that share it share the outcomes."""
        if not self.contract:
            return ""
        source = f"{self.contract}/{self.subject_column}/{self.label_column}"
        return f"{source}/{self.threshold!r}" if self.numeric else source


Columns = Mapping[str, float | str]
"""Tracked columns of an outcome's record that have a value."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a prediction."""

    label: bool
    number: float
    """The label as a number; 0 or 1 where it is no number."""
    columns: Columns = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OutcomeBatch:
    """Labels of one records message, read for one `OutcomeSpec.source`."""

    topic: str
    origin: str
    place: int
    source: str
    subjects: Sequence[str]
    outcomes: Sequence[Outcome]


@dataclass(slots=True)
class Figures:
    """Sums over predictions and their outcomes."""

    predictions: int = 0
    outcomes: int = 0
    correct: int = 0
    brier_sum: float = 0.0
    brier_square_sum: float = 0.0

    def add_outcome(self, error: float, is_correct: bool) -> None:
        """Count one scored outcome with its squared error."""
        self.outcomes += 1
        self.correct += is_correct
        self.brier_sum += error
        self.brier_square_sum += error * error
