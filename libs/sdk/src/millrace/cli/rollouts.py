"""`lint`, `apply`, `get`, `describe`, `promote`, `pause`, `resume`, `abort`, `undo`, `history`, `set-weight`, `delete`: ModelDeployments."""

import json
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import TextIO

import click
import grpc
import yaml
from google.protobuf.json_format import MessageToDict
from millrace_api.rollout.v1.rollout_pb2 import (
    VERB_ABORT,
    VERB_PAUSE,
    VERB_PROMOTE,
    VERB_RESUME,
    VERB_SET_WEIGHT,
    VERB_UNDO,
    Deployment,
    Verb,
)
from millrace_kit.errors import MillraceError

from millrace import linting
from millrace.cli.local import Context
from millrace.view import (
    COLUMNS,
    WIDE_COLUMNS,
    comparison_name,
    comparison_words,
    deployment_row,
    history_text,
    pool_lines,
    table,
    verdict_word,
)

OUTPUT = click.Choice(["table", "wide", "json", "yaml", "name"])


@click.command()
@click.option(
    "-f",
    "--filename",
    "files",
    type=click.File("r"),
    multiple=True,
    required=True,
    help="Manifest (YAML); - reads standard input. May be given more than once.",
)
@click.pass_obj
def apply(context: Context, files: tuple[TextIO, ...]) -> None:
    """Create or change the ModelDeployments of manifests."""
    documents = [one for file in files for one in _documents(file)]
    with context.client() as client:
        for document in documents:
            answer = client.rollout.apply(yaml.safe_dump(document, sort_keys=False))
            click.echo(f"modeldeployment/{answer.deployment.name} {answer.result}")
            click.echo(f"next: millrace get {answer.deployment.name} -w", err=True)


def _documents(file: TextIO) -> list[object]:
    try:
        return [one for one in yaml.safe_load_all(file) if one is not None]
    except yaml.YAMLError as error:
        raise click.ClickException(f"{file.name}: {error}") from None


def _print(deployments: list[Deployment], output: str) -> None:
    match output:
        case "json" | "yaml":
            data = [MessageToDict(deployment, always_print_fields_with_no_presence=True) for deployment in deployments]
            click.echo(
                json.dumps(data, indent=2) if output == "json" else yaml.safe_dump(data, sort_keys=False),
                nl=output == "json",
            )
        case "name":
            for deployment in deployments:
                click.echo(f"modeldeployment/{deployment.name}")
        case _:
            wide = output == "wide"
            rows = [deployment_row(deployment, datetime.now(tz=UTC), wide=wide) for deployment in deployments]
            click.echo(table(WIDE_COLUMNS if wide else COLUMNS, rows))


@click.command()
@click.argument("name", required=False)
@click.option("-w", "--watch", is_flag=True, help="Print a line for every change until the rollout rests.")
@click.option("-o", "--output", type=OUTPUT, default="table", show_default=True)
@click.pass_obj
def get(context: Context, name: str | None, watch: bool, output: str) -> None:
    """List ModelDeployments, or show one."""
    with context.client() as client:
        if watch:
            if name is None:
                raise click.UsageError("-w needs a NAME")
            last = ""
            for deployment in client.rollout.watch(name):
                line = table(COLUMNS, [deployment_row(deployment, datetime.now(tz=UTC))])
                body = line.splitlines()[1].rsplit(None, 1)[0]
                if not last:
                    click.echo(line.splitlines()[0])
                if body != last:
                    click.echo(line.splitlines()[1])
                last = body
            return
        _print([client.rollout.get(name)] if name else list(client.rollout.list()), output)


@click.command()
@click.argument("name")
@click.pass_obj
def describe(context: Context, name: str) -> None:
    """Show conditions, gate evidence and events of a ModelDeployment; exits with 1 when it is Degraded."""
    with context.client() as client:
        deployment = client.rollout.get(name)
    _print([deployment], "wide")
    for arm in deployment.arms:
        copies = f" + copies of {arm.mirror_percent:g} %" if arm.mirror_percent else ""
        click.echo(f"arm        {arm.version:<12} {arm.weight:g} %{copies}  {', '.join(arm.endpoints)}")
    for line in pool_lines(deployment.pool):
        click.echo(f"pool       {line}")
    if deployment.waiting:
        click.echo(f"waiting    {deployment.waiting}")
    if deployment.previous_version:
        click.echo(f"previous   {deployment.previous_version}  (millrace undo {name})")
    for condition in deployment.conditions:
        click.echo(f"condition  {condition.type:<12} {condition.status:<8} {condition.reason}: {condition.message}")
    for gate in deployment.gates:
        click.echo(f"gate       {verdict_word(gate.verdict):<12} {gate.gate}: {gate.evidence}")
    for result in deployment.comparisons:
        click.echo(f"comparison {comparison_name(result):<17} {comparison_words(result)}")
    for event in deployment.events:
        click.echo(f"event      {event.at}  {event.type:<8} {event.reason}: {event.message}")
    if deployment.phase == "Degraded":
        sys.exit(1)


