"""The prediction log's journal: an append-only file set that outlives a kill of the process and is bounded in size.

An entry is in the operating system's hands (`write`) before the call it belongs to is answered, so the end of the process loses
nothing. Each entry has a header with a checksum; what a crash cut off is cut off for good at the next start. A full journal
refuses, the caller counts.
"""

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Length of the payload, CRC-32 of all that follows, offset of the entry, file and offset of the access log after it.
_HEADER = struct.Struct("<IIQQQ")
_CHECKED_FROM = 8
MAX_ENTRY_BYTES = 4 << 20


class JournalFullError(Exception):
    """The journal has no room for more until entries are published."""


class LogPosition(NamedTuple):
    """Where Envoy's access log goes on after what the journal has of it."""

    file: int = 0
    """Its number."""
    offset: int = 0
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as it was read."""

    offset: int
    payload: bytes
    position: LogPosition


class Journal:
    """The files in `folder`; one writer."""

    def __init__(self, folder: Path, *, segment_bytes: int, max_segments: int) -> None:
        self.folder = folder
        self._segment_bytes = segment_bytes
        self._max_segments = max_segments
        folder.mkdir(parents=True, exist_ok=True)
        self._bases = sorted(int(path.stem) for path in folder.glob("*.log"))
        self.position = LogPosition()
        self._end = self._recover()
        if not self._bases:
            self._bases.append(self._end)
        self._file = os.open(self._path(self._bases[-1]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._size = os.fstat(self._file).st_size

    @property
    def start(self) -> int:
        """Offset of the oldest entry that is still there."""
        return self._bases[0]

    @property
    def end(self) -> int:
        """Offset after the newest entry."""
        return self._end

    def _path(self, base: int) -> Path:
        return self.folder / f"{base:020d}.log"

    def _recover(self) -> int:
        """Cut a torn tail off the newest file; returns the end."""
        for base in reversed(self._bases):
            path = self._path(base)
            content = path.read_bytes()
            entries, good = scan(content, base)
            if good < len(content):
                os.truncate(path, good)
            if entries:
                self.position = entries[-1].position
                return entries[-1].offset + 1
            # An empty newest file: the last entry, with the newest count, is in the file before.
            if base != self._bases[0]:
                path.unlink()
                self._bases.remove(base)
            else:
                return base
        return 0

    def append(self, payloads: Sequence[bytes], position: LogPosition | None = None) -> int:
        """Write entries, whole; returns the offset of the first.

        Raises:
            JournalFullError: no room, on the disk or by the limit; nothing was written.
        """
        if self._size >= self._segment_bytes:
            self._roll()
        position = position or self.position
        parts: list[bytes] = []
        for index, payload in enumerate(payloads):
            header = _HEADER.pack(len(payload), 0, self._end + index, *position)
            crc = zlib.crc32(payload, zlib.crc32(header[_CHECKED_FROM:]))
            parts += (header[:4], crc.to_bytes(4, "little"), header[_CHECKED_FROM:], payload)
        content = b"".join(parts)
        try:
            written = os.write(self._file, content)
        except OSError as error:
            raise JournalFullError(str(error)) from error
        if written < len(content):
            os.ftruncate(self._file, self._size)
            raise JournalFullError("the disk is full")
        first = self._end
        self._end += len(payloads)
        self._size += written
        self.position = position
        return first

    def _roll(self) -> None:
        if len(self._bases) >= self._max_segments:
            raise JournalFullError(f"{self._max_segments} files wait to be published")
        try:
            file = os.open(self._path(self._end), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise JournalFullError(str(error)) from error
        os.close(self._file)
        self._file, self._size = file, 0
        self._bases.append(self._end)

    def segment_of(self, offset: int) -> tuple[Path, int]:
        """File that holds `offset`, and the offset of its first entry."""
        base = max(base for base in self._bases if base <= offset)
        return self._path(base), base

    def next_file(self, offset: int) -> int:
        """Offset of the first entry in the file after the one that holds `offset`; the end when that is the newest."""
        return min((base for base in self._bases if base > offset), default=self._end)

    def trim(self, before: int) -> None:
        """Remove files all of whose entries are older than `before`; the newest file stays."""
        while len(self._bases) > 1 and self._bases[1] <= before:
            self._path(self._bases.pop(0)).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class JournalReader:
    """Reads a journal in order while it grows; remembers where in the file it is."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._base = -1
        self._position = 0
        self._next = 0

    def read(self, offset: int, end: int) -> list[Entry]:
        """Entries from `offset` to before `end`, at most one file's worth; empty only when there are none."""
        path, base = self._journal.segment_of(offset)
        if (base, offset) != (self._base, self._next):
            self._base, self._position, self._next = base, 0, base
        with path.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        found: list[Entry] = []
        position = 0
        while self._next < end:
            entry, size = _entry_at(content, position, self._next)
            if entry is None:
                break
            position += size
            self._next += 1
            if entry.offset >= offset:
                found.append(entry)
        self._position += position
        return found


def scan(content: bytes, base: int) -> tuple[list[Entry], int]:
    """The good entries at the head of a file, and how many bytes they are."""
    entries: list[Entry] = []
    position = 0
    while True:
        entry, size = _entry_at(content, position, base + len(entries))
        if entry is None:
            return entries, position
        entries.append(entry)
        position += size


def _entry_at(content: bytes, position: int, offset: int) -> tuple[Entry | None, int]:
    if position + _HEADER.size > len(content):
        return None, 0
    length, crc, found, file, at = _HEADER.unpack_from(content, position)
    size = _HEADER.size + length
    if found != offset or length > MAX_ENTRY_BYTES or position + size > len(content):
        return None, 0
    if zlib.crc32(content[position + _CHECKED_FROM : position + size]) != crc:
        return None, 0
    return Entry(offset, content[position + _HEADER.size : position + size], LogPosition(file, at)), size
