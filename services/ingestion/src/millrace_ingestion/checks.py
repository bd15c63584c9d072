"""The checks of a contract, on whole columns.

A record that fails becomes one dead letter with the first failure in the contract's column order: WRONG_TYPE and MISSING_COLUMN come from
the conversion, then NULL_NOT_ALLOWED, the checks of values (`value_checks.py`), comparisons, and last what is asked of the batch as a
whole (`expectations.py`). A null in a nullable column passes every check. A check whose policy is not REJECT refuses nobody: it holds
the whole batch for the quarantine, or is counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace_ingestion.contracts import ARROW_TYPES, Column, Contract
from millrace_ingestion.expectations import unmet
from millrace_ingestion.hashing import U64, hash_strings
from millrace_ingestion.origins import TASK_PUT, Origin
from millrace_ingestion.rules import Policy
from millrace_ingestion.value_checks import (
    NOT_ALLOWED_VALUE,
    NOT_FRESH,
    NOT_UNIQUE,
    OUT_OF_RANGE,
    PATTERN_MISMATCH,
    WRONG_LENGTH,
    compare,
    value_checks,
)

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

MALFORMED_JSON = "MALFORMED_JSON"
MISSING_COLUMN = "MISSING_COLUMN"
WRONG_TYPE = "WRONG_TYPE"
NULL_NOT_ALLOWED = "NULL_NOT_ALLOWED"
MISSING_EVENT_ID = "MISSING_EVENT_ID"
COMPARISON_FAILED = "COMPARISON_FAILED"
EXPECTATION_FAILED = "EXPECTATION_FAILED"
UNDECODABLE = "UNDECODABLE"
"""A message whose bytes are no record at all; a source refuses it before there is anything to check."""
REASONS = (
    MALFORMED_JSON, MISSING_COLUMN, WRONG_TYPE, NULL_NOT_ALLOWED, OUT_OF_RANGE, NOT_ALLOWED_VALUE, PATTERN_MISMATCH,
    MISSING_EVENT_ID, UNDECODABLE, WRONG_LENGTH, NOT_UNIQUE, NOT_FRESH, COMPARISON_FAILED, EXPECTATION_FAILED,
)  # fmt: skip

# Longer ids are refused, so that hashing a batch takes a bounded number of steps.
MAX_EVENT_ID_BYTES = 512


@dataclass(frozen=True)
class Failure:
    """Why a record was refused."""

    reason: str
    column: str
    detail: str


@dataclass(frozen=True)
class Reject:
    """A refused record: its place in the batch, why, and the record itself as JSON."""

    row: int
    failure: Failure
    record_json: str
    """Empty when there is no JSON of it; then the origin has its bytes."""
    origin: Origin | None = None
    stage: str = TASK_PUT
    exception: str = ""
    """Name of the error's class, where an exception refused the record."""

    @property
    def size(self) -> int:
        """Bytes this record occupies, about."""
        if self.origin is None:
            return len(self.record_json)
        headers = sum(len(name) + len(value or b"") for name, value in self.origin.headers)
        return len(self.record_json) + len(self.origin.value or b"") + len(self.origin.key or b"") + headers


@dataclass(frozen=True)
class Finding:
    """How many records of a batch failed a check."""

    column: str
    """Column, comparison or expectation."""
    check: str
    """Its name among the policies, or the reason in lower case."""
    policy: Policy
    count: int


@dataclass(frozen=True)
class Arrival:
    """When records came, and whether the batch is one as a producer sent it."""

    now_us: int | Rows | None = None
    """Microseconds since the epoch, of the batch or of each record; None checks no freshness."""
    as_sent: bool = True
    """False for records that are replayed or released: what is asked of a batch as a whole is not asked of them."""
    quarantine: Policy = Policy.QUARANTINE
    """What the policy QUARANTINE means for them."""

    def policy(self, policy: Policy) -> Policy:
        """What a check's policy means for these records."""
        return self.quarantine if policy is Policy.QUARANTINE else policy


NO_TIME = Arrival()


@dataclass(frozen=True)
class Checked:
    """A batch after its checks."""

    table: pa.Table
    """Good records with the contract's columns and types."""
    rows: Rows
    """Place of each good record in the batch as it was sent."""
    rejects: Sequence[Reject]
    high: U64
    """First halves of the good records' event id hashes."""
    low: U64
    """Second halves."""
    findings: Sequence[Finding] = ()
    """Every check that failed, whatever its policy."""
    held: Failure | None = None
    """Why the batch goes to the quarantine; None when it lands."""

    @property
    def size(self) -> int:
        """Bytes this batch occupies in memory."""
        return int(self.table.nbytes) + sum(reject.size for reject in self.rejects)


