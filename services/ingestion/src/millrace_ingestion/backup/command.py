"""`millrace-ingestion backup|restore|verify|backups`: the command line of backups."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from millrace_kit.clock import SystemClock
from millrace_kit.content import lake_options
from millrace_kit.errors import MillraceError
from millrace_kit.settings import SettingsError, load_settings
from millrace_kit.sql import migrate, open_engine

from millrace_ingestion.backup.manifest import Backups, Manifest
from millrace_ingestion.backup.operations import Place, back_up, restore, verify
from millrace_ingestion.settings import IngestionSettings

COMMANDS = ("backup", "restore", "verify", "backups")
MIGRATIONS = Path(__file__).parents[1] / "migrations"


def run(arguments: Sequence[str]) -> int:
    """Run one of `COMMANDS`; returns the exit code: 0 done, 1 failed, 2 usage."""
    options = _parser().parse_args(arguments)
    try:
        backups = Backups(options.url)
        match options.command:
            case "backup" | "restore":
                place = _place(load_settings(IngestionSettings, options.config))
                try:
                    _change(options, place, backups)
                finally:
                    place.engine.dispose()
            case "verify":
                print(f"verified {_described(verify(backups, options.backup))}")
            case _:
                print("\n".join(backups.ids()))
    except SettingsError as error:
        print(f"millrace-ingestion: {error}", file=sys.stderr)
        return 2
    except (MillraceError, OSError) as error:
        print(f"millrace-ingestion: {options.command} failed: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="millrace-ingestion")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, flag, text in (
        ("backup", "--to", "keep lake and database; the service may run"),
        ("restore", "--from", "put a backup into an empty lake and database; the service must not run"),
        ("verify", "--from", "read a backup and compare every digest"),
        ("backups", "--from", "list backups, oldest first"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(flag, dest="url", required=True, help="folder of the backups (path or URL)")
        if name in {"backup", "restore"}:
            command.add_argument("--config", required=True, help="settings file of the service (YAML)")
        if name in {"restore", "verify"}:
            command.add_argument("--backup", default="", help="id of the backup; the newest without")
    return parser


def _place(settings: IngestionSettings) -> Place:
    options = lake_options(settings.lake(), settings.lake_options)
    folder = Path(settings.state_dir) / "event-ids"
    return Place(open_engine(settings.database()), settings.lake(), options, folder)


def _change(options: argparse.Namespace, place: Place, backups: Backups) -> None:
    if options.command == "backup":
        print(f"kept {_described(back_up(place, backups, SystemClock()))}")
        return
    migrate(place.engine, MIGRATIONS)
    print(f"restored {_described(restore(place, backups, options.backup))}")


def _described(manifest: Manifest) -> str:
    size = sum(file.size for table in manifest.tables for file in (*table.data, *table.log))
    rows = sum(rows.rows for rows in manifest.database)
    return f"{manifest.id}: {len(manifest.tables)} tables ({size / 2**20:.1f} MiB), {rows} database rows"
