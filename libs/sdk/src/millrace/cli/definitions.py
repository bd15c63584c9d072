"""`features apply|diff|list|versions|rollback|pin|unpin|audit`: definitions and their versions."""

import sys
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import click
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.feature.v1.versions_pb2 import ChangeKind, DiffDefinitionsResponse

from millrace.cli.local import Context
from millrace.feast_repo import registry_from_repo
from millrace.view import table

REPO = click.Path(exists=True, file_okay=False, path_type=Path)
SHORT = 12


def _when(stamp: Timestamp) -> str:
    return f"{stamp.ToDatetime(tzinfo=UTC):%Y-%m-%d %H:%M:%S}Z"


def _full(context: Context, given: str) -> str:
    """The hash that begins with `given`."""
    with context.client() as client:
        found = sorted({applied.definitions_hash for applied in client.definitions.history()})
    matching = [digest for digest in found if digest.startswith(given)]
    if len(matching) != 1:
        raise click.UsageError(f"{len(matching)} definitions have a hash that begins with {given!r}")
    return matching[0]


def _show(difference: DiffDefinitionsResponse) -> None:
    rows = [
        (
            ChangeKind.Name(c.kind).removeprefix("CHANGE_KIND_").lower(),
            c.type,
            c.name,
            "yes" if c.refill else "-",
            ", ".join(c.fields) or "-",
        )
        for c in difference.changes
    ]
    click.echo(table(("CHANGE", "TYPE", "NAME", "REFILL", "FIELDS"), rows))


@click.command("apply")
@click.argument("repository", type=REPO, default=".")
@click.pass_obj
def apply_definitions(context: Context, repository: Path) -> None:
    """Put the Feast repository's definitions in force."""
    project, registry = registry_from_repo(repository)
    with context.client() as client:
        answer = client.features.apply(project, registry)
    click.echo(f"definitions/{answer.definitions_hash} {'applied' if answer.changed else 'unchanged'}")
    if answer.changed:
        click.echo("next: millrace features versions", err=True)


@click.command()
@click.argument("repository_or_hash", default=".")
@click.argument("from_hash", default="")
@click.pass_obj
def diff(context: Context, repository_or_hash: str, from_hash: str) -> None:
    """Show what a Feast repository, or earlier definitions, would change; exits with 1 when something would."""
    start = _full(context, from_hash) if from_hash else ""
    if Path(repository_or_hash).is_dir():
        project, registry = registry_from_repo(Path(repository_or_hash))
        with context.client() as client:
            found = client.definitions.diff(from_hash=start, project=project, feast_registry=registry)
    else:
        target = _full(context, repository_or_hash)
        with context.client() as client:
            found = client.definitions.diff(from_hash=start, to_hash=target)
    _show(found)
    if found.changes:
        sys.exit(1)


@click.command("list")
@click.pass_obj
def list_services(context: Context) -> None:
    """List the feature services in force."""
    with context.client() as client:
        found = client.features.definitions()
    rows = [
        (s.name, str(len(s.features)), ", ".join(s.join_keys), ", ".join(s.request_fields) or "-")
        for s in found.feature_services
    ]
    click.echo(table(("SERVICE", "FEATURES", "JOIN KEYS", "REQUEST FIELDS"), rows))


@click.command()
@click.option("-n", "--number", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Lines at most.")
@click.pass_obj
def versions(context: Context, number: int) -> None:
    """List when which definitions came into force, by whom, and which are served."""
    with context.client() as client:
        applied, pins = list(islice(client.definitions.history(), number)), client.definitions.pins()
    names: dict[str, list[str]] = {}
    for pin in pins:
        until = f" until {_when(pin.until)}" if pin.HasField("until") else ""
        names.setdefault(pin.definitions_hash, []).append(pin.name + until)
    rows = [
        (
            a.definitions_hash[:SHORT],
            "in force" if a.in_force else ", ".join(names.get(a.definitions_hash, [])) or "-",
            _when(a.at),
            a.author or "-",
            "rollback" if a.rollback else "apply",
        )
        for a in applied
    ]
    click.echo(table(("HASH", "SERVED", "AT", "AUTHOR", "BY"), rows))


@click.command()
@click.argument("definitions_hash")
@click.pass_obj
def rollback(context: Context, definitions_hash: str) -> None:
    """Put the definitions with this hash (or its beginning) in force again."""
    target = _full(context, definitions_hash)
    with context.client() as client:
        changed = client.definitions.roll_back(target)
    click.echo(f"definitions/{target} {'in force' if changed else 'unchanged'}")


@click.command()
@click.argument("definitions_hash")
@click.argument("name")
@click.option("--until", type=click.DateTime(), default=None, help="End of the pin (UTC); none keeps it until unpin.")
@click.pass_obj
def pin(context: Context, definitions_hash: str, name: str, until: datetime | None) -> None:
    """Keep definitions served beside those in force, for models trained with them."""
    target = _full(context, definitions_hash)
    with context.client() as client:
        client.definitions.pin(target, name, until.replace(tzinfo=UTC) if until else None)
    click.echo(f"definitions/{target} pinned as {name}")


@click.command()
@click.argument("definitions_hash")
@click.argument("name")
@click.pass_obj
def unpin(context: Context, definitions_hash: str, name: str) -> None:
    """Take a pin away."""
    target = _full(context, definitions_hash)
    with context.client() as client:
        client.definitions.unpin(target, name)
    click.echo(f"definitions/{target} unpinned from {name}")


@click.command()
@click.option("--denied", is_flag=True, help="Only what was refused.")
@click.option("-n", "--number", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Lines at most.")
@click.pass_obj
def audit(context: Context, denied: bool, number: int) -> None:
    """List who changed or was refused what, newest first."""
    with context.client() as client:
        entries = list(islice(client.definitions.audit(denied_only=denied), number))
    rows = [
        (_when(e.at), e.caller or "-", e.action, e.resource, "yes" if e.allowed else "NO", e.detail or "-")
        for e in entries
    ]
    click.echo(table(("AT", "CALLER", "ACTION", "RESOURCE", "ALLOWED", "DETAIL"), rows))


COMMANDS = (apply_definitions, diff, list_services, versions, rollback, pin, unpin, audit)