@dataclass
class Verdict:
    """Which rows of a batch failed, and why; the first failure of a row stays."""

    rows: int
    failures: list[Failure] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    held: Failure | None = None
    _marks: npt.NDArray[np.int32] | None = None

    def mark(self, rows: Mask, failure: Failure) -> None:
        """Note `failure` for rows that have none yet."""
        if not rows.any():
            return
        if self._marks is None:
            self._marks = np.full(self.rows, -1, np.int32)
        self._marks[rows & (self._marks < 0)] = len(self.failures)
        self.failures.append(failure)
        self._find(failure, failure.reason.lower(), Policy.REJECT, int(rows.sum()))

    def judge(self, rows: Mask, failure: Failure, check: str, policy: Policy) -> None:
        """Do with `rows` what the policy of `check` says."""
        if policy is Policy.REJECT:
            self.mark(rows, failure)
        elif rows.any():
            if policy is Policy.QUARANTINE and self.held is None:
                self.held = failure
            self._find(failure, check, policy, int(rows.sum()))

    def _find(self, failure: Failure, check: str, policy: Policy, count: int) -> None:
        self.findings.append(Finding(failure.column, check, policy, count))

    def good(self) -> Mask | None:
        """Rows without a failure; None when that is all of them."""
        return None if self._marks is None else self._marks < 0

    def failed(self) -> list[tuple[int, Failure]]:
        """Each failed row with its failure."""
        if self._marks is None:
            return []
        return [(int(row), self.failures[self._marks[row]]) for row in np.flatnonzero(self._marks >= 0)]


def check_values(
    contract: Contract,
    columns: Mapping[str, pa.Array],
    verdict: Verdict,
    failed: Mapping[str, Mask],
    arrival: Arrival,
) -> None:
    """Check converted columns.

    Args:
        contract: the checks.
        columns: each column of the contract in its Arrow type; a value that could not be converted is null.
        verdict: takes the failures.
        failed: rows whose failure in a column is already known; they are not checked for null again.
        arrival: when the records came.
    """
    for column in contract.columns:
        values = columns[column.name]
        if column.name == contract.event_id_column:
            _check_event_id(column, values, verdict, failed.get(column.name))
        elif not column.nullable and values.null_count:
            missing = _mask(pc.is_null(values))
            if column.name in failed:
                missing &= ~failed[column.name]
            verdict.mark(missing, Failure(NULL_NOT_ALLOWED, column.name, "is null and the column is not nullable"))
        for check, passes, reason, detail in value_checks(column, values, arrival.now_us, batch=arrival.as_sent):
            if not pc.all(passes, min_count=0).as_py():  # nulls are skipped
                wrong = ~_mask(pc.fill_null(passes, True))
                policy = arrival.policy(column.policy(check))
                verdict.judge(wrong, Failure(reason, column.name, detail), check, policy)
    for rule in contract.comparisons:
        passes = compare(rule, columns)
        if not pc.all(passes, min_count=0).as_py():
            failure = Failure(COMPARISON_FAILED, rule.name, f"must have {rule}")
            verdict.judge(~_mask(pc.fill_null(passes, True)), failure, "comparison", arrival.policy(rule.policy))
    if arrival.as_sent and contract.judges_batches:
        _judge_batch(contract, columns, verdict)


def _judge_batch(contract: Contract, columns: Mapping[str, pa.Array], verdict: Verdict) -> None:
    """Expectations, over the records that passed their own checks; a batch without any is judged by its row count only."""
    everyone = np.ones(verdict.rows, np.bool_)
    for column, check, policy, detail in unmet(contract, columns, verdict.good(), verdict.rows):
        verdict.judge(everyone, Failure(EXPECTATION_FAILED, column, detail), check, policy)


def _check_event_id(column: Column, values: pa.Array, verdict: Verdict, failed: Mask | None) -> None:
    length = pc.fill_null(pc.binary_length(values), 0)
    empty = _mask(pc.equal(length, 0))
    if failed is not None:
        empty &= ~failed
    verdict.mark(empty, Failure(MISSING_EVENT_ID, column.name, "the event id is missing, null or empty"))
    detail = f"the event id is longer than {MAX_EVENT_ID_BYTES} bytes"
    verdict.mark(_mask(pc.greater(length, MAX_EVENT_ID_BYTES)), Failure(OUT_OF_RANGE, column.name, detail))


def settle(contract: Contract, columns: Mapping[str, pa.Array], verdict: Verdict) -> tuple[pa.Table, Rows, U64, U64]:
    """The good rows of checked columns, where they were, and their event ids' hashes."""
    table = pa.table([columns[column.name] for column in contract.columns], schema=contract.arrow_schema())
    good = verdict.good()
    rows = np.arange(verdict.rows)
    if good is not None:
        table = table.filter(pa.array(good))
        rows = rows[good]
    ids = table.column(contract.event_id_column).combine_chunks()
    high, low = hash_strings(ids if isinstance(ids, pa.Array) else pa.concat_arrays(ids.chunks))
    return table, rows, high, low


def empty_column(column: Column, rows: int) -> pa.Array:
    """A column of nulls."""
    return pa.nulls(rows, ARROW_TYPES[column.type])


def _mask(values: pa.Array) -> Mask:
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.bool_)
