"""A content-addressed file store: the address is the SHA-256, and every read checks it.

Readers and writers use any fsspec URL (`file:///…`, `s3://…`, `memory://…`). Two services own such a store (registry: model
artifacts; feature: training sets) and publish its URL; everybody else reads through this module, so nothing is loaded unchecked.
A store that does not answer raises OSError, whatever library speaks to it, within about half a minute on S3.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import fsspec

from millrace_kit.errors import DataLossError, NotFoundError

CHUNK_BYTES = 1 << 20
S3_CONNECT_TIMEOUT_S = 3
S3_READ_TIMEOUT_S = 15
# Tries of one request by botocore; s3fs tries the whole call a few times more.
S3_ATTEMPTS = 2

# delta-rs's own defaults try for three minutes.
_DELTA_DEADLINES = {"connect_timeout": "3s", "timeout": "30s", "max_retries": "4", "retry_timeout": "30s"}


def open_files(url: str) -> tuple[Any, str]:
    """The file system of an fsspec URL, and the path on it.

    S3 takes credentials, region and endpoint from the AWS_* variables, as delta-rs does. Directory listings are not cached: others write.
    """
    if url.partition("://")[0] not in {"s3", "s3a"}:
        fs, path = fsspec.core.url_to_fs(url)
        return fs, path
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    fs, path = fsspec.core.url_to_fs(
        url,
        endpoint_url=endpoint,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": S3_CONNECT_TIMEOUT_S,
            "read_timeout": S3_READ_TIMEOUT_S,
            "retries": {"total_max_attempts": S3_ATTEMPTS, "mode": "standard"},
        },
    )
    return fs, path


def lake_options(url: str, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Options that delta-rs is given for a table below `url`: deadlines on object storage, unless `given` says otherwise.

    Credentials, region and endpoint come from the AWS_* variables. Commits to S3 are conditional puts (If-None-Match), so that of two
    writers one fails; no lock table is needed.
    """
    if url.partition("://")[0] not in {"s3", "s3a"}:
        return dict(given or {})
    return {**_DELTA_DEADLINES, **(given or {})}


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Errors of botocore's own kind as the OSError every file system raises; s3fs passes some through."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] in {"botocore", "aiobotocore"}:
            raise OSError(f"the store did not answer: {type(error).__name__}: {error}") from error
        raise


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(root: Path) -> str:
    """Hex SHA-256 over the sorted "path sha256" lines of every file below `root`; byte code and hidden files do not count."""
    lines = []
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.is_file() and not any(p.startswith(".") or p == "__pycache__" for p in relative.parts):
            lines.append(f"{relative.as_posix()} {sha256_file(path)}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class ContentStore:
    """Files under `<url>/sha256/<first two digits>/<digest>`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = open_files(self.url)

    def _path(self, sha256: str) -> str:
        return f"{self._root}/sha256/{sha256[:2]}/{sha256}"

    def has(self, sha256: str) -> bool:
        """Whether the content is there."""
        with _as_os_error():
            return bool(self._fs.exists(self._path(sha256)))

    def put_file(self, path: Path) -> str:
        """Store a local file; returns its digest. Storing again is free."""
        digest = sha256_file(path)
        if not self.has(digest):
            with path.open("rb") as source, self.write() as writer:
                while chunk := source.read(CHUNK_BYTES):
                    writer.add(chunk)
                writer.keep(digest)
        return digest

    def put_bytes(self, content: bytes) -> str:
        """Store bytes; returns their digest."""
        digest = hashlib.sha256(content).hexdigest()
        if not self.has(digest):
            with self.write() as writer:
                writer.add(content)
                writer.keep(digest)
        return digest

    def write(self) -> "ContentWriter":
        """A writer for content that comes in pieces; what is not kept at the end of its `with` block is gone."""
        return ContentWriter(self._fs, f"{self._root}/incoming/{uuid4().hex}", self._path)

    def size(self, sha256: str) -> int:
        """Length of the content in bytes, as stored.

        Raises:
            NotFoundError: nothing has this digest.
        """
        try:
            with _as_os_error():
                return int(self._fs.size(self._path(sha256)))
        except FileNotFoundError:
            raise NotFoundError("artifact", sha256) from None

    def remove(self, sha256: str) -> None:
        """Remove the content; what is not there is no error. For stores whose owner knows that nobody reads it any more."""
        with _as_os_error(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(sha256))

    def verify(self, sha256: str) -> None:
        """Read everything and compare.

        Raises:
            NotFoundError: nothing has this digest.
            DataLossError: the stored bytes do not have the digest they stand under.
        """
        for _chunk in self.chunks(sha256):
            pass

    def sweep(self, *, older_than: datetime) -> int:
        """Remove what writers that were killed left before `older_than`; returns how many."""
        removed = 0
        try:
            with _as_os_error():
                names = self._fs.ls(f"{self._root}/incoming", detail=False)
        except FileNotFoundError:
            return 0
        for name in names:
            with _as_os_error(), contextlib.suppress(FileNotFoundError):  # its writer was still there and has finished
                changed: datetime = self._fs.modified(name)
                if changed.replace(tzinfo=changed.tzinfo or UTC) < older_than:
                    self._fs.rm_file(name)
                    removed += 1
        return removed

    def chunks(self, sha256: str) -> Iterator[bytes]:
        """The content in chunks of at most 1 MiB; the last one is held back until the digest is proved.

        Raises:
            NotFoundError: nothing has this digest.
            DataLossError: the stored bytes do not have the digest they stand under.
        """
        digest = hashlib.sha256()
        held = b""
        try:
            with _as_os_error():
                file = self._fs.open(self._path(sha256), "rb")
        except FileNotFoundError:
            raise NotFoundError("artifact", sha256) from None

        def read() -> bytes:
            with _as_os_error():
                chunk: bytes = file.read(CHUNK_BYTES)
            return chunk

        with file:
            while chunk := read():
                digest.update(chunk)
                if held:
                    yield held
                held = chunk
        if digest.hexdigest() != sha256:
            message = (
                f"artifact {sha256} holds other content ({digest.hexdigest()}); it was changed after it was stored"
            )
            raise DataLossError("DIGEST_MISMATCH", message, {"sha256": sha256, "found": digest.hexdigest()})
        if held:
            yield held

    def read(self, sha256: str) -> bytes:
        """The whole content, checked."""
        return b"".join(self.chunks(sha256))

    def fetch(self, sha256: str, target: Path) -> Path:
        """Write the checked content to `target`, whole or not at all."""
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{uuid4().hex}")
        try:
            with scratch.open("wb") as file:
                for chunk in self.chunks(sha256):
                    file.write(chunk)
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)
        return target


class ContentWriter:
    """Writes to a scratch file beside the content and moves it to its address once its digest is proved."""

    def __init__(self, fs: Any, scratch: str, address: Callable[[str], str]) -> None:
        self._fs = fs
        self._scratch = scratch
        self._address = address
        self._digest = hashlib.sha256()
        self._kept = False
        self.size_bytes = 0
        """Bytes added so far."""
        with _as_os_error():
            self._fs.makedirs(os.path.dirname(scratch), exist_ok=True)  # noqa: PTH120 - an fsspec path
            self._file = self._fs.open(scratch, "wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        with _as_os_error():
            self._file.close()
            if not self._kept:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(self._scratch)

    def add(self, chunk: bytes) -> None:
        """Append `chunk`."""
        with _as_os_error():
            self._file.write(chunk)
        self._digest.update(chunk)
        self.size_bytes += len(chunk)

    @property
    def sha256(self) -> str:
        """Digest of what was added so far."""
        return self._digest.hexdigest()

    def keep(self, sha256: str) -> None:
        """Put the content under its address, replacing what is there.

        Raises:
            DataLossError: what was added does not have this digest; nothing is stored.
        """
        found = self.sha256
        if found != sha256:
            message = f"the content has digest {found}, not {sha256}"
            raise DataLossError("DIGEST_MISMATCH", message, {"sha256": sha256, "found": found})
        with _as_os_error():
            self._move(self._address(sha256))
        self._kept = True

    def _move(self, target: str) -> None:
        self._file.flush()
        with contextlib.suppress(AttributeError, OSError):  # only local files can be synced
            os.fsync(self._file.fileno())
        self._file.close()
        self._fs.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH120 - an fsspec path
        # A rename, or on object storage a copy that appears whole, so that a reader never sees half a file.
        self._fs.mv(self._scratch, target)
