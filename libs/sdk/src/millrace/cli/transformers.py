"""`features fit|transformers|select|selections`: numbers made from features, and which features are worth it."""

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import yaml
from google.protobuf.json_format import MessageToDict
from millrace_api.feature.v1 import transformers_pb2
from millrace_kit.errors import InvalidArgumentError

from millrace.areas.transformers import raw_features
from millrace.cli.local import Context
from millrace.client import Client
from millrace.view import table

_TRAINING = ("feature_service", "entity_contract", "label_contract", "join_column", "label_column", "definitions_hash")
_TIMES = ("start", "end", "known_at")
_OUTPUT = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)


def load_fit(path: Path) -> dict[str, Any]:
    """A fit as YAML: `name`, `steps`, and `training` unless the set is named elsewhere.

    Raises:
        InvalidArgumentError: a key is missing or unknown; the message names the file.
    """
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or not isinstance(raw.get("steps"), list) or not raw.get("name"):
        raise InvalidArgumentError(path.name, "needs a mapping with name and steps")
    if unknown := sorted(set(raw) - {"name", "steps", "training"}):
        raise InvalidArgumentError(path.name, f"has no key {unknown[0]!r}")
    if not all(isinstance(step, dict) for step in raw["steps"]):
        raise InvalidArgumentError(path.name, "every step needs a mapping with kind and inputs")
    training = raw.get("training") or {}
    if unknown := sorted(set(training) - {*_TRAINING, *_TIMES, "features"}):
        raise InvalidArgumentError(path.name, f"training has no key {unknown[0]!r}")
    return raw


def build_set(client: Client, fit: dict[str, Any], path: Path) -> str:
    """Build the training set that a fit describes; its digest."""
    training = fit.get("training")
    if not training:
        raise InvalidArgumentError(path.name, "needs training, or give --training-set")
    times = {name: training[name] for name in _TIMES if training.get(name)}
    arguments: dict[str, Any] = {
        name: value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
        for name, value in times.items()
    }
    if naive := [name for name, value in arguments.items() if value.tzinfo is None]:
        raise InvalidArgumentError(f"{path.name}: training.{naive[0]}", "needs a time zone, for example a Z")
    built = client.features.build_training_set(
        **{name: training.get(name, "") for name in _TRAINING},
        **arguments,
        features=training.get("features") or raw_features(fit["steps"]),
    )
    return built.digest


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--training-set", default="", help="Digest of a training set, instead of building the file's.")
@click.pass_obj
def fit(context: Context, file: Path, training_set: str) -> None:
    """Fit the transformer that FILE (YAML) describes and print its name and version."""
    wanted = load_fit(file)
    with context.client() as client:
        digest = training_set or build_set(client, wanted, file)
        click.echo(f"training set {digest}", err=True)
        made = client.transformers.fit(wanted["name"], digest, wanted["steps"])
    click.echo(f"{made.name}@{made.version}")
    click.echo(
        f"{len(made.inputs)} features to {len(made.outputs)} numbers, fitted on {made.rows} rows; use it in a FeatureService by "
        f'tags={{"millrace.transformers": "{made.name}@{made.version}"}}',
        err=True,
    )


@click.command("transformers")
@click.argument("name", required=False, default="")
@_OUTPUT
@click.pass_obj
def list_transformers(context: Context, name: str, output: str) -> None:
    """List fitted transformers, newest versions first."""
    with context.client() as client:
        found = client.transformers.list(name)
    if output == "json":
        click.echo(json.dumps([MessageToDict(item) for item in found], indent=2))
        return
    rows = [
        (
            f"{t.name}@{t.version}",
            ", ".join(dict.fromkeys(s.kind for s in t.steps)),
            str(len(t.inputs)),
            str(len(t.outputs)),
            str(t.rows),
            t.training_set[:16],
            t.digest[:16],
        )
        for t in found
    ]
    click.echo(table(("TRANSFORMER", "KINDS", "INPUTS", "OUTPUTS", "ROWS", "TRAINING SET", "DIGEST"), rows))


