"""What the RPCs answer from: reads only, each in one snapshot."""

import json
from collections.abc import Sequence
from typing import Any

from millrace_kit.errors import NotFoundError
from millrace_kit.sql import reading
from sqlalchemy import Connection, Double, Integer, Select, case, cast, func, not_, or_, select

from millrace_drift_monitor import tracking
from millrace_drift_monitor.ledger import NO_OUTCOMES, SPAN_US
from millrace_drift_monitor.records import Figures, OutcomeSpec
from millrace_drift_monitor.store import Store, specs_of
from millrace_drift_monitor.tables import (
    EVENT_WINDOW,
    FIGURE_SPAN,
    FIGURE_TOTAL,
    FINDING,
    MODEL_INFO,
    OUTCOME,
    PREDICTION,
    SCORE_TOTAL,
    VERSION_INFO,
)
from millrace_drift_monitor.tracking import Tracked, ValueSums

_SUMS = ("predictions", "outcomes", "correct", "brier_sum", "brier_square_sum")


class Answers:
    """Reads of the store.

    Args:
        store: the drift monitor's database.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._engine = store.engine

    def findings(self, model: str, limit: int) -> Sequence[Any]:
        """Newest findings of a model, or of all."""
        query = select(FINDING).order_by(FINDING.c.seq.desc()).limit(limit)
        if model:
            query = query.where(FINDING.c.model == model)
        with reading(self._engine) as connection:
            return connection.execute(query).all()

    def windows(self, model: str, limit: int) -> list[tuple[Any, list[Any]]]:
        """Newest closed windows with their findings."""
        names = ("model", "version", "start_us", "end_us", "predictions", "outcomes", "correct", "tests")
        query = select(*(EVENT_WINDOW.c[name] for name in names)).where(EVENT_WINDOW.c.closed_us.is_not(None))
        if model:
            query = query.where(EVENT_WINDOW.c.model == model)
        query = query.order_by(EVENT_WINDOW.c.closed_us.desc(), EVENT_WINDOW.c.seq.desc()).limit(limit)
        with reading(self._engine) as connection:
            windows = connection.execute(query).all()
            return [(w, [*connection.execute(_findings_of(w.model, w.version, w.start_us))]) for w in windows]

    def prediction(self, prediction_id: str) -> tuple[Any, list[str], str, dict[str, float]]:
        """A prediction, its version's feature names and digest (empty while unknown), and its outcome's numbers.

        Raises:
            NotFoundError: no such prediction, or it was too old to keep.
        """
        with reading(self._engine) as connection:
            row = connection.execute(select(PREDICTION).where(PREDICTION.c.prediction_id == prediction_id)).first()
            if row is None:
                raise NotFoundError("prediction", prediction_id)
            numbers = _outcome_numbers(connection, row) if row.outcome is not None else {}
            here = (VERSION_INFO.c.model == row.model) & (VERSION_INFO.c.version == row.version)
            info = connection.execute(select(VERSION_INFO).where(here)).first()
            if info is not None:
                return row, json.loads(info.feature_names), info.digest, numbers
            profile = self._store.profile(connection, row.model, row.version)
            return row, [*profile.feature_names] if profile else [], "", numbers

    def figures(self, model: str, since_us: int | None) -> dict[str, Figures]:
        """Sums per version over predictions made at or after `since_us`; None takes all."""
        with reading(self._engine) as connection:
            if since_us is None:
                rows = connection.execute(select(FIGURE_TOTAL).where(FIGURE_TOTAL.c.model == model)).all()
                return {row.version: _figures(row) for row in rows}
            first_us = -(-since_us // SPAN_US) * SPAN_US
            found = {row.version: _figures(row) for row in connection.execute(_span_sums(model, first_us))}
            if first_us > since_us:
                spec = specs_of(connection).get(model, NO_OUTCOMES)
                exact = _exact_sums(model, since_us, first_us, spec)
                for row in connection.execute(exact):
                    found[row.version] = _sum(found.get(row.version, Figures()), _figures(row))
            return found

    def scores(self, model: str) -> dict[str, dict[int, int]]:
        """Predictions per version and bucket of their score, over all time."""
        found: dict[str, dict[int, int]] = {}
        with reading(self._engine) as connection:
            for row in connection.execute(select(SCORE_TOTAL).where(SCORE_TOTAL.c.model == model)):
                found.setdefault(row.version, {})[row.bucket] = row.predictions
        return found

    def tracked(self, model: str) -> list[tuple[Tracked, list[tuple[str, str, ValueSums]]]]:
        """Every tracked value with its sums by version and segment."""
        with reading(self._engine) as connection:
            return tracking.figures(connection, model)

    def waiting(self) -> int:
        """Predictions that wait for an outcome, of models that have outcomes."""
        query = select(func.coalesce(func.sum(FIGURE_TOTAL.c.predictions - FIGURE_TOTAL.c.outcomes), 0)).where(
            FIGURE_TOTAL.c.model.in_(select(MODEL_INFO.c.model).where(MODEL_INFO.c.contract != ""))
        )
        with reading(self._engine) as connection:
            return int(connection.execute(query).scalar_one())


def _outcome_numbers(connection: Connection, row: Any) -> dict[str, float]:
    """Tracked numbers of a prediction's outcome, and its label's where that is a number."""
    spec = specs_of(connection).get(row.model, NO_OUTCOMES)
    here = (OUTCOME.c.contract == spec.source) & (OUTCOME.c.subject == row.subject)
    found = connection.execute(select(OUTCOME.c.number, OUTCOME.c.columns).where(here)).first()
    if found is None:
        return {}
    columns = tracking.load_columns(found.columns)
    numbers = {name: value for name, value in columns.items() if isinstance(value, float)}
    return numbers if found.number is None else {**numbers, spec.label_column: found.number}


def _findings_of(model: str, version: str, start_us: int) -> Select[Any]:
    here = (FINDING.c.model == model) & (FINDING.c.version == version) & (FINDING.c.start_us == start_us)
    return select(FINDING).where(here).order_by(FINDING.c.seq)


def _span_sums(model: str, first_us: int) -> Select[Any]:
    sums = (func.sum(FIGURE_SPAN.c[name]).label(name) for name in _SUMS)
    here = (FIGURE_SPAN.c.model == model) & (FIGURE_SPAN.c.span_us >= first_us)
    return select(FIGURE_SPAN.c.version, *sums).where(here).group_by(FIGURE_SPAN.c.version)


def _exact_sums(model: str, since_us: int, until_us: int, spec: OutcomeSpec) -> Select[Any]:
    """Sums over the stored predictions of one part of a span."""
    p = PREDICTION.c
    is_scored = p.outcome.is_not(None) & p.score.is_not(None)
    right = ((p.score >= spec.threshold) & p.outcome) | ((p.score < spec.threshold) & ~p.outcome)
    difference = p.score - cast(cast(p.outcome, Integer), Double)
    error = case((right, 0.0), else_=1.0) if spec.numeric else difference * difference
    here = (p.model == model) & (p.predicted_us >= since_us) & (p.predicted_us < until_us)
    here &= not_(or_(p.pinned, p.cached))
    return (
        select(
            p.version,
            func.count().label("predictions"),
            func.sum(case((is_scored, 1), else_=0)).label("outcomes"),
            func.sum(case((is_scored & right, 1), else_=0)).label("correct"),
            func.sum(case((is_scored, error), else_=0.0)).label("brier_sum"),
            func.sum(case((is_scored, error * error), else_=0.0)).label("brier_square_sum"),
        )
        .where(here)
        .group_by(p.version)
    )


def _figures(row: Any) -> Figures:
    return Figures(
        int(row.predictions), int(row.outcomes), int(row.correct), float(row.brier_sum), float(row.brier_square_sum)
    )


def _sum(a: Figures, b: Figures) -> Figures:
    return Figures(
        a.predictions + b.predictions,
        a.outcomes + b.outcomes,
        a.correct + b.correct,
        a.brier_sum + b.brier_sum,
        a.brier_square_sum + b.brier_square_sum,
    )
