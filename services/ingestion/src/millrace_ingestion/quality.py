"""Figures about the values of a column, in constant space, that can be added up: over commits, over buckets, over processes.

Distinct values are estimated by HyperLogLog (Flajolet et al., 2007; 2^10 registers, standard error 3.3 %) over the records of a sample: at
most `SAMPLE_ROWS` evenly spaced records of a commit. For a column with few values that is all of them; for one with many it says how many
the sample had, and `sampled` says of how many records.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace_ingestion.checks import Finding
from millrace_ingestion.hashing import U64, hash_strings

SAMPLE_ROWS = 1_000
_BITS = 10
_REGISTERS = 1 << _BITS
_ALPHA = 0.7213 / (1 + 1.079 / _REGISTERS)
_MIX1, _MIX2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)
Failures = dict[tuple[str, str, str], int]
"""Records by column or rule, check, and policy."""


class ColumnFigures(msgspec.Struct):
    """What is known of a column's values."""

    values: int = 0
    """Without nulls."""
    nulls: int = 0
    finite: int = 0
    """Values that minimum, maximum and sum are of: numbers without NaN and infinities, and instants in microseconds."""
    total: float = 0.0
    minimum: float | None = None
    maximum: float | None = None
    sampled: int = 0
    """Values that were looked at for `distinct`."""
    registers: bytes = b""

    def add(self, other: "ColumnFigures") -> None:
        """Take in the figures of other records."""
        self.values += other.values
        self.nulls += other.nulls
        self.finite += other.finite
        self.total += other.total
        self.minimum = _either(min, self.minimum, other.minimum)
        self.maximum = _either(max, self.maximum, other.maximum)
        self.sampled += other.sampled
        if self.registers and other.registers:
            mine, theirs = (np.frombuffer(registers, np.uint8) for registers in (self.registers, other.registers))
            self.registers = np.maximum(mine, theirs).tobytes()
        else:
            self.registers = self.registers or other.registers

    @property
    def mean(self) -> float | None:
        """Arithmetic mean."""
        return self.total / self.finite if self.finite else None

    @property
    def distinct(self) -> float:
        """Estimate of the different values in the sample."""
        if not self.registers:
            return 0.0
        registers = np.frombuffer(self.registers, np.uint8)
        estimate = _ALPHA * _REGISTERS**2 / float(np.sum(np.exp2(-registers.astype(np.float64))))
        empty = int((registers == 0).sum())
        # Few values: the share of empty registers tells more (linear counting).
        return _REGISTERS * math.log(_REGISTERS / empty) if estimate <= 2.5 * _REGISTERS and empty else estimate


def _either(pick: object, left: float | None, right: float | None) -> float | None:
    if left is None or right is None:
        return right if left is None else left
    return pick(left, right)  # type: ignore[operator,no-any-return]


@dataclass
class Figures:
    """Quality of some commits of one contract."""

    rows: int = 0
    """Records that landed."""
    batches: int = 0
    first_version: int = 0
    """Oldest table version among them; 0 when none landed a record."""
    last_version: int = 0
    columns: dict[str, ColumnFigures] = field(default_factory=dict)
    failures: Failures = field(default_factory=dict)

    def add(self, other: "Figures") -> None:
        """Take in the figures of other commits."""
        self.rows += other.rows
        self.batches += other.batches
        versions = [version for version in (self.first_version, other.first_version) if version]
        self.first_version = min(versions, default=0)
        self.last_version = max(self.last_version, other.last_version)
        for name, figures in other.columns.items():
            self.columns.setdefault(name, ColumnFigures()).add(figures)
        for key, count in other.failures.items():
            self.failures[key] = self.failures.get(key, 0) + count


