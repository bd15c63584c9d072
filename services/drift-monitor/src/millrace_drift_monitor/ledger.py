"""Predictions and outcomes in SQL, joined in either order, and the sums over them.

Every function works inside the caller's transaction and is idempotent: what is known already changes nothing. Writers take turns
(the store holds a lock), so looking before inserting is exact.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Connection, Table, bindparam, insert, literal, select, update
from sqlalchemy.dialects import postgresql, sqlite

from millrace_drift_monitor import tracking
from millrace_drift_monitor.records import (
    MICROS,
    Figures,
    Outcome,
    OutcomeBatch,
    OutcomeSpec,
    Prediction,
    PredictionBatch,
)
from millrace_drift_monitor.scores import bucket
from millrace_drift_monitor.tables import FIGURE_SPAN, FIGURE_TOTAL, OUTCOME, PREDICTION, SCORE_TOTAL, SEEN_BATCH
from millrace_drift_monitor.tracking import Tracked, dump_columns, load_columns

# Values in one IN list.
CHUNK = 1000
# Length of the spans `figure_span` sums over.
SPAN_US = 10 * MICROS
NO_OUTCOMES = OutcomeSpec("", "", "", 0.5)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of models, by their names."""

    specs: Mapping[str, OutcomeSpec] = field(default_factory=dict)
    tracked: Mapping[str, Sequence[Tracked]] = field(default_factory=dict)


@dataclass(slots=True)
class Joined:
    """A prediction whose outcome just became known."""

    model: str
    version: str
    event_us: int
    predicted_us: int
    score: float | None
    outcome: Outcome
    is_correct: bool
    error: float
    """Brier's: (score - label) squared; of a numeric label, whose score is no probability, whether it was wrong."""
    features: bytes
    client: str

    @property
    def label(self) -> bool:
        """The true label."""
        return self.outcome.label


@dataclass(slots=True)
class Taken:
    """What a transaction took in; only evidence is in `predictions` and `joined`."""

    predictions: list[Prediction] = field(default_factory=list)
    not_evidence: int = 0
    joined: list[Joined] = field(default_factory=list)
    duplicate_predictions: int = 0
    duplicate_batches: int = 0
    outcomes: int = 0


