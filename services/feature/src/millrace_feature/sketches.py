"""Sketches as integer cells: approximate distinct counts and percentiles whose answers are the same bits whatever was merged in which order.

A sketch is a set of (cell, weight). HyperLogLog: the cell is a register, the weight its rank, merged by maximum. Percentiles: the cell is a
bucket of values of fixed relative width (DDSketch), the weight a count, merged by addition. Both are integers, so merging is exact and
does not depend on order, and the estimates use only operations that IEEE 754 rounds in one way (no logarithm). docs/decisions/0025 says
why these two and what they cost.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

REGISTER_BITS = 12
REGISTERS = 1 << REGISTER_BITS
"""Registers of a distinct count: a standard error of 1.04 / sqrt(4096) = 1.6 %."""
RANK_BITS = 64 - REGISTER_BITS
ALPHA = 0.7213475204444817
"""1 / (2 ln 2)."""

OCTAVE_BITS = 6
BUCKET_SHIFT = 52 - OCTAVE_BITS
"""A bucket is a value's sign, exponent and 6 bits of its mantissa: 64 buckets an octave, so half a bucket is at most 1/128 of the value."""
CELL_BITS = 18
CELL_BIAS = 1 << (CELL_BITS - 1)
"""Buckets of negative values are negative; cells are kept without sign."""

_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_STEP, _FRACTION = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)


def mixed(words: Words) -> Words:
    """SplitMix64's finalizer: each input bit changes every output bit with probability about one half."""
    with np.errstate(over="ignore"):
        words = words + _STEP
        words = (words ^ (words >> np.uint64(30))) * _MIX_1
        words = (words ^ (words >> np.uint64(27))) * _MIX_2
        return words ^ (words >> np.uint64(31))


def hashes(column: pa.ChunkedArray) -> tuple[Words, Bools]:
    """(hash, whether there is a value) per row. A number's hash does not depend on its type: 5 and 5.0 are one value."""
    kind = column.type
    valid: Bools = np.asarray(column.is_valid().to_numpy(), dtype=np.bool_)
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        filled = pc.fill_null(column.cast(pa.int64(), safe=False), 0)
        return mixed(np.asarray(filled.to_numpy(), np.int64).view(np.uint64)), valid
    if pa.types.is_floating(kind):
        values = np.asarray(pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy(), np.float64)
        whole = (np.trunc(values) == values) & (np.abs(values) < 2.0**63)
        numbers = np.where(whole, values, 0.0).astype(np.int64).view(np.uint64)
        fractions = values.view(np.uint64) ^ _FRACTION
        return mixed(np.where(whole, numbers, fractions)), valid & ~np.isnan(values)
    if pa.types.is_temporal(kind) and not pa.types.is_duration(kind) and not pa.types.is_time(kind):
        us = pc.fill_null(column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()), 0)
        return mixed(np.asarray(us.to_numpy(), np.int64).view(np.uint64)), valid
    texts = column if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else column.cast(pa.large_string())
    encoded = texts.combine_chunks().dictionary_encode()
    words = encoded.dictionary.to_pylist()
    found = np.array([_text_hash(word) for word in [*words, ""]], np.uint64)
    places = np.asarray(pc.fill_null(encoded.indices, len(words)).to_numpy(zero_copy_only=False), np.int64)
    return found[places], valid


def _text_hash(word: str | bytes) -> int:
    content = word if isinstance(word, bytes) else word.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def distinct_cells(words: Words) -> tuple[Ints, Ints]:
    """(register, rank) of hashes."""
    registers = (words >> np.uint64(RANK_BITS)).astype(np.int64)
    rest = (words & np.uint64((1 << RANK_BITS) - 1)).astype(np.float64)  # below 2^52, so exact
    _mantissa, bits = np.frexp(rest)
    return registers, RANK_BITS - bits.astype(np.int64) + 1


def distinct_counts(points: Ints, ranks: Ints, size: int) -> Floats:
    """Estimated distinct values per point, as whole numbers (Ertl 2017, "New cardinality estimation algorithms for HyperLogLog").

    Args:
        points: point of each register that is not empty.
        ranks: its rank.
        size: how many points there are.
    """
    width = RANK_BITS + 2
    tally = np.bincount(points * width + ranks, minlength=size * width).reshape(size, width).T.astype(np.float64)
    tally[0] = REGISTERS - tally[1:].sum(axis=0)
    estimate = REGISTERS * _tau(1.0 - tally[width - 1] / REGISTERS)
    for rank in range(RANK_BITS, 0, -1):
        estimate = 0.5 * (estimate + tally[rank])
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = estimate + REGISTERS * _sigma(tally[0] / REGISTERS)
        found: Floats = np.rint(ALPHA * REGISTERS * REGISTERS / estimate)
    return np.where(tally[0] == REGISTERS, 0.0, found)


def _sigma(x: Floats) -> Floats:
    total, scale = x.copy(), 1.0
    x = np.where(x == 1.0, 0.0, x)  # no register is used: the caller knows the answer
    while True:
        x = x * x
        before, total, scale = total, total + x * scale, scale + scale
        if np.array_equal(before, total):
            return total


def _tau(x: Floats) -> Floats:
    trivial = (x == 0.0) | (x == 1.0)
    x = np.where(trivial, 1.0, x)
    total, scale = 1.0 - x, 1.0
    while True:
        x, scale = np.sqrt(x), scale * 0.5
        before, total = total, total - (1.0 - x) ** 2 * scale
        if np.array_equal(before, total):
            return np.where(trivial, 0.0, total / 3.0)


def bucket_cells(values: Floats) -> Ints:
    """The cell of each value (none may be NaN), rising with the value."""
    bits = np.abs(values).view(np.int64) >> BUCKET_SHIFT
    return np.where(values < 0, -bits, bits) + CELL_BIAS


def bucket_values(cells: Ints) -> Floats:
    """A value in the middle of each cell."""
    signed = cells - CELL_BIAS
    size = np.abs(signed)
    middle = ((size << BUCKET_SHIFT) | (1 << (BUCKET_SHIFT - 1))).view(np.float64)
    middle = np.where(size == 0, 0.0, np.where(np.isnan(middle), np.inf, middle))
    return np.where(signed < 0, -middle, middle)
