"""Contracts between their protobuf messages and the domain."""

from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_kit.errors import InvalidArgumentError

from millrace_ingestion.compatibility import Change
from millrace_ingestion.contracts import Column, ColumnType, Compatibility, Contract
from millrace_ingestion.rules import CHOOSABLE, Comparison, Expectation, Operator, Policy, Statistic
from millrace_ingestion.validation import validate

_TYPE, _POLICY, _STATISTIC, _MODE = "COLUMN_TYPE_", "CHECK_POLICY_", "STATISTIC_", "COMPATIBILITY_"
_OPTIONAL = ("min_length", "max_length", "max_null_rate", "max_age_s", "max_ahead_s")


def contract_from(message: pb.DataContract, field: str) -> Contract:
    """A validated contract; its version is 0, because the service numbers versions.

    Raises:
        InvalidArgumentError: naming the field.
    """
    if message.version < 0:
        raise InvalidArgumentError(f"{field}.version", "must not be negative; it is assigned on registration")
    return validate(_contract(message, 0, field), field)


def contract_bytes(contract: Contract) -> bytes:
    """The contract as it is stored."""
    return contract_to(contract).SerializeToString(deterministic=True)


def contract_from_bytes(version: int, body: bytes) -> Contract:
    """A stored contract; it was validated when it was registered."""
    return _contract(pb.DataContract.FromString(body), version, "contract")


def _contract(message: pb.DataContract, version: int, field: str) -> Contract:
    if message.compatibility not in pb.Compatibility.values():
        raise InvalidArgumentError(f"{field}.compatibility", f"{message.compatibility} is no mode")
    return Contract(
        message.name,
        version,
        tuple(_column(column, f"{field}.columns[{index}]") for index, column in enumerate(message.columns)),
        message.event_id_column,
        message.event_time_column,
        tuple(message.key_columns),
        Compatibility(pb.Compatibility.Name(message.compatibility).removeprefix(_MODE)),
        tuple(_comparison(rule, f"{field}.comparisons[{index}]") for index, rule in enumerate(message.comparisons)),
        tuple(_expectation(rule, f"{field}.expectations[{index}]") for index, rule in enumerate(message.expectations)),
    )


def _column(message: pb.Column, field: str) -> Column:
    name = pb.ColumnType.Name(message.type) if message.type in pb.ColumnType.values() else str(message.type)
    if name.removeprefix(_TYPE) not in {kind.value for kind in ColumnType}:
        raise InvalidArgumentError(f"{field}.type", f"{name} is no column type")
    for check in message.policies:
        if check not in CHOOSABLE:
            raise InvalidArgumentError(f"{field}.policies", f"{check!r} is none of {', '.join(CHOOSABLE)}")
    policies = {check: _policy(value, f"{field}.policies") for check, value in message.policies.items()}
    return Column(
        message.name,
        ColumnType(name.removeprefix(_TYPE)),
        message.nullable,
        message.min if message.HasField("min") else None,
        message.max if message.HasField("max") else None,
        tuple(message.allowed),
        message.pattern,
        message.min_length if message.HasField("min_length") else None,
        message.max_length if message.HasField("max_length") else None,
        tuple(message.allowed_numbers),
        message.max_null_rate if message.HasField("max_null_rate") else None,
        message.unique,
        message.max_age_s if message.HasField("max_age_s") else None,
        message.max_ahead_s if message.HasField("max_ahead_s") else None,
        tuple(sorted((check, policy) for check, policy in policies.items() if policy is not Policy.REJECT)),
    )


def _policy(value: int, field: str) -> Policy:
    names = {int(number): name for name, number in pb.CheckPolicy.items()}
    if value not in names:
        raise InvalidArgumentError(field, f"{value} is no policy")
    return Policy(names[value].removeprefix(_POLICY)) if value else Policy.REJECT


def _comparison(message: pb.Comparison, field: str) -> Comparison:
    if message.operator not in {operator.value for operator in Operator}:
        raise InvalidArgumentError(f"{field}.operator", f"is none of {', '.join(o.value for o in Operator)}")
    right: str | float
    match message.WhichOneof("right"):
        case "column":
            right = message.column
        case "number":
            right = message.number
        case _:
            raise InvalidArgumentError(f"{field}.right", "needs a column or a number")
    policy = _policy(message.policy, f"{field}.policy")
    return Comparison(message.name, message.left, Operator(message.operator), right, policy)


def _expectation(message: pb.Expectation, field: str) -> Expectation:
    if not message.statistic or message.statistic not in pb.Statistic.values():
        raise InvalidArgumentError(f"{field}.statistic", f"{message.statistic} is no statistic")
    return Expectation(
        message.name,
        Statistic(pb.Statistic.Name(message.statistic).removeprefix(_STATISTIC)),
        message.column,
        message.quantile if message.HasField("quantile") else None,
        message.min if message.HasField("min") else None,
        message.max if message.HasField("max") else None,
        message.min_rows or 1,
        _policy(message.policy, f"{field}.policy"),
    )


def contract_to(contract: Contract) -> pb.DataContract:
    """The contract as a message."""
    return pb.DataContract(
        name=contract.name,
        version=contract.version,
        columns=[_column_to(column) for column in contract.columns],
        event_id_column=contract.event_id_column,
        event_time_column=contract.event_time_column,
        key_columns=contract.key_columns,
        compatibility=pb.Compatibility.Value(_MODE + contract.compatibility.value),
        comparisons=[_comparison_to(rule) for rule in contract.comparisons],
        expectations=[_expectation_to(rule) for rule in contract.expectations],
    )


def _column_to(column: Column) -> pb.Column:
    message = pb.Column(
        name=column.name,
        type=pb.ColumnType.Value(_TYPE + column.type.value),
        nullable=column.nullable,
        allowed=column.allowed,
        pattern=column.pattern,
        allowed_numbers=column.allowed_numbers,
        unique=column.unique,
        min=column.minimum,
        max=column.maximum,
        **{name: getattr(column, name) for name in _OPTIONAL},
    )
    for check, policy in column.policies:
        message.policies[check] = _policy_to(policy)
    return message


def _policy_to(policy: Policy) -> pb.CheckPolicy.ValueType:
    """REJECT is the default, and a message that leaves it out is equal to one that says it."""
    return pb.CheckPolicy.Value(_POLICY + policy.value)


def _comparison_to(rule: Comparison) -> pb.Comparison:
    message = pb.Comparison(
        name=rule.name, left=rule.left, operator=rule.operator.value, policy=_policy_to(rule.policy)
    )
    if isinstance(rule.right, str):
        message.column = rule.right
    else:
        message.number = rule.right
    return message


def _expectation_to(rule: Expectation) -> pb.Expectation:
    return pb.Expectation(
        name=rule.name,
        statistic=pb.Statistic.Value(_STATISTIC + rule.statistic.value),
        column=rule.column,
        quantile=rule.quantile,
        min=rule.minimum,
        max=rule.maximum,
        min_rows=rule.min_rows,
        policy=_policy_to(rule.policy),
    )


def change_to(change: Change) -> pb.ContractChange:
    """A difference as a message."""
    return pb.ContractChange(
        subject=change.subject,
        change=change.text,
        backward=change.backward,
        forward=change.forward,
        possible=change.possible,
    )
