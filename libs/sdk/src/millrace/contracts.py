"""Data contracts as YAML files, in the words people use."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_api.ingestion.v1.ingestion_pb2 import DataContract
from millrace_kit.errors import InvalidArgumentError

_TYPE, _POLICY, _STATISTIC, _MODE = "COLUMN_TYPE_", "CHECK_POLICY_", "STATISTIC_", "COMPATIBILITY_"
_ENUMS = {
    _TYPE: pb.ColumnType.keys(),
    _POLICY: pb.CheckPolicy.keys(),
    _STATISTIC: pb.Statistic.keys(),
    _MODE: pb.Compatibility.keys(),
}
_CHECK = re.compile(r"\s*(?P<left>\w+)\s*(?P<operator><=|>=|==|!=|<|>)\s*(?P<right>\S+)\s*")


def load_contract(path: Path) -> DataContract:
    """Read a contract: the fields of `DataContract`, with lower-case words for types, policies, statistics and the mode.

    A comparison may be written `{name: in_order, check: "arrival >= departure"}`.

    Raises:
        InvalidArgumentError: the file is not a contract; the message names the file and the field.
    """
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise InvalidArgumentError(path.name, "needs a mapping with name and columns")
    for index, column in _mappings(raw, "columns"):
        place = f"{path.name}: columns[{index}]"
        column["type"] = _enum(_TYPE, column.get("type"), f"{place}.type")
        if isinstance(column.get("policies"), dict):
            policies = column["policies"]
            column["policies"] = {
                check: _enum(_POLICY, value, f"{place}.policies.{check}") for check, value in policies.items()
            }
    for index, rule in _mappings(raw, "comparisons"):
        place = f"{path.name}: comparisons[{index}]"
        if "check" in rule:
            rule.update(_comparison(str(rule.pop("check")), f"{place}.check"))
        _policy(rule, place)
    for index, rule in _mappings(raw, "expectations"):
        place = f"{path.name}: expectations[{index}]"
        rule["statistic"] = _enum(_STATISTIC, rule.get("statistic"), f"{place}.statistic")
        _policy(rule, place)
    if "compatibility" in raw:
        raw["compatibility"] = _enum(_MODE, raw["compatibility"], f"{path.name}: compatibility")
    try:
        return ParseDict(raw, DataContract())
    except ParseError as error:
        raise InvalidArgumentError(path.name, str(error)) from error


def _mappings(raw: Mapping[str, Any], name: str) -> list[tuple[int, dict[str, Any]]]:
    return [(index, value) for index, value in enumerate(raw.get(name) or ()) if isinstance(value, dict)]


def _enum(prefix: str, word: object, place: str) -> str:
    name = str(word).upper().removeprefix(prefix)
    known = [key.removeprefix(prefix) for key in _ENUMS[prefix]]
    if name not in known or name == "UNSPECIFIED":
        words = ", ".join(key.lower() for key in known if key != "UNSPECIFIED")
        raise InvalidArgumentError(place, f"is none of {words}")
    return prefix + name


def _policy(rule: dict[str, Any], place: str) -> None:
    if "policy" in rule:
        rule["policy"] = _enum(_POLICY, rule["policy"], f"{place}.policy")


def _comparison(text: str, place: str) -> dict[str, Any]:
    match = _CHECK.fullmatch(text)
    if match is None:
        raise InvalidArgumentError(
            place, 'needs a column, an operator and a column or a number, like "arrival >= departure"'
        )
    found: dict[str, Any] = {"left": match["left"], "operator": match["operator"]}
    try:
        found["number"] = float(match["right"])
    except ValueError:
        found["column"] = match["right"]
    return found


def contract_document(contract: DataContract) -> dict[str, Any]:
    """A contract as `load_contract` reads it, without its version."""
    raw = MessageToDict(contract, preserving_proto_field_name=True)
    raw.pop("version", None)
    for column in raw.get("columns", ()):
        column["type"] = _word(_TYPE, column["type"])
        if "policies" in column:
            column["policies"] = {check: _word(_POLICY, value) for check, value in column["policies"].items()}
        if "allowed_numbers" in column:
            column["allowed_numbers"] = [int(value) for value in column["allowed_numbers"]]
    for rule in raw.get("comparisons", ()):
        right = rule.pop("column", None) or f"{rule.pop('number', 0):g}"
        rule["check"] = f"{rule.pop('left')} {rule.pop('operator')} {right}"
        _readable(rule)
    for rule in raw.get("expectations", ()):
        rule["statistic"] = _word(_STATISTIC, rule["statistic"])
        if "min_rows" in rule:
            rule["min_rows"] = int(rule["min_rows"])
        _readable(rule)
    if "compatibility" in raw:
        raw["compatibility"] = _word(_MODE, raw["compatibility"])
    return raw


def _readable(rule: dict[str, Any]) -> None:
    if "policy" in rule:
        rule["policy"] = _word(_POLICY, rule["policy"])


def _word(prefix: str, name: str) -> str:
    return name.removeprefix(prefix).lower()
