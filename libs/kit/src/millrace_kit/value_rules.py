"""What a model version's values may be (`ValueRules`), and what is right in that: the registry checks it, and so does who uses it."""

import json

from google.protobuf import json_format
from millrace_api.common.v1 import common_pb2

from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError

MAX_RULES = 10_000
MAX_ALLOWED = 1000
MAX_NAME = 256
MAX_ALLOWED_TEXT = 1024


def check_rules(rules: common_pb2.ValueRules, where: str, features: frozenset[str]) -> None:
    """Check the rules of a version.

    Args:
        rules: what is declared.
        where: the field that holds it.
        features: names of the version's features.

    Raises:
        InvalidArgumentError: names the field below `where` that is wrong.
    """
    for kind in ("features", "inputs"):
        found = getattr(rules, kind)
        if len(found) > MAX_RULES:
            raise InvalidArgumentError(f"{where}.{kind}", f"has more than {MAX_RULES} rules")
        names: set[str] = set()
        for index, rule in enumerate(found):
            place = f"{where}.{kind}[{index}]"
            check.text(rule.name, f"{place}.name", limit=MAX_NAME)
            if rule.name in names:
                raise InvalidArgumentError(f"{place}.name", f"{rule.name!r} has two rules")
            names.add(rule.name)
            if kind == "features" and rule.name not in features:
                raise InvalidArgumentError(f"{place}.name", f"{rule.name!r} is no feature of the signature")
            _check_rule(rule, place, is_feature=kind == "features")


def rules_text(rules: common_pb2.ValueRules) -> str:
    """The rules as JSON, the same text for the same rules; empty where there are none."""
    if not rules.features and not rules.inputs:
        return ""
    found = json_format.MessageToDict(rules)
    for part in found.values():
        part.sort(key=lambda rule: rule["name"])
    return json.dumps(found, sort_keys=True, separators=(",", ":"))


def read_rules(text: str) -> common_pb2.ValueRules:
    """What `rules_text` wrote."""
    return json_format.Parse(text, common_pb2.ValueRules()) if text else common_pb2.ValueRules()


def _check_rule(rule: common_pb2.ValueRule, where: str, *, is_feature: bool) -> None:
    for bound in ("min", "max"):
        if rule.HasField(bound):
            check.finite(getattr(rule, bound), f"{where}.{bound}")
    bounded = rule.HasField("min") or rule.HasField("max")
    if rule.HasField("min") and rule.HasField("max") and rule.min > rule.max:
        raise InvalidArgumentError(f"{where}.min", "lies above max")
    if bounded and (rule.allowed or rule.allowed_texts):
        raise InvalidArgumentError(f"{where}.allowed", "goes without bounds, and bounds without it")
    for name in ("allowed", "allowed_texts"):
        if len(getattr(rule, name)) > MAX_ALLOWED:
            raise InvalidArgumentError(f"{where}.{name}", f"has more than {MAX_ALLOWED} values")
    for index, number in enumerate(rule.allowed):
        check.finite(number, f"{where}.allowed[{index}]")
    for index, text in enumerate(rule.allowed_texts):
        check.optional_text(text, f"{where}.allowed_texts[{index}]", limit=MAX_ALLOWED_TEXT)
    if is_feature and rule.allowed_texts:
        raise InvalidArgumentError(f"{where}.allowed_texts", "is for inputs; features are numbers")
    if rule.policy not in common_pb2.ValuePolicy.values():
        raise InvalidArgumentError(f"{where}.policy", "is not known")
    if rule.policy == common_pb2.VALUE_POLICY_CLIP and not (is_feature and bounded):
        raise InvalidArgumentError(f"{where}.policy", "VALUE_POLICY_CLIP is for features that have bounds")