def _verb(word: str, verb: Verb.ValueType, text: str) -> click.Command:
    @click.command(word, help=text)
    @click.argument("name")
    @click.pass_obj
    def command(context: Context, name: str) -> None:
        with context.client() as client:
            deployment = client.rollout.act(name, verb)
        click.echo(f"modeldeployment/{name} {word}: {deployment.phase}")

    return command


@click.command("undo")
@click.argument("name")
@click.option(
    "--to", default="", metavar="VERSION|REVISION", help="What to go back to; the version before when it is not given."
)
@click.pass_obj
def undo(context: Context, name: str, to: str) -> None:
    """Go back to a version that was stable before, without steps; `history` lists them."""
    with context.client() as client:
        deployment = client.rollout.act(name, VERB_UNDO, to=to)
    click.echo(f"modeldeployment/{name} undo: {deployment.phase}")


@click.command("history")
@click.argument("name")
@click.option("-o", "--output", type=click.Choice(["table", "wide", "json"]), default="table", show_default=True)
@click.pass_obj
def history(context: Context, name: str, output: str) -> None:
    """List the newest decisions about a deployment's versions; wide and json with the evidence of every gate."""
    with context.client() as client:
        decisions = client.rollout.history(name)
    click.echo(history_text(decisions, output))


@click.command("set-weight")
@click.argument("name")
@click.argument("weight", type=click.FloatRange(0, 100))
@click.pass_obj
def set_weight(context: Context, name: str, weight: float) -> None:
    """Hold the candidate at WEIGHT percent of the traffic until resume."""
    with context.client() as client:
        deployment = client.rollout.act(name, VERB_SET_WEIGHT, weight)
    click.echo(f"modeldeployment/{name} set-weight {weight:g}: {deployment.phase}")
    click.echo(f"next: millrace resume {name}", err=True)


@click.command()
@click.argument("name")
@click.pass_obj
def delete(context: Context, name: str) -> None:
    """Delete a ModelDeployment and stop its model servers."""
    with context.client() as client:
        client.rollout.delete(name)
    click.echo(f"modeldeployment/{name} deleted")


@click.command("lint")
@linting.options
@click.pass_obj
def lint(
    context: Context,
    *,
    paths: tuple[str, ...],
    no_plan: bool,
    show: bool,
    rate: float | None,
    live: bool,
    outcome_share: float,
    baselines: tuple[str, ...],
) -> None:
    """Check manifests, and whether their steps can decide their gates; nothing has to run but for --live."""
    if find_spec("cel") is None:
        raise click.UsageError("needs common-expression-language (pip install 'millrace[kubernetes]')")
    from millrace.kubectl import lint as rules
    from millrace.kubectl import schema

    known = linting.traffic(rate, outcome_share, baselines)
    definition, wrong = schema.crd(), 0
    with context.client() as client:

        def present(name: str) -> float:
            try:
                return client.rollout.get(name).requests_per_second
            except MillraceError as error:
                if error.code is not grpc.StatusCode.NOT_FOUND:
                    raise
                return 0.0

        for path in paths:
            text = linting.read(path)
            found = list(rules.lint(text, definition))
            for finding in found:
                click.echo(f"{path}: {finding}")
            wrong += len(found)
            if not found and not no_plan:
                linting.plan(path, text, known, present if live else None, show=show)
    if wrong:
        sys.exit(1)
    click.echo(f"{len(paths)} file{'s' if len(paths) > 1 else ''} ok", err=True)


COMMANDS = (
    lint,
    apply,
    get,
    describe,
    _verb("promote", VERB_PROMOTE, "Make the candidate stable now, without the remaining steps."),
    _verb("pause", VERB_PAUSE, "Hold the rollout at its present weight."),
    _verb("resume", VERB_RESUME, "Go on with a paused rollout."),
    _verb("abort", VERB_ABORT, "Send all traffic back to the stable version."),
    undo,
    history,
    set_weight,
    delete,
)
