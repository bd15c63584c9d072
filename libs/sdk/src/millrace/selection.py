"""Which features of a training set are worth keeping: filters, mutual information and permutation importance.

Needs scikit-learn (`pip install millrace[select]`), so it runs where models are trained, in a notebook or a pipeline's stage, and never in
the feature service: judging features is training work, it takes as much memory and time as training does, and serving needs only its result,
a list of names.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from google.protobuf import json_format, struct_pb2
from millrace_api.feature.v1 import transformers_pb2 as transformers

Floats = npt.NDArray[np.float64]
Predict = Callable[[Floats], Floats]
"""From rows of the features that are no texts (NaN where missing) to one prediction a row: a probability, or a value."""
MAX_CLASSES = 20
"""A label of whole numbers with more values than this is a quantity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a feature must be like; everything that decides stands in the report."""

    max_missing: float = 0.95
    """Largest part of missing values."""
    max_correlation: float = 0.98
    """Largest rank correlation (Spearman, absolute) with a better feature."""
    min_mutual_information: float = 0.0
    """Smallest mutual information with the label, in nats; 0 leaves nothing out."""
    min_importance: float = 0.0
    """Permutation importance (rise of the loss) that a feature must exceed, where that is measured."""
    keep: int = 0
    """At most so many of the best; 0 keeps all that pass."""
    permutation: bool = True
    """Whether permutation importance is measured."""
    repeats: int = 5
    """Permutations a feature."""
    max_rows: int = 20_000
    """Rows judged, an even sample over time of larger sets."""
    test_share: float = 0.3
    """Part of the rows, the newest, that permutation importance is measured on; the estimator learns from the older ones."""
    seed: int = 0
    """Of everything random."""


@dataclass(slots=True)
class Judged:
    """One feature."""

    feature: str
    scores: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def is_selected(self) -> bool:
        """Whether no filter left it out."""
        return not self.reason


def select(
    table: pa.Table,
    *,
    features: Sequence[str],
    label: str,
    thresholds: Thresholds | None = None,
    predict: Predict | None = None,
) -> list[Judged]:
    """Judge features, best first.

    Args:
        table: a training set's rows, in its order (by time).
        features: columns to judge; texts count as categories and have no permutation importance.
        label: column of numbers or booleans.
        thresholds: what decides.
        predict: the model whose loss the permutations are to raise, trained on other rows; None trains gradient boosted trees on
            the older rows.

    Raises:
        ValueError: the set has fewer than 20 rows, or one value of the label alone.
    """
    given = thresholds or Thresholds()
    rows = table.num_rows
    if rows < 20:
        raise ValueError(f"the training set has {rows} rows; 20 are the least that say anything")
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, given.max_rows)).astype(np.int64))
    sample = table.take(pa.array(chosen))
    target = np.asarray(sample.column(label).cast(pa.float64()).to_numpy(), np.float64)
    if len(np.unique(target)) < 2:
        raise ValueError("the label has one value alone")
    is_text = [pa.types.is_string(sample.column(name).type) for name in features]
    columns = [_numbers(sample.column(name)) for name in features]
    judged = [Judged(name) for name in features]
    for item, column in zip(judged, columns, strict=True):
        _filter(item, column, given)
    _mutual_information(judged, columns, is_text, target, given)
    # Before permutations: of two features that say the same neither is missed when it is permuted.
    _drop_correlated(judged, columns, sorted(range(len(judged)), key=lambda i: _rank(judged[i])), given)
    if given.permutation:
        from threadpoolctl import threadpool_limits

        numeric = [i for i, text in enumerate(is_text) if not text]
        # One thread: so many small predictions spend more time on waiting for each other than on trees.
        with threadpool_limits(1, "openmp"):
            _permutation([judged[i] for i in numeric], [columns[i] for i in numeric], target, given, predict)
    order = sorted(range(len(judged)), key=lambda i: _rank(judged[i]))
    kept = [judged[i] for i in order if judged[i].is_selected]
    for item in kept[given.keep :] if given.keep else []:
        item.reason = f"not among the best {given.keep}"
    return [judged[i] for i in order]


def report(
    name: str, training_set: str, judged: Sequence[Judged], thresholds: Thresholds, **parameters: Any
) -> transformers.Selection:
    """What `TransformerArea.record_selection` keeps."""
    decided = {**asdict(thresholds), **parameters}
    return transformers.Selection(
        name=name,
        training_set=training_set,
        parameters=json_format.ParseDict(decided, struct_pb2.Struct()),
        features=[
            transformers.FeatureScore(
                feature=item.feature, selected=item.is_selected, reason=item.reason, scores=item.scores
            )
            for item in judged
        ],
    )


def _numbers(column: pa.ChunkedArray) -> Floats:
    """Numbers with NaN where missing; texts and times as codes of their values."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_timestamp(kind):
        codes = column.combine_chunks().dictionary_encode().indices
        return np.asarray(codes.cast(pa.float64()).fill_null(math.nan).to_numpy(zero_copy_only=False), np.float64)
    return np.asarray(column.cast(pa.float64()).fill_null(math.nan).to_numpy(), np.float64)