def figures_of(tables: Sequence[pa.Table], version: int, findings: Sequence[Finding], batches: int) -> Figures:
    """The figures of one commit.

    Args:
        tables: the records that landed.
        version: the table version that holds them.
        findings: checks that failed, whatever became of the records.
        batches: how many batches these are of.
    """
    rows = sum(table.num_rows for table in tables)
    found = Figures(rows, batches, version if rows else 0, version if rows else 0)
    for finding in findings:
        key = (finding.column, finding.check, finding.policy.value)
        found.failures[key] = found.failures.get(key, 0) + finding.count
    if rows:
        sample = np.unique(np.linspace(0, rows - 1, min(rows, SAMPLE_ROWS)).astype(np.int64))
        for name in tables[0].column_names:
            chunks = [chunk for table in tables for chunk in table.column(name).chunks]
            found.columns[name] = _column(pa.chunked_array(chunks), sample)
    return found


def _column(values: pa.ChunkedArray, sample: npt.NDArray[np.int64]) -> ColumnFigures:
    figures = ColumnFigures(values=len(values) - values.null_count, nulls=values.null_count)
    kind = values.type
    if pa.types.is_timestamp(kind):
        numbers = pa.chunked_array([chunk.view(pa.int64()) for chunk in values.chunks])
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        numbers = values
    else:
        numbers = None
    if numbers is not None and figures.values:
        _numbers(figures, numbers)
    if pa.types.is_list(kind):  # embeddings are hardly ever equal
        return figures
    hashes = _hashes(values.take(pa.array(sample)).drop_null())
    figures.sampled = len(hashes)
    if len(hashes):
        registers = np.zeros(_REGISTERS, np.uint8)
        rest = hashes << np.uint64(_BITS)
        # frexp's exponent is the length in bits: what is missing to 64 are leading zeros.
        ranks = (65 - np.frexp(rest.astype(np.float64))[1]).clip(1, 64 - _BITS + 1).astype(np.uint8)
        np.maximum.at(registers, (hashes >> np.uint64(64 - _BITS)).astype(np.intp), ranks)
        figures.registers = registers.tobytes()
    return figures


def _numbers(figures: ColumnFigures, numbers: pa.ChunkedArray) -> None:
    total = pc.sum(numbers.cast(pa.float64(), safe=False)).as_py()
    if not math.isfinite(total):
        numbers = numbers.filter(pc.is_finite(numbers))
        total = pc.sum(numbers).as_py() or 0.0
    figures.finite = len(numbers) - numbers.null_count
    if figures.finite:
        bounds = pc.min_max(numbers).as_py()
        figures.total = float(total)
        figures.minimum, figures.maximum = float(bounds["min"]), float(bounds["max"])


def _hashes(values: pa.ChunkedArray) -> U64:
    kind = values.type
    plain = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], kind)
    if pa.types.is_string(kind):
        return hash_strings(plain)[0]
    if pa.types.is_boolean(kind):
        plain = plain.cast(pa.int64())
    hashed: U64 = plain.view(pa.uint64()).to_numpy(zero_copy_only=False)
    # MurmurHash3's finalizer: every bit of the value reaches every bit of the hash. 0 would stay 0.
    hashed = hashed + np.uint64(0x9E3779B97F4A7C15)
    for factor in (_MIX1, _MIX2):
        hashed = (hashed ^ (hashed >> _SHIFT)) * factor
    return hashed ^ (hashed >> _SHIFT)


class _Stored(msgspec.Struct):
    rows: int
    batches: int
    first_version: int
    last_version: int
    columns: dict[str, ColumnFigures]
    failures: list[tuple[str, str, str, int]]


def encode(figures: Figures) -> bytes:
    """Figures as they are stored."""
    failures = [(*key, count) for key, count in figures.failures.items()]
    return msgspec.msgpack.encode(
        _Stored(figures.rows, figures.batches, figures.first_version, figures.last_version, figures.columns, failures)
    )


def decode(body: bytes) -> Figures:
    """Figures from their stored form."""
    stored = msgspec.msgpack.decode(body, type=_Stored)
    failures: Mapping[tuple[str, str, str], int] = {(a, b, c): count for a, b, c, count in stored.failures}
    return Figures(
        stored.rows, stored.batches, stored.first_version, stored.last_version, stored.columns, dict(failures)
    )
