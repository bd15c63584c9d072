"""`millrace ingest`: write, load, sources."""

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import click
import yaml
from google.protobuf.json_format import MessageToDict
from millrace_api.ingestion.v1 import ingestion_pb2
from millrace_api.ingestion.v1 import sources_pb2 as pb
from millrace_kit.errors import MillraceError
from millrace_kit.record_files import FORMATS, RecordFile, find_files
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from millrace.areas.sources import load_source
from millrace.cli.local import INTERRUPTED, Context
from millrace.loading import LIMITS, MAX_FILES, columns_of, load_file
from millrace.view import age, table

KINDS = {"kafka": "topics", "files": "files", "join": "join"}
COLUMNS = ("NAME", "KIND", "CONTRACT", "STATE", "LAG", "ACCEPTED", "REJECTED", "LAST RUN", "NEXT RUN")


@click.group()
def ingest() -> None:
    """Bring records in: write, load files, and let ingestion read topics and files by itself."""


@ingest.command()
@click.argument("contract")
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--source", default="cli", show_default=True, help="Name of this producer; its batches land in order.")
@click.option("--batch-records", type=click.IntRange(1, 100_000), default=10_000, show_default=True)
@click.pass_obj
def write(context: Context, contract: str, file: BinaryIO, source: str, batch_records: int) -> None:
    """Write JSON lines from FILE (standard input without one) to CONTRACT."""
    accepted = duplicates = rejected = 0
    with context.client() as client:
        offset = client.sources.position(contract, source)
        for lines in _batches(file, batch_records):
            offset += 1
            batch = ingestion_pb2.RecordBatch(contract=contract, source=source, offset=offset, json_lines=lines)
            answer = client.ingestion.write(batch)
            accepted, duplicates = accepted + answer.accepted, duplicates + answer.duplicates
            rejected += answer.rejected
    click.echo(f"{accepted} accepted, {duplicates} duplicates, {rejected} rejected")
    _hint(contract, rejected)


def _batches(file: BinaryIO, records: int) -> Iterator[bytes]:
    lines: list[bytes] = []
    size = 0
    for line in file:
        if line.strip():
            lines.append(line.rstrip(b"\n"))
            size += len(line)
        if len(lines) >= records or size >= LIMITS.bytes:
            yield b"\n".join(lines)
            lines, size = [], 0
    if lines:
        yield b"\n".join(lines)


def _hint(contract: str, rejected: int) -> None:
    if rejected:
        click.echo(f"next: millrace dead-letters {contract}", err=True)


@ingest.command()
@click.argument("contract")
@click.argument("paths", nargs=-1, required=True)
@click.option("--format", "kind", type=click.Choice(FORMATS), default=None, help="By the name's ending without it.")
@click.pass_obj
def load(context: Context, contract: str, paths: tuple[str, ...], kind: str | None) -> None:
    """Load files, folders, globs or s3:// URLs (Parquet, CSV, JSON lines) into CONTRACT.

    A load that was interrupted goes on where it was when it is run again; a file that landed is not sent again.
    """
    failed = rejected = 0
    try:
        files = [file for path in paths for file in _find(path, kind or "")]
        console = Console(stderr=True)
        with context.client() as client, _bar(console) as bar:
            columns = columns_of(client, contract)
            whole = bar.add_task("all files", total=sum(file.size for file in files))
            before = 0
            for file in files:
                bar.update(whole, description=file.url.rpartition("/")[2])

                def report(_answer: ingestion_pb2.WriteResponse, read: int, before: int = before) -> None:
                    bar.update(whole, completed=before + read)

                try:
                    loaded = load_file(client, contract, file, columns, report=report)
                except (MillraceError, OSError) as error:
                    if isinstance(error, MillraceError) and error.reason != "UNREADABLE_FILE":
                        raise
                    failed += 1
                    click.echo(f"millrace: {error}", err=True)
                else:
                    rejected += loaded.rejected
                    landed = f", {loaded.skipped} had landed before" if loaded.skipped else ""
                    held = f", {loaded.quarantined} in quarantine" if loaded.quarantined else ""
                    click.echo(
                        f"{file.url}: {loaded.accepted} accepted, {loaded.duplicates} duplicates, {loaded.rejected} rejected{held}{landed}"
                    )
                before += file.size
                bar.update(whole, completed=before)
    except KeyboardInterrupt:
        click.echo("millrace: interrupted; run the same command again and it goes on where it was", err=True)
        sys.exit(INTERRUPTED)
    _hint(contract, rejected)
    if failed:
        sys.exit(1)


def _find(path: str, kind: str) -> list[RecordFile]:
    """The files of one argument; none is an error."""
    try:
        files = find_files(path if "://" in path else str(Path(path).absolute()), kind, limit=MAX_FILES)
    except FileNotFoundError:
        files = []
    except OSError as error:
        raise click.ClickException(f"{path}: {error}") from None
    if not files:
        raise click.ClickException(f"{path}: there is no such file of records")
    return files


