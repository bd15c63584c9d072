"""The CustomResourceDefinition, made from the manifest's own classes. `python -m millrace_rollout_controller.kubernetes.crd CHART` writes it.

A structural schema: references are put in place, what may be None is optional, defaults are said in words and stay the controller's.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from millrace_rollout_controller.kubernetes import crd_rules, names
from millrace_rollout_controller.kubernetes.crd_status import COLUMNS, STATUS
from millrace_rollout_controller.manifest import Spec

Schema = dict[str, Any]
FILE = Path("templates") / "modeldeployments.yaml"
_DROPPED = {"title", "default", "$defs", "discriminator"}


def definition() -> Schema:
    """The CRD as the API server takes it."""
    spec = _structural(Spec.model_json_schema(by_alias=True, mode="validation"))
    _put(spec)
    name = {"type": "string", "maxLength": 63, "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
    schema: Schema = {
        "type": "object",
        "description": "Brings one version of a model to traffic, by steps and gates, and back when they fail.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object", "properties": {"name": name}},
            "spec": spec,
            "status": STATUS,
        },
    }
    version: Schema = {
        "name": "v1alpha1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}},
        "additionalPrinterColumns": COLUMNS,
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{names.PLURAL}.{names.GROUP}",
            "labels": {"app.kubernetes.io/part-of": "millrace"},
            # `helm uninstall` leaves it, and with it every ModelDeployment.
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": "ModelDeployment",
                "listKind": "ModelDeploymentList",
                "plural": names.PLURAL,
                "singular": "modeldeployment",
                "shortNames": ["mdep"],
                "categories": ["millrace"],
            },
            "versions": [version],
        },
    }


def _structural(schema: Schema) -> Schema:
    definitions = schema.get("$defs", {})

    def convert(node: Any) -> Any:
        if isinstance(node, list):
            return [convert(one) for one in node]
        if not isinstance(node, dict):
            return node
        node = dict(node)
        default = node.get("default")
        if "$ref" in node:
            target = definitions[node.pop("$ref").removeprefix("#/$defs/")]
            node = {**target, **node}
        choices = [one for one in node.get("anyOf", ()) if one.get("type") != "null"]
        if "anyOf" in node:
            del node["anyOf"]
            node = _whole_or_text(choices, node) if len(choices) > 1 else {**choices[0], **node}
            if "$ref" in node:
                return convert(node)
        result: Schema = {}
        for key, value in node.items():
            if key in _DROPPED:
                continue
            if key == "properties":
                result[key] = {name: convert(one) for name, one in value.items()}
            elif key == "additionalProperties":
                _map(result, value, convert)
            elif key in {"exclusiveMinimum", "exclusiveMaximum"}:
                # OpenAPI 3.0 has a flag beside the bound, JSON schema a bound of its own.
                result["minimum" if key == "exclusiveMinimum" else "maximum"] = value
                result[key] = True
            elif key == "const":
                result["enum"] = [value]
            else:
                result[key] = convert(value)
        return _described(result, default)

    found: Schema = convert({key: value for key, value in schema.items() if key != "$defs"})
    return found


def _whole_or_text(choices: list[Schema], node: Schema) -> Schema:
    """A whole number or a text; every keyword counts for its own type only."""
    merged: Schema = {}
    for choice in choices:
        merged |= {key: value for key, value in choice.items() if key != "type"}
    return {**node, **merged, "x-kubernetes-int-or-string": True}


def _map(result: Schema, value: Any, convert: Any) -> None:
    if value is False:
        return
    if value is True:
        result["x-kubernetes-preserve-unknown-fields"] = True
        return
    result["additionalProperties"] = convert(value)


def _described(schema: Schema, default: Any) -> Schema:
    if default not in (None, {}, [], ()) and not isinstance(default, (dict, list)):
        said = (
            str(default).lower()
            if isinstance(default, bool)
            else f"{default:g}"
            if isinstance(default, float)
            else default
        )
        schema["description"] = f"{schema.get('description', '')} Default: {said}.".strip()
    if "description" in schema:
        schema["description"] = " ".join(schema["description"].split())
    return schema


def _put(spec: Schema) -> None:
    for path, more in crd_rules.SCHEMA.items():
        at(spec, path).update(more)
    for path, rules in crd_rules.CEL.items():
        at(spec, path)["x-kubernetes-validations"] = rules


def at(spec: Schema, path: str) -> Schema:
    """The schema of a field, for example `spec.rollout.steps.items.weight`.

    Raises:
        KeyError: the manifest has no such field.
    """
    node = spec
    for part in path.split(".")[1:]:
        node = node["items"] if part == "items" else node["properties"][part]
    return node


def chart_file() -> str:
    """The chart's template: Helm must not read the braces of CEL rules and queries as its own."""
    text = yaml.safe_dump(definition(), sort_keys=False, width=140, allow_unicode=True)
    escaped = text.replace("{{", "\0").replace("}}", "\1").replace("\0", '{{ "{{" }}').replace("\1", '{{ "}}" }}')
    return f"# Made by `make crd` from millrace_rollout_controller.manifest; do not edit.\n{escaped}"


def main() -> int:
    """Write the chart's file, or check it."""
    parser = argparse.ArgumentParser(prog="python -m millrace_rollout_controller.kubernetes.crd")
    parser.add_argument("chart", type=Path, help="folder of the chart millrace-crds")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the file is not up to date")
    arguments = parser.parse_args()
    path, text = arguments.chart / FILE, chart_file()
    if not arguments.check:
        path.write_text(text, encoding="utf-8")
        return 0
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        print(f"{path} is not what the manifest says: run make crd", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
