"""`trace`, `lineage`, `reproduce`, `runs`, `models`, `findings`, `dead-letters`: looking back."""

import json
import sys

import click
from google.protobuf.json_format import MessageToDict
from millrace_api.drift.v1.drift_pb2 import DriftKind
from millrace_api.registry.v1.registry_pb2 import Stage
from millrace_api.training.v1.training_pb2 import RunState

from millrace.cli.local import Context
from millrace.lineage import Trace, trace_prediction, trace_version
from millrace.view import table


@click.command()
@click.argument("prediction_id")
@click.option("-o", "--output", type=click.Choice(["tree", "json"]), default="tree", show_default=True)
@click.pass_obj
def trace(context: Context, prediction_id: str, output: str) -> None:
    """Walk back from a prediction to the data and definitions that made its model."""
    with context.client() as client:
        _show(trace_prediction(client, prediction_id), output)


@click.command()
@click.argument("model")
@click.argument("version", required=False, default="")
@click.option("-o", "--output", type=click.Choice(["tree", "json"]), default="tree", show_default=True)
@click.pass_obj
def lineage(context: Context, model: str, version: str, output: str) -> None:
    """Show what made a model version, and the rollouts it went through with every decision; without VERSION the one in Production."""
    with context.client() as client:
        _show(trace_version(client, model, version), output)


def _show(found: Trace, output: str) -> None:
    if output == "json":
        links = [{"kind": link.kind, "identity": link.identity, **link.facts} for link in found.links]
        click.echo(json.dumps({"links": links, "gaps": found.gaps}, indent=2))
    else:
        for depth, link in zip(found.depths(), found.links, strict=True):
            click.echo(f"{'   ' * depth}{'└─ ' if depth else ''}{link.kind}: {link.identity}")
            for name, fact in link.facts.items():
                if fact:
                    click.echo(f"{'   ' * depth}{'   ' if depth else ''}· {name}: {fact}")
    for gap in found.gaps:
        click.echo(f"millrace: the chain has a gap: {gap}", err=True)
    if found.gaps:
        sys.exit(1)


@click.command()
@click.argument("run_id")
@click.pass_obj
def reproduce(context: Context, run_id: str) -> None:
    """Run a training run again and say whether its outputs are equal to the bit; exits with 1 when not."""
    with context.client() as client:
        click.echo(f"running {run_id} again; this takes as long as it took", err=True)
        answer = client.training.reproduce(run_id)
    rows = [
        (o.path, "equal" if o.equal else "DIFFERS", o.sha256_original[:16], o.sha256_reproduction[:16])
        for o in answer.outputs
    ]
    click.echo(table(("OUTPUT", "RESULT", "FIRST", "SECOND"), rows))
    for name, difference in answer.environment_differences.items():
        click.echo(f"environment: {name}: {difference}")
    click.echo("bit-equal" if answer.bit_equal else "not bit-equal")
    if not answer.bit_equal:
        sys.exit(1)


@click.command()
@click.argument("pipeline", required=False, default="")
@click.pass_obj
def runs(context: Context, pipeline: str) -> None:
    """List training runs, newest first."""
    with context.client() as client:
        found = client.training.runs(pipeline)
    rows = [
        (
            run.id,
            run.pipeline,
            RunState.Name(run.state).removeprefix("RUN_STATE_").lower(),
            run.model_version or "-",
            run.cause or "-",
        )
        for run in found
    ]
    click.echo(table(("ID", "PIPELINE", "STATE", "VERSION", "CAUSE"), rows))


@click.command()
@click.argument("model", required=False, default="")
@click.pass_obj
def models(context: Context, model: str) -> None:
    """List model versions with their stages and metrics."""
    with context.client() as client:
        names = [model] if model else [found.name for found in client.registry.models()]
        versions = [version for name in names for version in client.registry.versions(name)]
    rows = [
        (
            v.model,
            v.version,
            Stage.Name(v.stage).removeprefix("STAGE_").capitalize(),
            v.digest[:16],
            ", ".join(f"{name}={value:.4g}" for name, value in sorted(v.metrics.items())) or "-",
        )
        for v in versions
    ]
    click.echo(table(("MODEL", "VERSION", "STAGE", "DIGEST", "METRICS"), rows))


@click.command()
@click.argument("model", required=False, default="")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.pass_obj
def findings(context: Context, model: str, output: str) -> None:
    """List drift findings, newest first."""
    with context.client() as client:
        found = client.drift.findings(model)
    if output == "json":
        click.echo(json.dumps([MessageToDict(finding) for finding in found], indent=2))
        return
    rows = [
        (
            f.model,
            f.version,
            DriftKind.Name(f.kind).removeprefix("DRIFT_KIND_").lower(),
            f.feature or "-",
            f.test,
            f"{f.effect_size:.3f}",
            f"{f.p_value:.2g}",
        )
        for f in found
    ]
    click.echo(table(("MODEL", "VERSION", "KIND", "FEATURE", "TEST", "EFFECT", "P"), rows))


@click.command("dead-letters")
@click.argument("contract", required=False, default="")
@click.pass_obj
def dead_letters(context: Context, contract: str) -> None:
    """Count refused records by contract and reason."""
    with context.client() as client:
        counts = client.ingestion.count_dead_letters(contract)
    click.echo(
        table(
            ("CONTRACT", "REASON", "COUNT", "REPLAYED"),
            [(c.contract, c.reason, str(c.count), str(c.replayed)) for c in counts],
        )
    )


COMMANDS = (trace, lineage, reproduce, runs, models, findings, dead_letters)
