"""Which event ids of a contract have landed: a log-structured set of 128-bit hashes.

The lake is the truth; this set only follows it. `version` says up to which Delta version, and whoever opens the set catches it up from
the table's log (see `landing.py`). So nothing here needs a transaction with the commit: a lost or torn folder is rebuilt.

Newest ids are sorted runs in memory; they are written as one sorted segment file when there are `flush_ids` of them, and segments of
like size are merged, so there are about log2(n / flush_ids) of them. A blocked Bloom filter (16 bits an id, in memory) answers for
ids that are new, which is nearly every id, with one memory access; only the rest is looked for by binary search.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from millrace_ingestion.hashing import U64

Mask = npt.NDArray[np.bool_]

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Segments above this are never merged again: the longest stall of a merge stays below about a second.
MAX_MERGED_IDS = 1 << 24
_FILTER_BITS = 16
_MIN_WORDS = 1 << 14


@dataclass(frozen=True)
class _Run:
    """Ids sorted by their first half; on disk when `file` is set."""

    high: U64
    low: U64
    file: str = ""


class IdIndex:
    """The ids of one contract.

    Args:
        folder: where segments are kept; made when it is not there.
        flush_ids: ids kept in memory before a segment is written.
    """

    def __init__(self, folder: Path, *, flush_ids: int) -> None:
        self._folder = folder
        self._flush_ids = flush_ids
        self._segments: list[_Run] = []
        self._recent: list[_Run] = []
        self.version = -1
        """Delta version up to which every id is in the set; -1 before the first."""
        self.table_id = ""
        """The Delta table it follows."""
        self._filter = _Filter(0)
        self._open()

    def __len__(self) -> int:
        return sum(len(run.high) for run in (*self._segments, *self._recent))

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            manifest = json.loads((self._folder / MANIFEST).read_text(encoding="utf-8"))
            segments = [_load(self._folder / name, count) for name, count in manifest["segments"]]
            self._segments, self.version, self.table_id = segments, int(manifest["version"]), str(manifest["table"])
        except (OSError, ValueError, KeyError, TypeError):
            # None yet, or a broken one: the lake has every id.
            self.clear("")
        self._refilter()

    def clear(self, table_id: str) -> None:
        """Forget everything and follow the table of this id; `version` is -1 again."""
        self._segments, self._recent, self.version, self.table_id = [], [], -1, table_id
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._filter = _Filter(0)

    def contains(self, high: U64, low: U64) -> Mask:
        """Which of the given ids are in the set."""
        found = np.zeros(len(high), np.bool_)
        candidates = np.flatnonzero(self._filter.maybe(high, low))
        if len(candidates) == 0:
            return found
        order = candidates[np.argsort(high[candidates])]
        wanted_high, wanted_low = high[order], low[order]
        for run in (*self._recent, *self._segments):
            found[order] |= _in_run(run, wanted_high, wanted_low)
        return found

    def add(self, high: U64, low: U64, version: int) -> None:
        """Add ids that Delta version `version` landed; every earlier version must be in."""
        if len(high):
            order = np.argsort(high)
            run = _Run(high[order], low[order])
            if self._filter.full_with(len(self) + len(high)):
                self._recent.append(run)
                self._refilter()
            else:
                self._filter.add(run.high, run.low)
                self._recent.append(run)
            while len(self._recent) > 1 and len(self._recent[-2].high) <= 2 * len(self._recent[-1].high):
                newer, older = self._recent.pop(), self._recent.pop()
                self._recent.append(_merged(older, newer))
        self.version = version
        if sum(len(run.high) for run in self._recent) >= self._flush_ids:
            try:
                self.flush()
            except OSError as error:
                # The ids stay in memory and are in the lake: only the next open takes longer.
                log.warning("the duplicate index could not be written: %s", error)

    def flush(self) -> None:
        """Write what is in memory, so that the next open starts at `version`."""
        segments = list(self._segments)
        run = _Run(np.empty(0, np.uint64), np.empty(0, np.uint64))
        for recent in reversed(self._recent):
            run = _merged(recent, run)
        while len(run.high) and segments and self._mergeable(segments[-1], run):
            run = _merged(segments.pop(), run)
        if len(run.high):
            name = f"{self.version:020d}-{len(run.high)}.ids"
            _write(self._folder / name, np.concatenate((run.high, run.low)).astype("<u8", copy=False).tobytes())
            segments.append(_load(self._folder / name, len(run.high)))
        listed = [(segment.file, len(segment.high)) for segment in segments]
        manifest = json.dumps({"version": self.version, "table": self.table_id, "segments": listed})
        _write(self._folder / MANIFEST, manifest.encode())
        kept = {segment.file for segment in segments}
        for segment in self._segments:
            if segment.file not in kept:
                (self._folder / segment.file).unlink(missing_ok=True)
        self._segments, self._recent = segments, []

    @staticmethod
    def _mergeable(segment: _Run, run: _Run) -> bool:
        small = len(segment.high) <= 2 * len(run.high)
        return small and len(segment.high) + len(run.high) <= MAX_MERGED_IDS

    def _refilter(self) -> None:
        self._filter = _Filter(2 * len(self))
        for run in (*self._segments, *self._recent):
            self._filter.add(run.high, run.low)


class _Filter:
    """Blocked Bloom filter: four bits of one 64-bit word an id."""

    def __init__(self, capacity: int) -> None:
        words = max(_MIN_WORDS, 1 << (max(1, capacity * _FILTER_BITS // 64) - 1).bit_length())
        self._words = np.zeros(words, np.uint64)
        self._capacity = words * 64 // _FILTER_BITS
        self._shift = np.uint64(64 - (words.bit_length() - 1))

    def full_with(self, count: int) -> bool:
        return count > self._capacity

    def _places(self, high: U64, low: U64) -> tuple[U64, U64]:
        one, six = np.uint64(1), np.uint64(63)
        mask = one << (low & six)
        for shift in (6, 12, 18):
            mask |= one << ((low >> np.uint64(shift)) & six)
        return high >> self._shift, mask

    def add(self, high: U64, low: U64) -> None:
        places, masks = self._places(high, low)
        np.bitwise_or.at(self._words, places.astype(np.intp), masks)

    def maybe(self, high: U64, low: U64) -> Mask:
        places, masks = self._places(high, low)
        present: Mask = (self._words[places.astype(np.intp)] & masks) == masks
        return present


def first_copies(high: U64, low: U64) -> Mask:
    """True for each id's first place in the arrays, false for its repeats."""
    order = np.argsort(high, kind="stable")
    ordered = high[order]
    first = np.ones(len(high), np.bool_)
    same = ordered[1:] == ordered[:-1]
    if not same.any():
        return first
    # Only ids whose first half is there twice need the exact comparison.
    near = np.zeros(len(high), np.bool_)
    near[1:] = same
    near[:-1] |= same
    places = np.sort(order[near])
    exact = np.lexsort((places, low[places], high[places]))
    places = places[exact]
    repeat = (high[places][1:] == high[places][:-1]) & (low[places][1:] == low[places][:-1])
    first[places[1:][repeat]] = False
    return first


