"""The duplicate index agrees with a plain set, survives a reopen, and gives up a torn folder."""

from pathlib import Path

import numpy as np
from millrace_ingestion.id_index import IdIndex, first_copies


def ids(chance: np.random.Generator, count: int, spread: int) -> tuple[np.ndarray, np.ndarray]:
    """Few different first halves, so that ties of the first half are common."""
    high = chance.integers(0, spread, count).astype(np.uint64) << np.uint64(50)
    return high, chance.integers(0, 5, count).astype(np.uint64)


def test_against_a_set(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    index, known = IdIndex(tmp_path, flush_ids=500), set()
    index.clear("table")
    for version in range(200):
        high, low = ids(chance, int(chance.integers(0, 60)), 4000)
        pairs = list(zip(high.tolist(), low.tolist(), strict=True))
        assert index.contains(high, low).tolist() == [pair in known for pair in pairs]
        new = first_copies(high, low) & ~index.contains(high, low)
        index.add(high[new], low[new], version)
        known.update(pairs)
        if version % 40 == 39:
            index.flush()
            index = IdIndex(tmp_path, flush_ids=500)
            assert (index.version, index.table_id, len(index)) == (version, "table", len(known))
    assert len(list(tmp_path.glob("*.ids"))) < 12


def test_first_copies() -> None:
    high = np.array([5, 1, 5, 5, 1, 9], np.uint64)
    low = np.array([0, 2, 0, 1, 2, 9], np.uint64)
    assert first_copies(high, low).tolist() == [True, True, False, True, False, True]


def test_a_torn_folder_starts_empty(tmp_path: Path) -> None:
    index = IdIndex(tmp_path, flush_ids=10)
    index.clear("table")
    index.add(np.arange(20, dtype=np.uint64), np.arange(20, dtype=np.uint64), 3)
    (segment,) = tmp_path.glob("*.ids")
    segment.write_bytes(segment.read_bytes()[:-8])
    again = IdIndex(tmp_path, flush_ids=10)
    assert (len(again), again.version) == (0, -1)


def test_what_was_not_flushed_is_asked_for_again(tmp_path: Path) -> None:
    index = IdIndex(tmp_path, flush_ids=10)
    index.clear("table")
    index.add(np.arange(12, dtype=np.uint64), np.arange(12, dtype=np.uint64), 1)
    index.add(np.array([99], np.uint64), np.array([99], np.uint64), 2)
    again = IdIndex(tmp_path, flush_ids=10)
    assert (len(again), again.version) == (12, 1)