@click.command()
@click.argument("name")
@click.option("--training-set", required=True, help="Digest of the set to judge.")
@click.option("--keep", type=click.IntRange(min=0), default=0, help="At most so many of the best; 0: all that pass.")
@click.option(
    "--max-missing",
    type=click.FloatRange(0, 1),
    default=0.95,
    show_default=True,
    help="Largest part of missing values.",
)
@click.option(
    "--max-correlation",
    type=click.FloatRange(0, 1),
    default=0.98,
    show_default=True,
    help="With a better feature, by ranks.",
)
@click.option(
    "--min-mutual-information",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="With the label, in nats.",
)
@click.option(
    "--permutation/--no-permutation",
    default=True,
    show_default=True,
    help="Measure permutation importance by boosted trees.",
)
@click.option("--min-importance", type=float, default=0.0, show_default=True, help="Rise of the loss to exceed.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
@click.option("--dry-run", is_flag=True, help="Keep no report.")
@_OUTPUT
@click.pass_obj
def select(context: Context, /, name: str, training_set: str, output: str, dry_run: bool, **options: Any) -> None:
    """Judge the features of a training set and keep the report as the next version of NAME."""
    try:
        import sklearn  # noqa: F401 - an optional dependency of the SDK
    except ImportError:
        click.echo("millrace: needs scikit-learn; pip install 'millrace[select]'", err=True)
        sys.exit(2)
    from millrace.selection import Thresholds, report
    from millrace.selection import select as judge

    thresholds = Thresholds(**options)
    with context.client() as client:
        found = client.features.training_set(training_set)
        rows = client.features.load_training_set(found)
        try:
            judged = judge(rows, features=list(found.feature_names), label=found.label_column, thresholds=thresholds)
        except ValueError as error:
            raise InvalidArgumentError("training_set", str(error)) from error
        selection = report(name, training_set, judged, thresholds, estimator="gradient boosted trees")
        if not dry_run:
            selection = client.transformers.record_selection(selection)
    _print(selection, output)
    if not dry_run:
        click.echo(
            f"{name}@{selection.version}; use it in a FeatureService by "
            f'tags={{"millrace.selection": "{name}@{selection.version}"}}',
            err=True,
        )


@click.command("selections")
@click.argument("name", required=False, default="")
@click.option("--version", type=click.IntRange(min=1), default=None, help="Print this version's report.")
@_OUTPUT
@click.pass_obj
def list_selections(context: Context, name: str, version: int | None, output: str) -> None:
    """List selections, newest versions first, or print the report of one."""
    with context.client() as client:
        if version is not None:
            _print(client.transformers.selection(name, version), output)
            return
        found = client.transformers.selections(name)
    if output == "json":
        click.echo(json.dumps([MessageToDict(item) for item in found], indent=2))
        return
    rows = [
        (
            f"{s.name}@{s.version}",
            f"{sum(f.selected for f in s.features)}/{len(s.features)}",
            s.training_set[:16],
            s.digest[:16],
        )
        for s in found
    ]
    click.echo(table(("SELECTION", "SELECTED", "TRAINING SET", "DIGEST"), rows))


def _print(selection: transformers_pb2.Selection, output: str) -> None:
    if output == "json":
        click.echo(json.dumps(MessageToDict(selection), indent=2))
        return

    def score(item: transformers_pb2.FeatureScore, name: str) -> str:
        return f"{item.scores[name]:.4g}" if name in item.scores else "-"

    rows = [
        (
            f.feature,
            "yes" if f.selected else "no",
            score(f, "mutual_information"),
            score(f, "permutation_mean"),
            score(f, "permutation_std"),
            f"{f.scores['missing']:.0%}" if "missing" in f.scores else "-",
            f.reason or "-",
        )
        for f in selection.features
    ]
    click.echo(table(("FEATURE", "SELECTED", "MUTUAL INFORMATION", "PERMUTATION", "STD", "MISSING", "REASON"), rows))


COMMANDS = (fit, list_transformers, select, list_selections)
