"""A Delta table's files as content, and back.

Data files and log entries never change once they are written, so what the backup before this one has of the same table is not read again.
"""

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError
from millrace_kit.content import CHUNK_BYTES, ContentStore, open_files
from millrace_kit.errors import DataLossError, FailedPreconditionError

from millrace_ingestion.backup.manifest import File, Table

PARALLEL = 8
"""Files that are copied at once."""
_LOG = "_delta_log"
_ENTRY = re.compile(r"(?P<version>[0-9]{20})\.(json|checkpoint(\.[0-9]+\.[0-9]+)?\.parquet)")


class LakeFiles:
    """The tables below one lake's URL.

    Args:
        url: the lake; object storage takes its credentials from the AWS_* variables.
        options: of delta-rs.
        content: where files are kept.
    """

    def __init__(self, url: str, options: Mapping[str, str], content: ContentStore) -> None:
        self._url = url
        self._options = dict(options) or None
        self._content = content
        self._fs: Any
        self._fs, self._root = open_files(url)

    def version(self, name: str) -> int | None:
        """Newest version of a table; None when it is not there."""
        try:
            return int(DeltaTable(f"{self._url}/{name}", storage_options=self._options).version())
        except TableNotFoundError:
            return None

    def store(self, name: str, version: int, before: Table | None) -> Table:
        """Keep a table as it was at a version, with the versions before it whose files are still there.

        Raises:
            DataLossError: a file of this version is not there.
        """
        table = DeltaTable(f"{self._url}/{name}", version=version, storage_options=self._options)
        identity = str(table.metadata().id)
        known = before if before is not None and before.id == identity and before.version <= version else None
        log_known = {file.path: file for file in known.log} if known else {}
        entries = sorted(path for path in self._entries(name) if int(path[len(_LOG) + 1 :][:20]) <= version)
        with ThreadPoolExecutor(PARALLEL) as pool:
            log = list(pool.map(lambda path: log_known.get(path) or self._keep(name, path), entries))
            if None in log:
                raise _lost(name, version, "an entry of the log")
            fresh = [file for file in log if file is not None and file.path not in log_known]
            added = pool.map(lambda file: _added(self._content.read(file.sha256)), _json(fresh))
            older = {path for paths in added for path in paths}
            present = {unquote(str(path)) for path in table.get_add_actions(flatten=True)["path"].to_pylist()}
            data_known = {file.path: file for file in known.data} if known else {}
            wanted = sorted(older | present | set(data_known))
            data = list(pool.map(lambda path: data_known.get(path) or self._keep(name, path), wanted))
        found = {file.path: file for file in data if file is not None}
        if not present <= set(found):
            raise _lost(name, version, min(present - set(found)))
        return Table(name, identity, version, list(found.values()), [file for file in log if file is not None])

    def _entries(self, name: str) -> Iterable[str]:
        for path in self._fs.ls(f"{self._root}/{name}/{_LOG}", detail=False):
            base = str(path).rsplit("/", 1)[-1]
            if _ENTRY.fullmatch(base):
                yield f"{_LOG}/{base}"

    def _keep(self, name: str, path: str) -> File | None:
        """Copy one file; None when it is not there (any more)."""
        try:
            source = self._fs.open(f"{self._root}/{name}/{path}", "rb")
        except FileNotFoundError:
            return None
        with source, self._content.write() as writer:
            while chunk := source.read(CHUNK_BYTES):
                writer.add(chunk)
            digest = writer.sha256
            if not self._content.has(digest):
                writer.keep(digest)
            return File(path, digest, writer.size_bytes)

    def check_free(self, table: Table) -> None:
        """Refuse a table's folder that holds other files than the backup's.

        Raises:
            FailedPreconditionError: naming one of them.
        """
        folder = f"{self._root}/{table.name}"
        expected = {file.path for file in (*table.data, *table.log)}
        try:
            found = [str(path) for path in self._fs.find(folder)]
        except FileNotFoundError:
            return
        start = len(str(self._fs._strip_protocol(folder))) + 1  # noqa: SLF001 - the only way to a path's plain form
        for path in found:
            if path[start:] not in expected:
                message = f"{self._url}/{table.name} has {path[start:]}, which is not of the backup: restore into an empty place"
                raise FailedPreconditionError("LAKE_NOT_EMPTY", message, {"table": table.name, "file": path[start:]})

    def restore(self, table: Table) -> int:
        """Write a table's files, data before the log and the log in its order; returns how many bytes.

        What an attempt before this one has written whole is left as it is.
        """
        with ThreadPoolExecutor(PARALLEL) as pool:
            size = sum(pool.map(lambda file: self._put(table.name, file), table.data))
        return size + sum(self._put(table.name, file) for file in table.log)

    def _put(self, name: str, file: File) -> int:
        target = f"{self._root}/{name}/{file.path}"
        self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        # The last chunk comes only when the digest is proved; a file that is cut short is written again by the next attempt.
        with self._fs.open(target, "wb") as sink:
            for chunk in self._content.chunks(file.sha256):
                sink.write(chunk)
        return file.size


def _json(files: Iterable[File]) -> Iterable[File]:
    return [file for file in files if file.path.endswith(".json")]


def _added(entry: bytes) -> list[str]:
    actions = (json.loads(line) for line in entry.splitlines())
    return [unquote(str(action["add"]["path"])) for action in actions if "add" in action]


def _lost(name: str, version: int, path: str) -> DataLossError:
    metadata = {"table": name, "version": str(version), "file": path}
    return DataLossError("LAKE_FILE_MISSING", f"version {version} of table {name!r} lacks {path}", metadata)
