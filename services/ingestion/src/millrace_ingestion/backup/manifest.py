"""What a backup consists of. Everything it names is content in a content-addressed store, and so is the manifest itself.

A backup's folder holds `sha256/…` (content of all its backups, each kept once) and `backups/<id>`, whose text is the manifest's digest.
"""

from typing import Any

import msgspec
from millrace_kit.content import ContentStore, open_files
from millrace_kit.errors import DataLossError, NotFoundError

FORMAT = 1


class File(msgspec.Struct, frozen=True):
    """One file of a table's folder."""

    path: str
    """Below the table's folder."""
    sha256: str
    size: int


class Table(msgspec.Struct, frozen=True):
    """One Delta table at one version."""

    name: str
    id: str
    """Delta's identity of the table."""
    version: int
    data: list[File]
    """Files of this version, and of the versions before it that were there to be copied."""
    log: list[File]
    """Log entries and checkpoints up to the version, oldest first."""


class Rows(msgspec.Struct, frozen=True):
    """One table of the database."""

    name: str
    columns: list[str]
    chunks: list[str]
    """Digests of msgpack lists of rows, in the order of the primary key."""
    rows: int


class Manifest(msgspec.Struct, frozen=True):
    """A backup."""

    id: str
    """Sorts by time."""
    created_at: str
    """RFC 3339, UTC."""
    revision: str
    """Alembic revision of the database."""
    tables: list[Table]
    database: list[Rows]
    format: int = FORMAT


class Backups:
    """The backups of one folder.

    Args:
        url: fsspec URL; credentials of object storage come from the AWS_* variables.
    """

    def __init__(self, url: str) -> None:
        self.content = ContentStore(url)
        self._fs: Any
        self._fs, root = open_files(url.rstrip("/"))
        self._folder = f"{root}/backups"

    def ids(self) -> list[str]:
        """Every complete backup, oldest first."""
        try:
            names = self._fs.ls(self._folder, detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(name).rsplit("/", 1)[-1] for name in names)

    def read(self, backup_id: str = "") -> Manifest:
        """A backup's manifest, of the newest without an id.

        Raises:
            NotFoundError: there is no such backup.
            DataLossError: the manifest is not what its digest says, or of a later format.
        """
        ids = self.ids()
        wanted = backup_id or (ids[-1] if ids else "")
        if wanted not in ids:
            raise NotFoundError("backup", backup_id or "(newest)")
        digest = self._fs.cat_file(f"{self._folder}/{wanted}").decode().strip()
        manifest = msgspec.json.decode(self.content.read(digest), type=Manifest)
        if manifest.format != FORMAT:
            message = f"backup {wanted} has format {manifest.format}, this program reads {FORMAT}"
            raise DataLossError("BACKUP_FORMAT", message, {"backup": wanted, "format": str(manifest.format)})
        return manifest

    def write(self, manifest: Manifest) -> str:
        """Keep a manifest, after everything it names; returns its digest."""
        digest = self.content.put_bytes(msgspec.json.encode(manifest))
        self._fs.makedirs(self._folder, exist_ok=True)
        self._fs.pipe_file(f"{self._folder}/{manifest.id}", digest.encode())
        return digest
