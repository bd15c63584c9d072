"""How good probabilities are: figures of a binary classifier, in NumPy."""

import numpy as np
from common import THRESHOLD, Doubles

BINS = 10


def figures(labels: Doubles, scores: Doubles) -> dict[str, float]:
    """AUC, accuracy at 0.5, Brier score, log loss, expected calibration error and the two means.

    Args:
        labels: shape (n,), 0 or 1; both must occur.
        scores: shape (n,), probabilities.
    """
    clipped = np.clip(scores, 1e-7, 1 - 1e-7)
    return {
        "auc": auc(labels, scores),
        "accuracy": float(np.mean((scores >= THRESHOLD) == (labels > 0))),
        "brier": float(np.mean((scores - labels) ** 2)),
        "log_loss": float(-np.mean(labels * np.log(clipped) + (1 - labels) * np.log1p(-clipped))),
        "ece": float(
            sum(row["weight"] * abs(row["predicted"] - row["observed"]) for row in calibration(labels, scores))
        ),
        "label_rate": float(np.mean(labels)),
        "mean_score": float(np.mean(scores)),
    }


def auc(labels: Doubles, scores: Doubles) -> float:
    """Area under the ROC curve: how often a late flight scores above a punctual one, ties half (Mann-Whitney)."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]
    late = labels > 0
    positives, negatives = int(late.sum()), int((~late).sum())
    return float((ranks[late].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def calibration(labels: Doubles, scores: Doubles) -> list[dict[str, float]]:
    """Ten bins of equal width: share of rows, mean probability and share of late flights in each that holds any."""
    bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    table = []
    for place in range(BINS):
        chosen = bins == place
        if chosen.any():
            table.append(
                {
                    "weight": float(chosen.mean()),
                    "predicted": float(scores[chosen].mean()),
                    "observed": float(labels[chosen].mean()),
                }
            )
    return table
