"""Values of any number to columns of a fixed number, by hashes that never change (MurmurHash3, 32 bits, seed 0)."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import mmh3
import numpy as np
from pydantic import Field

from millrace_feature.transformers.columns import NAN, Column, Floats, Rows, as_texts
from millrace_feature.transformers.steps import Parameters, State, Step

MAX_BUCKETS = 4096
MAX_TEXT_CHARS = 100_000
"""Longer texts are cut, so that one row cannot hold up a read."""
_WORD = re.compile(r"\b\w\w+\b")


def bucket_of(token: str, buckets: int, *, signed: bool) -> tuple[int, float]:
    """(column, +1 or -1) of a token: the hash's value and its sign."""
    found = mmh3.hash(token.encode(), 0, signed=True)
    return abs(found) % buckets, -1.0 if signed and found < 0 else 1.0


class HashParameters(Parameters):
    """Of kind `hash`."""

    buckets: int = Field(default=64, ge=2, le=MAX_BUCKETS)
    """How many outputs."""
    signed: bool = True
    """Half the values count -1, so that values that share an output cancel out in the mean."""


class Hash(Step):
    """Feature hashing of any number of columns into one row of outputs: a text adds 1 (or -1) at the hash of `name=text`, a number adds
    itself at the hash of its name. A missing value adds nothing.
    """

    kind = "hash"
    Given: ClassVar[type[Parameters]] = HashParameters

    def apply(self, columns: Sequence[Column], folds: Sequence[int] | None = None) -> list[Floats]:
        """The sums."""
        del folds
        given = self.given
        rows = len(columns[0])
        out = np.zeros((given.buckets, rows))
        for name, column in zip(self.names, columns, strict=True):
            own, own_sign = bucket_of(name, given.buckets, signed=given.signed)
            for row, value in enumerate(column.tolist() if isinstance(column, np.ndarray) else column):
                if isinstance(value, str):
                    place, sign = bucket_of(f"{name}={value}", given.buckets, signed=given.signed)
                    out[place, row] += sign
                elif isinstance(value, int | float):
                    out[own, row] += 0.0 if math.isnan(value) else own_sign * value
                elif value is not None:
                    raise TypeError(f"needs texts, numbers or booleans, not {type(value).__name__}")
        return list(out)

    def _named(self) -> tuple[str, ...]:
        if len(self.names) > 1 and not self.base:
            raise ValueError("kind 'hash' with several inputs needs an output name")
        return tuple(f"{self.root(0)}_{i}" for i in range(self.given.buckets))


class TextParameters(Parameters):
    """Of kind `tfidf`."""

    buckets: int = Field(default=256, ge=2, le=MAX_BUCKETS)
    """How many outputs."""
    ngrams: tuple[int, int] = Field(default=(1, 1), strict=False)
    """Fewest and most words (or characters) a term is made of."""
    analyzer: Literal["word", "char"] = "word"
    """Terms are made of words (two or more letters, digits or underscores) or of characters, runs of white space as one blank."""
    lowercase: bool = True
    """Fold case first."""
    signed: bool = True
    """As for `hash`."""
    idf: bool = True
    """Weigh terms by how rare they were in the rows it was fitted on: ln((1 + rows) / (1 + rows with it)) + 1."""
    sublinear: bool = False
    """Take 1 + ln(count) for a count."""
    norm: Literal["l2", "none"] = "l2"
    """Bring a row to length 1."""


class Text(Step):
    """Hashed term counts of a text, weighted and brought to length 1. A missing text has no terms: all 0."""

    kind = "tfidf"
    Given: ClassVar[type[Parameters]] = TextParameters

    @classmethod
    def fit(cls, parameters: Any, rows: Rows) -> State:
        """How many rows hold each bucket's terms."""
        low, high = parameters.ngrams
        if not 1 <= low <= high <= 8:
            raise ValueError("ngrams must be two numbers from 1 to 8, the first not above the second")
        if not parameters.idf:
            return {}
        found = np.zeros((len(rows.inputs), parameters.buckets), np.int64)
        total = 0
        for batch in rows.batches():
            total += len(batch.label)
            for i, column in enumerate(batch.columns):
                for text in as_texts(column):
                    found[i, list(_counts(text, parameters))] += 1
        return {"rows": total, "inputs": found.tolist()}

    def __init__(self, names: Sequence[str], base: str, parameters: Any, state: State) -> None:
        super().__init__(names, base, parameters, state)
        self._weights = [
            [math.log((1 + state["rows"]) / (1 + n)) + 1 for n in seen]
            if parameters.idf
            else [1.0] * parameters.buckets
            for seen in (state["inputs"] if parameters.idf else [[]] * len(self.names))
        ]

    def apply(self, columns: Sequence[Column], folds: Sequence[int] | None = None) -> list[Floats]:
        """One column a bucket, input by input."""
        del folds
        outputs: list[Floats] = []
        for weights, column in zip(self._weights, columns, strict=True):
            texts = as_texts(column)
            out = np.zeros((self.given.buckets, len(texts)))
            for row, text in enumerate(texts):
                for place, value in self._row(text, weights):
                    out[place, row] = value
            outputs.extend(out)
        return outputs

    def _row(self, text: str | None, weights: Sequence[float]) -> Iterable[tuple[int, float]]:
        given = self.given
        terms = []
        for place, count in sorted(_counts(text, given).items()):
            value = count
            if given.sublinear:
                value = 1 + math.log(count) if count > 0 else NAN
            terms.append((place, value * weights[place]))
        if given.norm == "none":
            return terms
        length = math.sqrt(math.fsum(value * value for _place, value in terms)) or 1.0
        return [(place, value / length) for place, value in terms]

    def _named(self) -> tuple[str, ...]:
        if self.given.sublinear and self.given.signed:
            raise ValueError("sublinear counts need signed: false")
        return tuple(f"{self.root(i)}_{b}" for i in range(len(self.names)) for b in range(self.given.buckets))


def _counts(text: str | None, given: TextParameters) -> dict[int, float]:
    """Sum of the terms' signs per bucket; buckets in which they cancel out are left out."""
    counts: dict[int, float] = {}
    for term in terms_of(text or "", given):
        place, sign = bucket_of(term, given.buckets, signed=given.signed)
        counts[place] = counts.get(place, 0.0) + sign
    return {place: count for place, count in counts.items() if count}


def terms_of(text: str, given: TextParameters) -> Iterable[str]:
    """The n-grams of a text."""
    text = text[:MAX_TEXT_CHARS].lower() if given.lowercase else text[:MAX_TEXT_CHARS]
    low, high = given.ngrams
    if given.analyzer == "word":
        words = _WORD.findall(text)
        for n in range(low, high + 1):
            yield from (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    else:
        whole = re.sub(r"\s\s+", " ", text)
        for n in range(low, high + 1):
            yield from (whole[i : i + n] for i in range(len(whole) - n + 1))
