"""Follows the files of Envoy's access log while they grow, from where the log was last taken.

Envoy writes whether this process runs or not, so that calls answered meanwhile are only late. The supervisor begins new files and limits
how many there are (`envoy_supervisor`); this process removes those it has taken whole.
"""

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from millrace_inference_gateway.access_log import Line, read_line
from millrace_inference_gateway.envoy_files import write_atomically
from millrace_inference_gateway.envoy_supervisor import DROPPED, LOG_SUFFIX
from millrace_inference_gateway.journal import LogPosition

log = logging.getLogger(__name__)

# Read at once; no line is longer, the two payloads of a call included.
CHUNK_BYTES = 1 << 20
# Longest wait when nothing came.
IDLE_S = 0.1
# How often what is not in the journal (calls that failed) is kept as taken.
KEEP_S = 1.0

Take = Callable[[Sequence[Line], LogPosition], None]
"""Gets lines, and where the log goes on after them."""


class AccessLogFollower:
    """Reads the log in `folder`.

    Args:
        folder: of the log.
        kept: file for the position.
        start: how far the journal has the log.
        take: gets the lines.
        missed: gets how many calls were lost.
    """

    def __init__(
        self,
        folder: Path,
        kept: Path,
        start: LogPosition,
        *,
        take: Take,
        missed: Callable[[int], None],
        interval_s: float,
    ) -> None:
        self._folder = folder
        self._kept = kept
        self._take = take
        self._missed = missed
        self._interval_s = interval_s
        self._position = max(start, _load(kept))
        self._saved = self._position
        self._file = -1
        self._next: int | None = None
        self._dropped = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Take lines as they come until `stop`, then those that are there."""
        wait_s, keep_at = self._interval_s, 0.0
        now = asyncio.get_running_loop().time
        try:
            while True:
                stopping = stop.is_set()
                if self.step():
                    wait_s = self._interval_s
                    await asyncio.sleep(0)
                    continue
                if now() >= keep_at:
                    await asyncio.to_thread(self._keep)
                    keep_at = now() + KEEP_S
                if stopping:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), wait_s)
                wait_s = min(2 * wait_s, max(IDLE_S, self._interval_s))
        finally:
            self._close()

    def step(self) -> bool:
        """Take what is there, at most `CHUNK_BYTES`; False when nothing was."""
        if self._file < 0 and not self._open():
            return False
        chunk = os.pread(self._file, CHUNK_BYTES, self._position.offset)
        end = chunk.rfind(b"\n") + 1
        if end:
            position = LogPosition(self._position.file, self._position.offset + end)
            self._take(self._lines(chunk[:end]), position)
            self._position = position
            return True
        if len(chunk) == CHUNK_BYTES:
            log.error("the access log has a line of more than %d bytes", CHUNK_BYTES)
            self._missed(1)
            self._position = LogPosition(self._position.file, self._position.offset + CHUNK_BYTES)
            return True
        if self._next is None:
            # Once there is a newer file, nothing is added to this one: it is read once more, to its end.
            self._next = min((number for number in self._numbers() if number > self._position.file), default=None)
            return self._next is not None
        # What a killed Envoy left of a line is nobody's.
        self._close()
        self._position = LogPosition(self._next, 0)
        return True

    def _lines(self, chunk: bytes) -> list[Line]:
        found = []
        for text in chunk.splitlines():
            try:
                found.append(read_line(text))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                log.warning("a line of the access log cannot be read: %s", error)
                self._missed(1)
        return found

    def _numbers(self) -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            return [int(path.stem) for path in self._folder.iterdir() if path.suffix == LOG_SUFFIX]
        return []

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:020d}{LOG_SUFFIX}"

    def _open(self) -> bool:
        """Open the file of the position; when it is gone, or was never there, the oldest."""
        numbers = self._numbers()
        if not numbers:
            return False
        if self._position.file not in numbers:
            self._position = LogPosition(min(numbers), 0)
        with contextlib.suppress(FileNotFoundError):
            self._file, self._next = os.open(self._path(self._position.file), os.O_RDONLY), None
            return True
        return False

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _keep(self) -> None:
        """Keep the position, remove what lies before it, and count what the supervisor removed unread."""
        if self._position != self._saved:
            self._saved = self._position
            write_atomically(self._kept, json.dumps([self._saved.file, self._saved.offset]).encode())
        for number in self._numbers():
            if number < self._saved.file:
                self._path(number).unlink(missing_ok=True)
        try:
            dropped = int((self._folder / DROPPED).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return
        if dropped > self._dropped:
            self._missed(dropped - self._dropped)
            self._dropped = dropped


def _load(path: Path) -> LogPosition:
    try:
        file, offset = json.loads(path.read_text(encoding="ascii"))
        return LogPosition(int(file), int(offset))
    except (OSError, ValueError, TypeError):
        return LogPosition()