def _filter(item: Judged, column: Floats, given: Thresholds) -> None:
    missing = float(np.isnan(column).mean())
    item.scores["missing"] = missing
    values = np.unique(column[~np.isnan(column)])
    if missing > given.max_missing:
        item.reason = f"missing in {missing:.0%}"
    elif len(values) < 2 and (missing in {0.0, 1.0}):
        item.reason = "constant"
    elif not np.isfinite(values).all():
        item.reason = "holds infinite numbers"


def _is_class(target: Floats) -> bool:
    values = np.unique(target)
    return len(values) <= MAX_CLASSES and bool((values == np.round(values)).all())


def _mutual_information(
    judged: Sequence[Judged], columns: Sequence[Floats], is_text: Sequence[bool], target: Floats, given: Thresholds
) -> None:
    """Mutual information with the label (Kraskov et al. 2004, Ross 2014, as scikit-learn has it)."""
    from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

    open_ = [i for i, item in enumerate(judged) if item.is_selected]
    if not open_:
        return
    filled = np.stack([_filled(columns[i]) for i in open_], axis=1)
    discrete = np.array([is_text[i] or len(np.unique(columns[i])) <= MAX_CLASSES for i in open_])
    measure = mutual_info_classif if _is_class(target) else mutual_info_regression
    found = measure(filled, target, discrete_features=discrete, random_state=given.seed)
    for i, value in zip(open_, np.asarray(found).tolist(), strict=True):
        judged[i].scores["mutual_information"] = value
        if value < given.min_mutual_information:
            judged[i].reason = f"mutual information {value:.3g}"


def _filled(column: Floats) -> Floats:
    """Missing values as a value of their own, well below the others: that one is missing may say something."""
    known = column[~np.isnan(column)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    return np.where(np.isnan(column), low - (high - low) - 1.0, column)


def _permutation(
    judged: Sequence[Judged], columns: Sequence[Floats], target: Floats, given: Thresholds, predict: Predict | None
) -> None:
    """How much worse the newest rows are predicted when a feature's values change places (Breiman 2001)."""
    places = [i for i, item in enumerate(judged) if item.is_selected]
    if not places:
        return
    matrix = np.stack(columns, axis=1)
    first = len(target) - max(int(len(target) * given.test_share), 1)
    model = predict or _trained_on(matrix[:first], target[:first], places, seed=given.seed)
    rows, truth = matrix[first:], target[first:]
    loss = _log_loss if set(np.unique(target)) <= {0.0, 1.0} else _squares
    base = loss(truth, model(rows))
    random = np.random.default_rng(given.seed)
    for place in places:
        rises = []
        for _ in range(given.repeats):
            shuffled = rows.copy()
            shuffled[:, place] = random.permutation(shuffled[:, place])
            rises.append(loss(truth, model(shuffled)) - base)
        item = judged[place]
        item.scores["permutation_mean"] = float(np.mean(rises))
        item.scores["permutation_std"] = float(np.std(rises))
        if item.scores["permutation_mean"] <= given.min_importance:
            item.reason = f"importance {item.scores['permutation_mean']:.3g}"


def _trained_on(matrix: Floats, target: Floats, places: Sequence[int], *, seed: int) -> Predict:
    """A model of the features at `places` that takes rows of all."""
    model = _trained(matrix[:, places], target, seed=seed)
    return lambda rows: model(rows[:, places])


def _trained(matrix: Floats, target: Floats, *, seed: int) -> Predict:
    """Gradient boosted trees, which take missing values as they are."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    if set(np.unique(target)) <= {0.0, 1.0}:
        classifier = HistGradientBoostingClassifier(max_iter=100, random_state=seed).fit(matrix, target)
        return lambda rows: np.asarray(classifier.predict_proba(rows)[:, -1], np.float64)
    regressor = HistGradientBoostingRegressor(max_iter=100, random_state=seed).fit(matrix, target)
    return lambda rows: np.asarray(regressor.predict(rows), np.float64)


def _log_loss(truth: Floats, found: Floats) -> float:
    sure = np.clip(found, 1e-9, 1 - 1e-9)
    return float(-np.mean(truth * np.log(sure) + (1 - truth) * np.log(1 - sure)))


def _squares(truth: Floats, found: Floats) -> float:
    return float(np.mean((truth - found) ** 2))


def _rank(item: Judged) -> tuple[bool, float, float, str]:
    scores: Mapping[str, float] = item.scores
    permutation = scores.get("permutation_mean", 0.0)
    return not item.is_selected, -permutation, -scores.get("mutual_information", 0.0), item.feature


def _drop_correlated(
    judged: Sequence[Judged], columns: Sequence[Floats], order: Sequence[int], given: Thresholds
) -> None:
    """Of features that rank the rows alike the best stays; among rows where both are known."""
    kept: list[int] = []
    for i in order:
        if not judged[i].is_selected:
            continue
        for j in kept:
            both = ~np.isnan(columns[i]) & ~np.isnan(columns[j])
            if both.sum() < 3:
                continue
            value = _spearman(columns[i][both], columns[j][both])
            if abs(value) > given.max_correlation:
                judged[i].reason = f"correlates {value:+.3f} with {judged[j].feature}"
                judged[i].scores["correlation"] = value
                break
        else:
            kept.append(i)


def _spearman(first: Floats, second: Floats) -> float:
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(first), rankdata(second)])
    deviations = ranks.std(axis=1)
    if not deviations.all():
        return 0.0
    return float(np.asarray(np.corrcoef(ranks))[0, 1])
