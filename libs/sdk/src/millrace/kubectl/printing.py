"""Prints what the view shows: trees in colour on a terminal, plain elsewhere; tables and documents for programs."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click
import yaml
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from millrace.kubectl import objects
from millrace.kubectl.cluster import Object
from millrace.tree import Node, Tone
from millrace.view import COLUMNS, WIDE_COLUMNS, deployment_row, table

STYLES: dict[Tone, str] = {"plain": "", "good": "green", "bad": "red", "moving": "yellow", "muted": "dim"}


def console() -> Console:
    """Standard output; without colour where NO_COLOR is set or nobody looks."""
    return Console(highlight=False, soft_wrap=False)


def coloured(node: Node) -> Tree:
    """The tree for a terminal."""
    tree = Tree(Text(node.label, STYLES[node.tone]), guide_style="dim")
    for child in node.children:
        tree.children.append(coloured(child))
    return tree


def documents(items: Sequence[Object], output: str, *, one: bool, namespaces: bool = False) -> str:
    """`items` as -o asks.

    Args:
        items: ModelDeployment objects.
        output: table, wide, json, yaml or name.
        one: a single object was asked for, so it is printed without a list around it.
        namespaces: add a column with the namespace.
    """
    match output:
        case "json" | "yaml":
            kept: Any = [_clean(item) for item in items]
            shown = kept[0] if one else {"apiVersion": "v1", "kind": "List", "items": kept}
            if output == "json":
                return json.dumps(shown, indent=2, ensure_ascii=False)
            return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip("\n")
        case "name":
            return "\n".join(f"modeldeployment.millrace.dev/{item['metadata']['name']}" for item in items)
    wide, now = output == "wide", datetime.now(tz=UTC)
    columns = WIDE_COLUMNS if wide else COLUMNS
    rows = [deployment_row(objects.deployment(item), now, wide=wide) for item in items]
    if namespaces:
        columns = ("NAMESPACE", *columns)
        rows = [(item["metadata"]["namespace"], *row) for item, row in zip(items, rows, strict=True)]
    return table(columns, rows)


def _clean(item: Object) -> Object:
    """Without what only the API server and the controller read."""
    metadata = {key: value for key, value in item["metadata"].items() if key != "managedFields"}
    kept = {**item, "metadata": metadata}
    if "status" in item:
        kept["status"] = {key: value for key, value in item["status"].items() if key != "internal"}
    return kept


def say(text: str) -> None:
    """Talk, beside the data."""
    click.echo(text, err=True)
