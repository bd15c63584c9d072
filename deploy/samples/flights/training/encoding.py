"""How a raw feature vector becomes what the network reads; fitted on training rows, and later written into the ONNX graph.

A number gives three things: its logarithm with sign, standardised and cut at four deviations (0 where it is missing); whether it is missing,
for columns that ever are; and, in variants with bins, how far it reaches into each quantile bin (a piecewise-linear encoding, Gorishniy
et al. 2022, which brings perceptrons level with boosted trees on tables). A code gives its place in an embedding, 0 for an unknown one.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from common import CODE_SUFFIX, Floats, Places

FIT_ROWS = 40_000
CUT = 4.0
CHUNK = 8192


@dataclass(frozen=True)
class Encoding:
    """Fitted constants. N features in; `width` numbers and `len(code_columns)` embedding places out."""

    code_columns: Places
    """Columns of the vector that are codes."""
    vocabulary: Places
    """Rows of each code's embedding: known codes + 1."""
    number_columns: Places
    mean: Floats
    """Of the signed logarithm, one a number column."""
    scale: Floats
    """One over its standard deviation."""
    missing: Places
    """Places among the number columns of those that were missing in training."""
    bin_column: Places
    """Place among the number columns that each bin belongs to."""
    bin_low: Floats
    bin_scale: Floats
    """One over the bin's width."""

    @property
    def width(self) -> int:
        """Numbers a row is encoded to."""
        return len(self.number_columns) + len(self.missing) + len(self.bin_column)


def fit(features: Floats, names: list[str], columns: Places, bins: int) -> Encoding:
    """Constants from training rows.

    Args:
        features: shape (rows, N); at most 40,000 rows at even distances are looked at.
        names: N feature names.
        columns: places of the features to use.
        bins: quantile bins a number; 0 for none.
    """
    sample = np.asarray(features[:: max(1, -(-len(features) // FIT_ROWS))], dtype=np.float32)
    codes = np.array([i for i in columns if names[i].endswith(CODE_SUFFIX)], dtype=np.int64)
    known = np.nan_to_num(np.asarray(features[:, codes]), nan=-1.0)
    numbers = np.array([i for i in columns if i not in set(codes.tolist())], dtype=np.int64)
    values = sample[:, numbers]
    absent = np.isnan(values)
    logs = np.where(absent, np.nan, signed_log(values)).astype(np.float64)
    empty = absent.all(axis=0)
    logs[:, empty] = 0.0
    low, high, owner = _bins(values, bins)
    return Encoding(
        code_columns=codes,
        vocabulary=(known.max(axis=0, initial=-1.0) + 2).astype(np.int64),
        number_columns=numbers,
        mean=np.nanmean(logs, axis=0).astype(np.float32),
        scale=(1.0 / (np.nanstd(logs, axis=0) + 1e-3)).astype(np.float32),
        missing=np.flatnonzero(absent.any(axis=0) & ~empty),
        bin_column=owner,
        bin_low=low,
        bin_scale=(1.0 / (high - low)).astype(np.float32),
    )


def _bins(values: Floats, bins: int) -> tuple[Floats, Floats, Places]:
    lows: list[float] = []
    highs: list[float] = []
    owners: list[int] = []
    for place in range(values.shape[1] if bins else 0):
        present = values[:, place][~np.isnan(values[:, place])]
        edges = np.unique(np.quantile(present, np.linspace(0, 1, bins + 1))) if len(present) else np.empty(0)
        for low, high in pairwise(edges):
            lows.append(float(low))
            highs.append(float(high))
            owners.append(place)
    return np.array(lows, np.float32), np.array(highs, np.float32), np.array(owners, np.int64)


def signed_log(values: Floats) -> Floats:
    """log(1 + |x|) with the sign of x."""
    logs: Floats = np.sign(values) * np.log1p(np.abs(values))
    return logs


def encode(encoding: Encoding, features: Floats) -> tuple[Floats, Places]:
    """Numbers of shape (rows, width), and embedding places of shape (rows, codes)."""
    numbers = np.empty((len(features), encoding.width), np.float32)
    places = np.empty((len(features), len(encoding.code_columns)), np.int64)
    for start in range(0, len(features), CHUNK):
        rows = np.asarray(features[start : start + CHUNK], dtype=np.float32)
        numbers[start : start + CHUNK] = _numbers(encoding, rows[:, encoding.number_columns])
        places[start : start + CHUNK] = _places(encoding, rows[:, encoding.code_columns])
    return numbers, places


def _numbers(encoding: Encoding, values: Floats) -> Floats:
    absent = np.isnan(values)
    standard = np.clip((signed_log(values) - encoding.mean) * encoding.scale, -CUT, CUT)
    standard[absent] = 0.0
    owner = encoding.bin_column
    reach = np.clip((values[:, owner] - encoding.bin_low) * encoding.bin_scale, 0.0, 1.0) - 0.5
    reach[absent[:, owner]] = 0.0
    return np.concatenate([standard, absent[:, encoding.missing].astype(np.float32), reach], axis=1)


def _places(encoding: Encoding, codes: Floats) -> Places:
    shifted = np.nan_to_num(codes, nan=-1.0) + 1
    shifted[(shifted < 0) | (shifted > encoding.vocabulary - 1)] = 0
    return shifted.astype(np.int64)
