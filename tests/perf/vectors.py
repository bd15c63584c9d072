"""Exact search among embeddings beside what numpy needs for one pass over the same matrix, and filling the index.

`make perf AREA=vectors`. numpy multiplies and picks in float32 and stops there; the index also bounds the rounding and settles near ties, so
its hits are exact. Both are checked to find the same first.
"""

import time
from collections.abc import Callable

import numpy as np
from millrace_feature.plan import VectorField
from millrace_feature.search.index import Memory, VectorIndex

from tests.perf.harness import Contestant, Ratio, median, quantile, report

SIZES = ((10_000, 768), (100_000, 384), (1_000_000, 128))
TOP = 10
CALLS = 20
PART = 1_000


def filled(vectors: np.ndarray) -> tuple[VectorIndex, float]:
    """(an index of the rows, rows a second while it was filled)."""
    index = VectorIndex(VectorField("v", vectors.shape[1], is_wide=False, metric="cosine"), Memory(1 << 40))
    started = time.perf_counter()
    for start in range(0, len(vectors), PART):
        part = vectors[start : start + PART]
        keys = [str(start + i) for i in range(len(part))]
        index.put(keys, [(0, (row.tobytes(),)) for row in part], 0)
    return index, len(vectors) / (time.perf_counter() - started)


def measured(name: str, work: Callable[[np.ndarray], object], queries: np.ndarray) -> Contestant:
    """One query after the other: rate, processor time of each and how long they took."""
    work(queries[0])
    walls = []
    started, cpu = time.perf_counter(), time.process_time()
    for query in queries:
        at = time.perf_counter()
        work(query)
        walls.append((time.perf_counter() - at) * 1000)
    cpu_ms, wall = (time.process_time() - cpu) * 1000 / len(queries), time.perf_counter() - started
    walls.sort()
    return Contestant(name, len(queries) / wall, cpu_ms, median(walls), quantile(walls, 0.99))


def main() -> None:
    """Measure and report."""
    contestants: list[Contestant] = []
    ratios: list[Ratio] = []
    fills: dict[str, float] = {}
    for rows, length in SIZES:
        rng = np.random.default_rng(1)
        vectors = rng.standard_normal((rows, length), np.float32)
        queries = rng.standard_normal((CALLS, length))
        index, rate = filled(vectors)
        fills[f"{rows} x {length}"] = round(rate)
        sizes = np.linalg.norm(vectors, axis=1)

        def plain(query: np.ndarray, vectors: np.ndarray = vectors, sizes: np.ndarray = sizes) -> list[int]:
            scores = vectors @ query.astype(np.float32) / sizes
            best = np.argpartition(-scores, TOP)[:TOP]
            return best[np.argsort(-scores[best])].tolist()

        def ours(query: np.ndarray, index: VectorIndex = index) -> list[str]:
            return index.nearest(query, "cosine", TOP, oldest_us=None)

        for query in queries[:3]:
            assert {int(key) for key in ours(query)} == set(plain(query))
        found = [
            measured(f"index, {rows} x {length}", ours, queries),
            measured(f"numpy, {rows} x {length}", plain, queries),
        ]
        contestants += found
        ratios.append(Ratio.at_most(f"{rows} x {length}: p50 beside numpy's", found[0].p50_ms / found[1].p50_ms, 2.0))
    report("vectors", contestants, ratios)
    print("rows filled a second:", fills)


if __name__ == "__main__":
    main()
