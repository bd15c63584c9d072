"""What a contract asks of a batch as a whole: statistics over the records that passed their own checks, and their bounds."""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace_ingestion.contracts import Contract
from millrace_ingestion.rules import NULL_RATE, Expectation, Policy, Statistic

Unmet = tuple[str, str, Policy, str]
"""Column or expectation, check, policy, and what was found, for people."""


def unmet(
    contract: Contract, columns: Mapping[str, pa.Array], good: npt.NDArray[np.bool_] | None, rows: int
) -> Iterator[Unmet]:
    """The expectations that a batch does not meet.

    Args:
        contract: expectations and null rates.
        columns: converted columns of all records.
        good: records that passed their own checks; None is all.
        rows: records of the batch.
    """
    mask = None if good is None else pa.array(good)
    kept = rows if good is None else int(good.sum())
    for column in contract.columns:
        if column.max_null_rate is None or kept == 0:
            continue
        rate = _kept(columns[column.name], mask).null_count / kept
        if rate > column.max_null_rate:
            detail = f"{rate:.4g} of the batch's values are null, at most {column.max_null_rate:g} may be"
            yield column.name, NULL_RATE, column.policy(NULL_RATE), detail
    for rule in contract.expectations:
        if rule.statistic is Statistic.ROW_COUNT:
            found: float | None = rows if rows >= rule.min_rows else None
        else:
            found = statistic(rule, _kept(columns[rule.column], mask)) if kept >= rule.min_rows else None
        problem = None if found is None else _problem(rule, found)
        if problem:
            yield rule.name, "expectation", rule.policy, f"{rule} of the batch {problem}"


def _kept(values: pa.Array, mask: pa.Array | None) -> pa.Array:
    return values if mask is None else values.filter(mask)


def statistic(rule: Expectation, values: pa.Array) -> float | None:
    """The statistic over `values`; None when no value is there to compute it from."""
    match rule.statistic:
        case Statistic.NULL_RATE:
            return values.null_count / len(values) if len(values) else None
        case Statistic.DISTINCT:
            found = pc.count_distinct(values, mode="only_valid")
        case Statistic.MIN:
            found = pc.min(values)
        case Statistic.MAX:
            found = pc.max(values)
        case Statistic.MEAN:
            found = pc.mean(values)
        case Statistic.SUM:
            # As float64: a sum of integers that overflows must not come out small.
            found = pc.sum(values.cast(pa.float64(), safe=False))
        case Statistic.STDDEV:
            found = pc.stddev(values)
        case _:
            found = pc.quantile(values, q=rule.quantile)[0]
    number: float | None = found.as_py()
    return number


def _problem(rule: Expectation, found: float) -> str:
    """Written so that NaN meets no bound."""
    if rule.minimum is not None and not found >= rule.minimum:
        return f"is {found:.6g}, must be at least {rule.minimum:g}"
    if rule.maximum is not None and not found <= rule.maximum:
        return f"is {found:.6g}, must be at most {rule.maximum:g}"
    return ""
