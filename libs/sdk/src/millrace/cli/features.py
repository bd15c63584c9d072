"""`features`: how the online values are doing."""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import click
from google.protobuf.json_format import MessageToDict
from millrace_api.feature.v1.feature_pb2 import ConsistencyFinding, ConsistencyKind, ConsistencyWindow

from millrace.cli import definitions, transformers
from millrace.cli.local import Context
from millrace.values import from_value
from millrace.view import table

ALARM = 0.01


@click.group()
def features() -> None:
    """Definitions of features, their versions, and how the online values are doing."""


@features.command()
@click.argument("feature_service", required=False, default="")
@click.option("--since", type=click.DateTime(), default=None, help="Windows that begin at or after this instant (UTC).")
@click.option("--examples", type=click.IntRange(0, 1000), default=5, show_default=True, help="Findings to show.")
@click.option(
    "--alarm", type=click.FloatRange(0, 1), default=ALARM, show_default=True,
    help="Share of a feature's values in a window that may differ; above it the exit code is 1.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.pass_obj
def consistency(  # noqa: PLR0917 - click's options
    context: Context, feature_service: str, since: datetime | None, examples: int, alarm: float, output: str
) -> None:
    """Compare what was served with what the lake says about the same instants; exits with 1 when a feature is above --alarm."""
    start = since.replace(tzinfo=UTC) if since else None
    with context.client() as client:
        found = client.features.consistency(feature_service, start=start, max_findings=examples)
    if output == "json":
        click.echo(json.dumps(MessageToDict(found, preserving_proto_field_name=True), indent=2))
    else:
        click.echo(table(COLUMNS, [_row(window) for window in found.windows]))
        for finding in found.findings:
            click.echo(_sentence(finding))
        if found.waiting:
            click.echo(f"{found.waiting} answers wait for their check", err=True)
    if any(_share(window) > alarm for window in found.windows):
        sys.exit(1)


COLUMNS = ("SERVICE", "FEATURE", "WINDOW", "VALUES", "DIFFER", "MISMATCH", "MISSING", "EXTRA", "SMAPE")


def _share(window: ConsistencyWindow) -> float:
    return (window.mismatched + window.missing + window.extra) / window.compared if window.compared else 0.0


def _row(window: ConsistencyWindow) -> Sequence[str]:
    start = window.window.start.ToDatetime(tzinfo=UTC)
    return (
        window.feature_service,
        window.feature,
        f"{start:%Y-%m-%d %H:%M}",
        str(window.compared),
        f"{_share(window):.2%}",
        str(window.mismatched),
        str(window.missing),
        str(window.extra),
        f"{window.smape:.4f}",
    )


def _sentence(finding: ConsistencyFinding) -> str:
    entity = ", ".join(f"{name}={from_value(value)}" for name, value in sorted(finding.entity.items()))
    kind = ConsistencyKind.Name(finding.kind).removeprefix("CONSISTENCY_KIND_").lower()
    return (
        f"{kind}: {finding.feature} of {entity} at {finding.asked_for.ToJsonString()}: "
        f"served {finding.served:g}, the lake says {finding.expected:g}"
    )


for command in transformers.COMMANDS:
    features.add_command(command)

for command in definitions.COMMANDS:
    features.add_command(command)

COMMANDS = (features,)
