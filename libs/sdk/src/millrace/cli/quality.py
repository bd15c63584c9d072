"""`quality`, `letters`, `quarantine`, `table-versions`: what landed, what did not, and which versions of a table stay."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import click
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.ingestion.v1 import ingestion_pb2 as pb

from millrace.cli.local import Context
from millrace.transport import LONG_TIMEOUT_S, call
from millrace.values import to_timestamp
from millrace.view import table

F = TypeVar("F", bound=Callable[..., Any])
TIME = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"])


def _since_until(function: F) -> F:
    function = click.option("--until", type=TIME, help="Before this time (UTC).")(function)
    return click.option("--since", type=TIME, help="From this time on (UTC).")(function)


def _choice(function: F) -> F:
    """The options that choose dead letters."""
    function = _since_until(function)
    for name, text in (
        ("--source", "The producer."),
        ("--column", "Column or rule."),
        ("--reason", "For example OUT_OF_RANGE."),
    ):
        function = click.option(name, default="", help=text)(function)
    return click.argument("contract")(function)


def _times(since: datetime | None, until: datetime | None) -> dict[str, Any]:
    given = {"since": since, "until": until}
    return {name: to_timestamp(at.replace(tzinfo=UTC)) for name, at in given.items() if at is not None}


def _at(stamp: Timestamp) -> str:
    return stamp.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")


@click.command()
@click.argument("contract")
@_since_until
@click.option("--table-version", type=click.IntRange(0), default=0, help="Only what was seen around this version.")
@click.pass_obj
def quality(
    context: Context, contract: str, since: datetime | None, until: datetime | None, table_version: int
) -> None:
    """Show figures per column, and failures per check, of what landed."""
    request = pb.GetQualityRequest(
        contract=contract, table_version=table_version, max_buckets=1000, merge=True, **_times(since, until)
    )
    with context.client() as client:
        buckets = call(client.ingestion.stub.GetQuality, request).buckets
    for bucket in buckets:
        versions = f"versions {bucket.first_table_version} to {bucket.last_table_version}"
        click.echo(f"{bucket.rows} records in {bucket.batches} batches, {versions}", err=True)
        rows = [
            (
                c.column,
                str(c.values),
                f"{c.nulls / (c.values + c.nulls):.2%}" if c.values + c.nulls else "-",
                *(f"{getattr(c, name):g}" if c.HasField(name) else "-" for name in ("min", "mean", "max")),
                f"{c.distinct:.0f} of {c.sampled}",
            )
            for c in bucket.columns
        ]
        click.echo(table(("COLUMN", "VALUES", "NULLS", "MIN", "MEAN", "MAX", "DISTINCT"), rows))
        failures = [(f.subject or "-", f.check, _policy(f.policy), str(f.count)) for f in bucket.failures]
        if failures:
            click.echo(table(("FAILED", "CHECK", "POLICY", "RECORDS"), failures))


def _policy(value: int) -> str:
    return pb.CheckPolicy.Name(value).removeprefix("CHECK_POLICY_").lower()  # type: ignore[arg-type]


@click.group()
def letters() -> None:
    """Look at refused records, send them again, or discard them."""


@letters.command("list")
@_choice
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="The oldest so many.")
@click.pass_obj
def list_letters(
    context: Context, /, contract: str, since: datetime | None, until: datetime | None, limit: int, **chosen: Any
) -> None:
    """List refused records with why and where they came from."""
    request = pb.ListDeadLettersRequest(contract=contract, page_size=limit, **chosen, **_times(since, until))
    with context.client() as client:
        found = call(client.ingestion.stub.ListDeadLetters, request).dead_letters
    rows = [
        (
            str(x.id),
            x.reason,
            x.column or "-",
            _place(x),
            _at(x.received_at),
            x.record_json or f"{len(x.origin.value)} bytes",
        )
        for x in found
    ]
    click.echo(table(("ID", "REASON", "COLUMN", "FROM", "RECEIVED", "RECORD"), rows))


def _place(letter: pb.DeadLetter) -> str:
    origin = letter.origin
    return f"{origin.topic}/{origin.partition}/{origin.offset}" if origin.topic else f"{letter.source}/{letter.offset}"


@letters.command()
@_choice
@click.option("--limit", type=click.IntRange(0), default=0, help="The oldest so many; all without.")
@click.option("--dry-run", is_flag=True, help="Only say how many would pass.")
@click.pass_obj
def replay(
    context: Context,
    /,
    contract: str,
    since: datetime | None,
    until: datetime | None,
    *,
    limit: int,
    dry_run: bool,
    **chosen: Any,
) -> None:
    """Send refused records through the present contract again; each lands at most once."""
    request = pb.ReplayDeadLettersRequest(
        contract=contract, limit=limit, dry_run=dry_run, **chosen, **_times(since, until)
    )
    with context.client() as client:
        answer = call(client.ingestion.stub.ReplayDeadLetters, request, LONG_TIMEOUT_S)
    click.echo(f"{answer.replayed} {'would pass' if dry_run else 'landed'}, {answer.still_rejected} refused")


@letters.command("discard")
@_choice
@click.option("--limit", type=click.IntRange(0), default=0, help="The oldest so many; all without.")
@click.confirmation_option(prompt="Remove these records for good?")
@click.pass_obj
def discard_letters(
    context: Context, /, contract: str, since: datetime | None, until: datetime | None, limit: int, **chosen: Any
) -> None:
    """Remove refused records for good."""
    request = pb.DiscardDeadLettersRequest(contract=contract, limit=limit, **chosen, **_times(since, until))
    with context.client() as client:
        answer = call(client.ingestion.stub.DiscardDeadLetters, request, LONG_TIMEOUT_S)
    click.echo(f"{answer.discarded} removed")


@click.group()
def quarantine() -> None:
    """Look at batches that a check holds, release or discard them."""


@quarantine.command("list")
@click.argument("contract")
@click.option("--all", "settled", is_flag=True, help="Also those that were released or discarded.")
@click.pass_obj
def list_quarantine(context: Context, contract: str, settled: bool) -> None:
    """List held batches and why."""
    request = pb.ListQuarantineRequest(contract=contract, settled=settled, page_size=1000)
    with context.client() as client:
        found = call(client.ingestion.stub.ListQuarantine, request).batches
    rows = [
        (
            str(b.id),
            f"{b.source}/{b.offset}",
            str(b.rows),
            "released" if b.released else "discarded" if b.discarded else "held",
            b.column or "-",
            b.detail,
        )
        for b in found
    ]
    click.echo(table(("ID", "FROM", "RECORDS", "STATE", "CHECK", "WHY"), rows))


@quarantine.command()
@click.argument("contract")
@click.argument("ids", type=int, nargs=-1)
@click.pass_obj
def release(context: Context, contract: str, ids: tuple[int, ...]) -> None:
    """Land held batches, all of them without ids."""
    with context.client() as client:
        request = pb.ReleaseQuarantineRequest(contract=contract, ids=ids)
        done = call(client.ingestion.stub.ReleaseQuarantine, request, LONG_TIMEOUT_S)
    click.echo(
        f"{done.batches} batches released: {done.accepted} landed, {done.duplicates} duplicates, {done.rejected} refused"
    )


@quarantine.command()
@click.argument("contract")
@click.argument("ids", type=int, nargs=-1, required=True)
@click.pass_obj
def discard(context: Context, contract: str, ids: tuple[int, ...]) -> None:
    """Give up held batches."""
    with context.client() as client:
        request = pb.DiscardQuarantineRequest(contract=contract, ids=ids)
        done = call(client.ingestion.stub.DiscardQuarantine, request)
    click.echo(f"{done.batches} batches discarded")


@click.group("table-versions")
def table_versions() -> None:
    """Look at the versions of a contract's table, and keep some from being vacuumed."""


