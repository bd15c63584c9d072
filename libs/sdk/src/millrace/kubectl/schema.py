"""Checks a manifest against the CRD's own schema, offline: the structure the API server would refuse, and the CEL rules beside it.

Only what CRD schemas may say is understood. The field of a finding is written as the API server writes it (`spec.rollout.steps[1].weight`).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from cel import cel

Schema = Mapping[str, Any]
CHART = Path(__file__).parents[5] / "charts" / "millrace-crds" / "templates" / "modeldeployments.yaml"
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (Mapping,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


@cache
def crd() -> Schema:
    """The CRD this package was made with: packed into the wheel, in a checkout the chart's own file."""
    packed = files("millrace.kubectl").joinpath("crd.yaml")
    text = (packed if packed.is_file() else CHART).read_text(encoding="utf-8")
    # Helm's way to write two braces that are none of its own.
    found: Schema = yaml.safe_load(re.sub(r'\{\{ "(\{\{|\}\})" \}\}', r"\1", text))
    return found


def schema_of(definition: Schema, version: str) -> Schema | None:
    """The schema of one version; None when the CRD does not serve it."""
    for served in definition["spec"]["versions"]:
        if served["name"] == version:
            found: Schema = served["schema"]["openAPIV3Schema"]
            return found
    return None


def findings(value: Any, schema: Schema, field: str = "") -> Iterator[Finding]:
    """What is wrong with `value` at `field`, first in its structure, then by the rules."""
    found = list(_structure(value, schema, field))
    yield from found
    yield from _rules(value, schema, field, broken=bool(found))


def _structure(value: Any, schema: Schema, field: str) -> Iterator[Finding]:
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            yield Finding(field, "must be an integer or a string")
        else:
            yield from _scalar(value, schema, field)
        return
    kind = schema.get("type")
    if kind is not None and not _is(value, kind):
        yield Finding(field, f"must be {'an' if kind[0] in 'aio' else 'a'} {kind}, not {value!r}"[:200])
        return
    if isinstance(value, Mapping):
        yield from _object(value, schema, field)
    elif isinstance(value, list):
        yield from _array(value, schema, field)
    else:
        yield from _scalar(value, schema, field)


def _is(value: Any, kind: str) -> bool:
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _object(value: Mapping[str, Any], schema: Schema, field: str) -> Iterator[Finding]:
    known: Mapping[str, Schema] = schema.get("properties", {})
    others = schema.get("additionalProperties")
    for name in schema.get("required", ()):
        if name not in value:
            yield Finding(_join(field, name), "is required")
    if "maxProperties" in schema and len(value) > schema["maxProperties"]:
        yield Finding(field, f"must have at most {schema['maxProperties']} entries")
    for name, child in value.items():
        where = _join(field, str(name))
        if name in known:
            yield from findings(child, known[name], where)
        elif isinstance(others, Mapping):
            yield from findings(child, others, f"{field}[{name}]")
        elif not (schema.get("x-kubernetes-preserve-unknown-fields") or others or field == "metadata"):
            yield Finding(where, "is not a field of this resource")


def _array(value: Sequence[Any], schema: Schema, field: str) -> Iterator[Finding]:
    if len(value) < schema.get("minItems", 0):
        yield Finding(field, f"must have at least {schema['minItems']} items")
    if "maxItems" in schema and len(value) > schema["maxItems"]:
        yield Finding(field, f"must have at most {schema['maxItems']} items")
    for index, child in enumerate(value):
        yield from findings(child, schema.get("items", {}), f"{field}[{index}]")


def _scalar(value: Any, schema: Schema, field: str) -> Iterator[Finding]:
    if "enum" in schema and value not in schema["enum"]:
        yield Finding(field, f"must be one of {', '.join(map(str, schema['enum']))}, not {value!r}"[:300])
    if isinstance(value, str):
        if len(value) < schema.get("minLength", 0) or len(value) > schema.get("maxLength", len(value)):
            yield Finding(
                field, f"must have {schema.get('minLength', 0)} to {schema.get('maxLength', 'any')} characters"
            )
        if "pattern" in schema and re.search(schema["pattern"], value) is None:
            yield Finding(field, f"must match {schema['pattern']}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from _range(value, schema, field)


def _range(value: float, schema: Schema, field: str) -> Iterator[Finding]:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and (value < low or (schema.get("exclusiveMinimum") and value == low)):
        yield Finding(field, f"must be {'more than' if schema.get('exclusiveMinimum') else 'at least'} {low}")
    if high is not None and (value > high or (schema.get("exclusiveMaximum") and value == high)):
        yield Finding(field, f"must be {'less than' if schema.get('exclusiveMaximum') else 'at most'} {high}")


def _rules(value: Any, schema: Schema, field: str, *, broken: bool) -> Iterator[Finding]:
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" in rule["rule"]:
            continue  # about a change of an object that exists, which a file is not
        try:
            fulfilled = holds(rule["rule"], value)
        except (RuntimeError, TypeError, ValueError):
            if not broken:
                raise
            continue  # what the rule is about is missing or of another type, and that was said
        if not fulfilled:
            yield Finding(f"{field}{rule.get('fieldPath', '')}", rule.get("message") or f"must fulfil {rule['rule']}")


def holds(rule: str, value: Any) -> bool:
    """Whether a CEL rule of the CRD holds; Kubernetes' additions to CEL that the CRD uses are among the functions."""
    functions: dict[str, Callable[..., Any]] = {
        "isSorted": lambda items: list(items) == sorted(items),
        "findAll": lambda text, pattern: re.findall(pattern, text),
    }
    return cel.evaluate(rule, cel.Context({"self": value}, functions)) is True


def _join(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name