def _in_run(run: _Run, high: U64, low: U64) -> Mask:
    found = np.zeros(len(high), np.bool_)
    if len(run.high) == 0:
        return found
    at = np.searchsorted(run.high, high)
    waiting = np.arange(len(high))
    # Different ids may share the first half: step on until it differs. One step is nearly always the last.
    while len(waiting):
        inside = at[waiting] < len(run.high)
        waiting = waiting[inside]
        waiting = waiting[run.high[at[waiting]] == high[waiting]]
        equal = run.low[at[waiting]] == low[waiting]
        found[waiting[equal]] = True
        waiting = waiting[~equal]
        at[waiting] += 1
    return found


def _merged(left: _Run, right: _Run) -> _Run:
    if len(left.high) == 0 or len(right.high) == 0:
        return _Run(right.high, right.low) if len(left.high) == 0 else _Run(left.high, left.low)
    high = np.concatenate((left.high, right.high))
    order = np.argsort(high, kind="stable")
    return _Run(high[order], np.concatenate((left.low, right.low))[order])


def _load(path: Path, count: int) -> _Run:
    values = np.memmap(path, "<u8", "r", shape=(2 * count,))
    if path.stat().st_size != 16 * count:
        raise ValueError(f"{path} is not whole")
    return _Run(values[:count], values[count:], path.name)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, also when the power fails."""
    scratch = path.with_name(f".{path.name}")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
