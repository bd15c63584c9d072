"""Code trees: archives unpacked safely into folders named by their content.

Only regular files count. Hidden files and byte code are left out, as they are from the hash, so that one hash means one tree.
"""

import gzip
import io
import logging
import shutil
import stat
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NoReturn
from uuid import uuid4

from millrace_kit.content import ContentStore, sha256_tree
from millrace_kit.errors import InvalidArgumentError

log = logging.getLogger(__name__)

FIELD = "code_tar_gz"
MAX_ARCHIVE_BYTES = 16 << 20
MAX_FILES = 10_000
MAX_DEPTH = 32
CHUNK_BYTES = 1 << 20


def _refuse(problem: str) -> NoReturn:
    raise InvalidArgumentError(FIELD, problem)


def unpack(archive: bytes, target: Path, limit_bytes: int) -> None:
    """Unpack a gzip-compressed tar into the new folder `target`.

    Raises:
        InvalidArgumentError: not such an archive, empty, too large, or with an entry that is neither folder nor regular file or
            that points outside.
    """
    if not archive:
        _refuse("must not be empty")
    if len(archive) > MAX_ARCHIVE_BYTES:
        _refuse(f"is larger than {MAX_ARCHIVE_BYTES >> 20} MiB")
    content = _decompress(archive, limit_bytes)
    target.mkdir(parents=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            count = sum(_unpack_member(tar, member, target, number) for number, member in enumerate(tar))
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        _refuse(f"is not a tar archive: {error}")
    except OSError as error:
        _refuse(f"cannot be unpacked: {error.strerror}")
    if count == 0:
        _refuse("holds no files")


def _decompress(archive: bytes, limit_bytes: int) -> bytes:
    """The tar inside; reading stops at the limit, so a bomb costs no more than that."""
    # A tar adds half a kilobyte or so to each file, and pads to 10 KiB.
    limit = limit_bytes + MAX_FILES * 1024 + 10_240
    parts, size = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(archive)) as file:
            while chunk := file.read(CHUNK_BYTES):
                size += len(chunk)
                if size > limit:
                    _refuse(f"unpacks to more than {limit_bytes >> 20} MiB")
                parts.append(chunk)
    except (OSError, EOFError, zlib.error):
        _refuse("is not gzip-compressed")
    return b"".join(parts)


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, number: int) -> int:
    """Unpack one entry; returns how many files that made (0 or 1)."""
    shown = repr(member.name[:100])
    if number >= MAX_FILES:
        _refuse(f"holds more than {MAX_FILES} entries")
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        _refuse(f"entry {shown} points outside the archive")
    if len(path.parts) > MAX_DEPTH:
        _refuse(f"entry {shown} is nested deeper than {MAX_DEPTH}")
    if member.isdir():
        return 0
    if not member.isreg() or member.issparse():
        _refuse(f"entry {shown} is no regular file")
    if any(part.startswith(".") or part == "__pycache__" for part in path.parts):
        return 0
    file = target.joinpath(*path.parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    if source is None or file.exists():
        _refuse(f"entry {shown} stands twice or has no content")
    with source, file.open("xb") as copy:
        shutil.copyfileobj(source, copy)
    file.chmod(0o555 if member.mode & stat.S_IXUSR else 0o444)
    return 1


class CodeTrees:
    """Unpacked trees below `folder`, one per hash, their archives kept in `store`."""

    def __init__(self, folder: Path, store: ContentStore, limit_bytes: int) -> None:
        self._folder = folder
        self._store = store
        self._limit_bytes = limit_bytes

    def add(self, archive: bytes) -> tuple[str, str]:
        """Keep an archive's tree; returns (hash of the tree, digest of the archive)."""
        scratch = self._folder / f".incoming-{uuid4().hex}"
        try:
            unpack(archive, scratch, self._limit_bytes)
            code_hash = sha256_tree(scratch)
            digest = self._store.put_bytes(archive)
            self._place(scratch, code_hash)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return code_hash, digest

    def open(self, code_hash: str, archive_digest: str) -> Path:
        """The folder of a tree, proved to hold what its hash says; one that was changed is unpacked anew.

        Raises:
            DataLossError: the kept archive is damaged too.
        """
        folder = self._folder / code_hash
        if folder.is_dir():
            if sha256_tree(folder) == code_hash:
                return folder
            log.warning("code tree %s was changed after it was unpacked; unpacking it again", code_hash)
            # Renamed, not removed: a running stage may stand in it.
            folder.rename(self._folder / f".changed-{uuid4().hex}")
        added, _digest = self.add(self._store.read(archive_digest))
        assert added == code_hash
        return folder

    def clean(self) -> None:
        """Remove what an earlier process left half done."""
        for pattern in (".incoming-*", ".changed-*"):
            for path in self._folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _place(self, scratch: Path, code_hash: str) -> None:
        target = self._folder / code_hash
        if target.is_dir() and sha256_tree(target) == code_hash:
            return
        if target.is_dir():
            target.rename(self._folder / f".changed-{uuid4().hex}")
        scratch.rename(target)
