"""What was found, as messages."""

import math
from collections.abc import Mapping

from millrace_api.common.v1 import common_pb2
from millrace_api.feature.v1 import feature_pb2
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError

from millrace_feature.consistency.comparison import Kind
from millrace_feature.consistency.log import ConsistencyLog, Finding, Rates
from millrace_feature.convert import optional_us, to_timestamp, to_value

MAX_FINDINGS = 1000
KINDS: Mapping[Kind, feature_pb2.ConsistencyKind.ValueType] = {
    "mismatch": feature_pb2.CONSISTENCY_KIND_MISMATCH,
    "missing": feature_pb2.CONSISTENCY_KIND_MISSING,
    "extra": feature_pb2.CONSISTENCY_KIND_EXTRA,
}


def to_response(kept: ConsistencyLog, request: feature_pb2.GetConsistencyRequest) -> feature_pb2.GetConsistencyResponse:
    """The answer to `request`.

    Raises:
        InvalidArgumentError: a name, the range or the number of findings is out of bounds.
        UnavailableError: the database does not answer.
    """
    name = check.text(request.feature_service, "feature_service", limit=256) if request.feature_service else ""
    if not 0 <= request.max_findings <= MAX_FINDINGS:
        raise InvalidArgumentError("max_findings", f"needs 0 to {MAX_FINDINGS}, not {request.max_findings}")
    start_us = optional_us(request.time_range, "start", "time_range.start")
    end_us = optional_us(request.time_range, "end", "time_range.end")
    findings = kept.findings(name, start_us, end_us, request.max_findings) if request.max_findings else []
    return feature_pb2.GetConsistencyResponse(
        windows=[_window(one) for one in kept.rates(name, start_us, end_us)],
        findings=[_finding(one) for one in findings],
        waiting=kept.waiting()[0],
    )


def _window(one: Rates) -> feature_pb2.ConsistencyWindow:
    tally = one.tally
    return feature_pb2.ConsistencyWindow(
        feature_service=one.feature_service,
        definitions_hash=one.digest,
        feature=one.feature,
        window=common_pb2.TimeRange(start=to_timestamp(one.window_us), end=to_timestamp(one.window_us + one.width_us)),
        compared=tally.compared,
        mismatched=tally.mismatched,
        missing=tally.missing,
        extra=tally.extra,
        smape=tally.smape,
    )


def _finding(one: Finding) -> feature_pb2.ConsistencyFinding:
    return feature_pb2.ConsistencyFinding(
        feature_service=one.feature_service,
        definitions_hash=one.digest,
        feature=one.feature,
        kind=KINDS[one.kind],
        entity={name: to_value(value) for name, value in one.entity.items()},
        asked_for=to_timestamp(one.asked_us),
        served_at=to_timestamp(one.served_us),
        expected=math.nan if one.expected is None else one.expected,
        served=math.nan if one.served is None else one.served,
        table_versions=[
            common_pb2.TableVersion(table=table, version=version) for table, version in sorted(one.versions.items())
        ],
    )