@table_versions.command("list")
@click.argument("contract")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="The newest so many.")
@click.pass_obj
def list_versions(context: Context, contract: str, limit: int) -> None:
    """List versions, newest first."""
    with context.client() as client:
        request = pb.ListTableVersionsRequest(contract=contract, page_size=limit)
        found = call(client.ingestion.stub.ListTableVersions, request).versions
    rows = [
        (
            str(v.version),
            _at(v.committed_at),
            v.operation,
            str(v.added_rows),
            ", ".join(pin.owner for pin in v.pins) or "-",
        )
        for v in found
    ]
    click.echo(table(("VERSION", "COMMITTED", "OPERATION", "RECORDS", "PINNED BY"), rows))


@table_versions.command()
@click.argument("contract")
@click.argument("version", type=click.IntRange(0), required=False)
@click.option("--owner", required=True, help="Who needs it.")
@click.option("--expires", type=TIME, help="Until this time (UTC); without it until it is unpinned.")
@click.pass_obj
def pin(context: Context, contract: str, version: int | None, owner: str, expires: datetime | None) -> None:
    """Keep a version, the newest without one."""
    request = pb.PinTableVersionRequest(contract=contract, version=version, owner=owner)
    if expires is not None:
        request.expires_at.CopyFrom(to_timestamp(expires.replace(tzinfo=UTC)))
    with context.client() as client:
        kept = call(client.ingestion.stub.PinTableVersion, request).pin
    click.echo(f"table/{contract} version {kept.version} pinned by {kept.owner}")


@table_versions.command()
@click.argument("contract")
@click.argument("version", type=click.IntRange(0), required=False)
@click.option("--owner", required=True, help="Whose pin.")
@click.pass_obj
def unpin(context: Context, contract: str, version: int | None, owner: str) -> None:
    """Let a version go, all of the owner's without one."""
    with context.client() as client:
        request = pb.UnpinTableVersionRequest(contract=contract, version=version, owner=owner)
        removed = call(client.ingestion.stub.UnpinTableVersion, request).removed
    click.echo(f"{removed} pins removed")


COMMANDS = (quality, letters, quarantine, table_versions)