def _bar(console: Console) -> Progress:
    """Bytes of all files; drawn on a terminal only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@ingest.group()
def sources() -> None:
    """What ingestion reads by itself: topics of others, files, and joins of two contracts."""


@sources.command()
@click.option(
    "-f", "--filename", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
    help="The source (YAML), see docs/how-to/ingest.md and join-streams.md.",
)  # fmt: skip
@click.pass_obj
def add(context: Context, filename: Path) -> None:
    """Register a source, or a new version of it; it starts at once."""
    with context.client() as client:
        answer = client.sources.register(load_source(filename))
    what = "registered" if answer.created else "unchanged"
    click.echo(f"source/{answer.source.name} {what} (version {answer.source.version})")
    click.echo(f"next: millrace ingest sources list {answer.source.name}", err=True)


@sources.command("list")
@click.argument("name", required=False, default="")
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table", show_default=True)
@click.pass_obj
def list_sources(context: Context, name: str, output: str) -> None:
    """List sources with their state and lag; with NAME also its partitions, inputs, trouble and last look."""
    with context.client() as client:
        found = client.sources.list(name)
    if output != "table":
        data = [MessageToDict(one) for one in found]
        text = json.dumps(data, indent=2) if output == "json" else yaml.safe_dump(data, sort_keys=False)
        click.echo(text, nl=output == "json")
        return
    click.echo(table(COLUMNS, [source_row(one, datetime.now(tz=UTC)) for one in found]))
    for one in found:
        if one.status.error:
            click.echo(f"{one.source.name}: {one.status.error}", err=True)
    if name and found:
        _describe(found[0].status)


def source_row(one: pb.SourceWithStatus, now: datetime) -> tuple[str, ...]:
    """One row in the order of `COLUMNS`."""
    status = one.status
    kind = one.source.WhichOneof("kind")
    next_run = status.next_run.ToDatetime(UTC) if status.HasField("next_run") else None
    return (
        one.source.name,
        KINDS.get(kind or "", "-"),
        one.source.contract,
        pb.SourceState.Name(status.state).removeprefix("SOURCE_STATE_").capitalize(),
        "-" if kind == "files" else str(status.lag),
        str(status.accepted),
        str(status.rejected),
        age(status.last_run.ToJsonString(), now) if status.HasField("last_run") else "-",
        f"in {max(0, round((next_run - now).total_seconds()))}s" if next_run is not None else "-",
    )


def _describe(status: pb.SourceStatus) -> None:
    if status.partitions:
        rows = [
            (f"{one.topic}-{one.partition}", str(one.position), str(one.end), str(one.end - one.position))
            for one in status.partitions
        ]
        click.echo("\n" + table(("PARTITION", "POSITION", "END", "LAG"), rows))
    if status.last_result:
        click.echo(f"\nlast look: {status.last_result}")
    if status.HasField("join"):
        _describe_join(status.join)


def _describe_join(join: pb.JoinStatus) -> None:
    rows = [
        (
            name,
            one.contract,
            str(one.version),
            str(one.newest_version),
            one.event_time.ToJsonString() if one.HasField("event_time") else "-",
        )
        for name, one in (("left", join.left), ("right", join.right))
    ]
    click.echo("\n" + table(("INPUT", "CONTRACT", "JOINED VERSION", "NEWEST", "EVENT TIME"), rows))
    settled = join.settled.ToJsonString() if join.HasField("settled") else "-"
    click.echo(f"\n{join.matched} matched, {join.unmatched} unmatched, {join.late} late; settled: {settled}")


@sources.command()
@click.argument("name")
@click.pass_obj
def pause(context: Context, name: str) -> None:
    """Stop reading a source until it is resumed."""
    with context.client() as client:
        client.sources.pause(name)
    click.echo(f"source/{name} paused")


@sources.command()
@click.argument("name")
@click.pass_obj
def resume(context: Context, name: str) -> None:
    """Read a source on; what failed is tried again."""
    with context.client() as client:
        client.sources.resume(name)
    click.echo(f"source/{name} resumed")


@sources.command()
@click.argument("name")
@click.pass_obj
def run(context: Context, name: str) -> None:
    """Look for new files now."""
    with context.client() as client:
        client.sources.run(name)
    click.echo(f"source/{name} looks for new files")
    click.echo(f"next: millrace ingest sources list {name}", err=True)


@sources.command()
@click.argument("name")
@click.pass_obj
def remove(context: Context, name: str) -> None:
    """Forget a source. What it landed stays; registered again under this name it goes on where it was."""
    with context.client() as client:
        client.sources.remove(name)
    click.echo(f"source/{name} removed")


COMMANDS = (ingest,)
