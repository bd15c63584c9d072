"""YAML and JSON texts of strangers, made plain values: no aliases, no repeated keys, no objects, no surprises."""

import json
from typing import Any

import yaml
from millrace_kit.errors import InvalidArgumentError


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (a few lines of them can stand for gigabytes) and without repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not accepted")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len({str(key) for key in keys}) < len(keys):
            raise yaml.YAMLError(f"a key is repeated at line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)


def to_json(text: str, field: str) -> str:
    """The mapping in `text` as JSON.

    Raises:
        InvalidArgumentError: names `field` when the text is not YAML of plain values or no mapping.
    """
    try:
        raw = yaml.load(text, _Loader)  # noqa: S506 - a safe loader
        encoded = json.dumps(raw, allow_nan=False)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, OverflowError) as error:
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        raise InvalidArgumentError(field, f"is not YAML of plain values: {problem}") from None
    if not isinstance(raw, dict):
        raise InvalidArgumentError(field, "must be a mapping")
    return encoded