def chunks(values: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """`values` in lists of at most `size`."""
    iterator = iter(values)
    while part := list(islice(iterator, size)):
        yield part


@dataclass(frozen=True, slots=True)
class BatchKey:
    """What identifies a batch of the bus. `mark` tells a repeated batch from one of a producer that started counting anew."""

    topic: str
    origin: str
    place: int
    mark: str


def unseen(connection: Connection, keys: Sequence[BatchKey]) -> set[int]:
    """Remember the batches of `keys`; returns the indices of those that were never seen before, the first of equal ones."""
    by_origin: dict[tuple[str, str], set[int]] = defaultdict(set)
    for key in keys:
        by_origin[key.topic, key.origin].add(key.place)
    seen: set[BatchKey] = set()
    table = SEEN_BATCH.c
    for (topic, origin), places in by_origin.items():
        for part in chunks(places):
            query = select(table.place, table.mark).where(
                table.topic == topic, table.origin == origin, table.place.in_(part)
            )
            seen.update(BatchKey(topic, origin, row.place, row.mark) for row in connection.execute(query))
    fresh: dict[BatchKey, int] = {}
    for index, key in enumerate(keys):
        if key not in seen:
            fresh.setdefault(key, index)
    if fresh:
        connection.execute(insert(SEEN_BATCH), [asdict(key) for key in fresh])
    return set(fresh.values())


def _batch_key(batch: PredictionBatch) -> BatchKey:
    first = batch.predictions[0].prediction_id if batch.predictions else ""
    return BatchKey(batch.topic, batch.origin, batch.place, first)


def take_predictions(
    connection: Connection,
    batches: Sequence[PredictionBatch],
    known: Known,
    now_us: int,
    taken: Taken,
) -> None:
    """Store new predictions with the outcome where it is known, and add them to the sums."""
    fresh: dict[str, Prediction] = {}
    offered = 0
    new = unseen(connection, [_batch_key(batch) for batch in batches])
    taken.duplicate_batches += len(batches) - len(new)
    for index in sorted(new):
        offered += len(batches[index].predictions)
        fresh.update((prediction.prediction_id, prediction) for prediction in batches[index].predictions)
    for ids in chunks(list(fresh)):
        there = select(PREDICTION.c.prediction_id).where(PREDICTION.c.prediction_id.in_(ids))
        for row in connection.execute(there):
            del fresh[row.prediction_id]
    taken.duplicate_predictions += offered - len(fresh)
    if not fresh:
        return
    predictions = list(fresh.values())
    known_outcomes = _known_outcomes(connection, predictions, known)
    rows = [_prediction_row(p, known_outcomes.get((p.model, p.subject)), now_us) for p in predictions]
    connection.execute(insert(PREDICTION), rows)
    evidence = [p for p in predictions if p.is_evidence]
    found = ((p, known_outcomes.get((p.model, p.subject))) for p in evidence)
    joined = [_join(p, outcome, known) for p, outcome in found if outcome is not None]
    taken.not_evidence += len(predictions) - len(evidence)
    taken.predictions += evidence
    _count(connection, evidence, joined, known, taken)


def _count(
    connection: Connection,
    predictions: Sequence[Prediction],
    joined: Sequence[Joined],
    known: Known,
    taken: Taken,
) -> None:
    taken.joined += joined
    add_figures(connection, predictions, joined)
    if known.tracked:
        tracking.count(connection, joined, known.tracked)


def _join(row: Any, outcome: Outcome, known: Known) -> Joined:
    """`row` is a `Prediction` or has its attributes."""
    spec, error = known.specs.get(row.model, NO_OUTCOMES), 0.0
    is_correct = row.score is not None and (row.score >= spec.threshold) == outcome.label
    if row.score is not None:
        error = float(not is_correct) if spec.numeric else (row.score - outcome.label) ** 2
    return Joined(
        row.model,
        row.version,
        row.event_us,
        row.predicted_us,
        row.score,
        outcome,
        is_correct,
        error,
        row.features,
        row.client,
    )


def _prediction_row(p: Prediction, outcome: Outcome | None, now_us: int) -> dict[str, object]:
    return {
        "prediction_id": p.prediction_id,
        "model": p.model,
        "version": p.version,
        "digest": p.digest,
        "subject": p.subject,
        "event_us": p.event_us,
        "predicted_us": p.predicted_us,
        "features": p.features,
        "outputs": p.outputs,
        "score": p.score,
        "definitions_hash": p.definitions_hash,
        "trace_id": p.trace_id,
        "outcome": None if outcome is None else outcome.label,
        "stored_us": now_us,
        "client": p.client,
        "pinned": p.pinned,
        "cached": p.cached,
    }


_OUTCOME_NAMES = ("subject", "label", "number", "columns")


def _outcome(row: Any) -> Outcome:
    number = float(row.label) if row.number is None else row.number
    return Outcome(row.label, number, load_columns(row.columns))


def _known_outcomes(
    connection: Connection, predictions: Sequence[Prediction], known: Known
) -> dict[tuple[str, str], Outcome]:
    """Outcomes that came before their predictions, by (model, subject)."""
    models_of: dict[str, set[str]] = defaultdict(set)
    subjects_of: dict[str, set[str]] = defaultdict(set)
    for p in predictions:
        source = known.specs.get(p.model, NO_OUTCOMES).source
        if source and p.subject:
            models_of[source].add(p.model)
            subjects_of[source].add(p.subject)
    found: dict[tuple[str, str], Outcome] = {}
    for source, subjects in subjects_of.items():
        for part in chunks(subjects):
            query = select(*(OUTCOME.c[name] for name in _OUTCOME_NAMES)).where(
                OUTCOME.c.contract == source, OUTCOME.c.subject.in_(part)
            )
            for row in connection.execute(query):
                found.update(((model, row.subject), _outcome(row)) for model in models_of[source])
    return found


def take_outcomes(
    connection: Connection,
    batch: OutcomeBatch,
    known: Known,
    now_us: int,
    taken: Taken,
) -> None:
    """Store new outcomes, label the predictions that waited for them, and add these to the sums."""
    if not unseen(connection, [BatchKey(batch.topic, batch.origin, batch.place, batch.source)]):
        taken.duplicate_batches += 1
        return
    # The first outcome of a subject stands; ingestion drops later ones of the same event id anyway.
    outcomes: dict[str, Outcome] = {}
    for subject, outcome in zip(batch.subjects, batch.outcomes, strict=True):
        outcomes.setdefault(subject, outcome)
    for part in chunks(list(outcomes)):
        there = select(OUTCOME.c.subject).where(OUTCOME.c.contract == batch.source, OUTCOME.c.subject.in_(part))
        for row in connection.execute(there):
            del outcomes[row.subject]
    if not outcomes:
        return
    models = [model for model, spec in known.specs.items() if spec.source == batch.source]
    numeric = any(known.specs[model].numeric for model in models)
    connection.execute(
        insert(OUTCOME),
        [
            {
                "contract": batch.source,
                "subject": subject,
                "label": outcome.label,
                "stored_us": now_us,
                "number": outcome.number if numeric else None,
                "columns": dump_columns(outcome.columns),
            }
            for subject, outcome in outcomes.items()
        ],
    )
    taken.outcomes += len(outcomes)
    join_waiting(connection, models, outcomes, known, taken)


def join_waiting(
    connection: Connection,
    models: Sequence[str],
    outcomes: Mapping[str, Outcome],
    known: Known,
    taken: Taken,
) -> None:
    """Give stored predictions of `models` their outcome from `outcomes` (by subject)."""
    if not models:
        return
    joined: list[Joined] = []
    updates: list[dict[str, object]] = []
    names = ("seq", "model", "version", "subject", "event_us", "predicted_us", "score", "client", "pinned", "cached")
    wanted = any(value.segment for model in models for value in known.tracked.get(model, ()))
    # Rows of features are long; only segments by a feature look at them.
    features = PREDICTION.c.features if wanted else literal(b"").label("features")
    for part in chunks(list(outcomes)):
        waiting = select(*(PREDICTION.c[name] for name in names), features).where(
            PREDICTION.c.subject.in_(part), PREDICTION.c.model.in_(models), PREDICTION.c.outcome.is_(None)
        )
        for row in connection.execute(waiting):
            outcome = outcomes[row.subject]
            updates.append({"row": row.seq, "label": outcome.label})
            if not (row.pinned or row.cached):
                joined.append(_join(row, outcome, known))
    if updates:
        statement = update(PREDICTION).where(PREDICTION.c.seq == bindparam("row")).values(outcome=bindparam("label"))
        connection.execute(statement, updates)
        _count(connection, [], joined, known, taken)


def adopt(
    connection: Connection,
    model: str,
    known: Known,
    taken: Taken,
) -> None:
    """Join what came before the model's outcome specification was known."""
    source = known.specs[model].source
    if not source:
        return
    last = 0
    while True:
        query = (
            select(PREDICTION.c.seq, *(OUTCOME.c[name] for name in _OUTCOME_NAMES))
            .join(OUTCOME, (OUTCOME.c.subject == PREDICTION.c.subject) & (OUTCOME.c.contract == source))
            .where(PREDICTION.c.model == model, PREDICTION.c.outcome.is_(None), PREDICTION.c.seq > last)
            .order_by(PREDICTION.c.seq)
            .limit(CHUNK)
        )
        found = connection.execute(query).all()
        if not found:
            return
        last = found[-1].seq
        join_waiting(connection, [model], {row.subject: _outcome(row) for row in found}, known, taken)


def add_figures(connection: Connection, predictions: Sequence[Prediction], joined: Sequence[Joined]) -> None:
    """Add to the sums per version, over all time and per span of the time of prediction."""
    totals: dict[tuple[str, str], Figures] = defaultdict(Figures)
    spans: dict[tuple[str, str, int], Figures] = defaultdict(Figures)
    for p in predictions:
        totals[p.model, p.version].predictions += 1
        spans[p.model, p.version, p.predicted_us // SPAN_US * SPAN_US].predictions += 1
    for j in joined:
        if j.score is None:
            continue
        totals[j.model, j.version].add_outcome(j.error, j.is_correct)
        spans[j.model, j.version, j.predicted_us // SPAN_US * SPAN_US].add_outcome(j.error, j.is_correct)
    _add_sums(
        connection, FIGURE_TOTAL, [(dict(zip(("model", "version"), k, strict=True)), f) for k, f in totals.items()]
    )
    scores = Counter((p.model, p.version, bucket(p.score)) for p in predictions if p.score is not None)
    _add_scores(connection, scores)
    names = ("model", "version", "span_us")
    _add_sums(connection, FIGURE_SPAN, [(dict(zip(names, k, strict=True)), f) for k, f in spans.items()])


def _add_scores(connection: Connection, scores: Mapping[tuple[str, str, int], int]) -> None:
    if not scores:
        return
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    upsert = dialect.insert(SCORE_TOTAL)
    total = SCORE_TOTAL.c.predictions + upsert.excluded.predictions
    upsert = upsert.on_conflict_do_update(index_elements=["model", "version", "bucket"], set_={"predictions": total})
    names = ("model", "version", "bucket", "predictions")
    # In one order, so that two writers never wait for each other.
    rows = [dict(zip(names, (*key, count), strict=True)) for key, count in sorted(scores.items())]
    connection.execute(upsert, rows)


_SUMS = ("predictions", "outcomes", "correct", "brier_sum", "brier_square_sum")


def _add_sums(connection: Connection, table: Table, sums: Sequence[tuple[Mapping[str, object], Figures]]) -> None:
    """Add to existing rows, and make a row for predictions; outcomes alone never bring back a row that retention removed."""
    made = [{**key, **{name: getattr(f, name) for name in _SUMS}} for key, f in sums if f.predictions]
    if made:
        dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
        upsert = dialect.insert(table)
        upsert = upsert.on_conflict_do_update(
            index_elements=[column.name for column in table.primary_key],
            set_={name: table.c[name] + upsert.excluded[name] for name in _SUMS},
        )
        connection.execute(upsert, made)
    added = [
        {**{f"at_{name}": value for name, value in key.items()}, **{f"add_{name}": getattr(f, name) for name in _SUMS}}
        for key, f in sums
        if not f.predictions
    ]
    if added:
        here = [column == bindparam(f"at_{column.name}") for column in table.primary_key]
        values = {name: table.c[name] + bindparam(f"add_{name}") for name in _SUMS}
        connection.execute(update(table).where(*here).values(values), added)
