"""Stored features of many entity rows, each at its own instant, in memory that depends on the rows asked for and not on the lake.

Newest rows: DuckDB streams the view's rows of the entities asked for, in any order, past `NewestRows`. Windows: entities are taken in parts
of about `PART_ROWS` lake rows, whose tiles are made and merged before the next part's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from millrace_feature.lake import Query, quoted
from millrace_feature.newest import NewestRows
from millrace_feature.plan import LatestView, WindowView
from millrace_feature.tiles import Floats, Ints, group_keys
from millrace_feature.vectors import packed_columns
from millrace_feature.windows import window_features

PART_ROWS = 2_000_000
"""Rows of the lake whose tiles are in memory at once."""
BATCH_ROWS = 500_000
"""Rows of the lake looked at in one step."""
NULL_KEY = -2


@dataclass(frozen=True, slots=True)
class Entities:
    """The entities of some rows."""

    codes: Ints
    """Per row; `NULL_KEY` where a join key is null."""
    words: list[str]
    """Encoded key per code."""
    columns: tuple[pa.ChunkedArray, ...]
    """Join keys per code, as the rows have them."""

    @classmethod
    def of(cls, columns: Sequence[pa.ChunkedArray]) -> "Entities":
        """From the join keys of rows."""
        table = pa.table(list(columns), names=[f"k{i}" for i in range(len(columns))])
        valid = np.ones(table.num_rows, np.bool_)
        for column in table.columns:
            valid &= np.asarray(column.is_valid().to_numpy(), np.bool_)
        codes = np.full(table.num_rows, NULL_KEY, np.int64)
        if not valid.any():
            return cls(codes, [], tuple(column.slice(0, 0) for column in table.columns))
        present = table if valid.all() else table.filter(pa.array(valid))
        codes[valid], words = group_keys(present.columns)
        first = np.empty(len(words), np.int64)
        first[codes[valid][::-1]] = np.arange(present.num_rows)[::-1]
        return cls(codes, words, tuple(present.take(pa.array(first)).columns))


def newest_features(
    query: Query, view: LatestView, entities: Entities, at_us: Ints, before_us: int | None
) -> dict[str, pa.ChunkedArray]:
    """The view's newest row at or before each row's instant, by feature; null where there is none or it is older than the TTL.

    Embeddings are packed (`vectors.py`). Of rows with equal time the one whose values sort last counts; NaN is null.

    Args:
        query: the lake.
        view: what to read.
        entities: of the rows.
        at_us: instant per row.
        before_us: only lake rows with an event time before this count; None for all.
    """
    query.need(view.contract, [view.event_time, *view.join_keys, *view.features], f"view {view.name}")
    kinds = query.columns[view.contract]
    newest = NewestRows(entities.codes, at_us)
    with query.temporary(_keys_table(entities)) as keys:
        at = f"epoch_us(e.{quoted(view.event_time)})"
        wanted = [f"e.{quoted(view.event_time)} IS NOT NULL"]
        wanted += [f"{at} < {before_us}"] if before_us is not None else []
        if len(at_us):
            wanted.append(f"{at} <= {int(at_us.max())}")
            wanted += [f"{at} >= {int(at_us.min()) - view.ttl_us}"] if view.ttl_us else []
        chosen = [
            f"CASE WHEN isnan(e.{quoted(f)}) THEN NULL ELSE e.{quoted(f)} END AS f{i}"
            if pa.types.is_floating(kinds[f])
            else f"e.{quoted(f)} AS f{i}"
            for i, f in enumerate(view.features)
        ]
        equal = [
            f"e.{quoted(key)} = k.k{i}"
            if kinds[key] == entities.columns[i].type
            else f"e.{quoted(key)}::VARCHAR = k.k{i}::VARCHAR"
            for i, key in enumerate(view.join_keys)
        ]
        reader = query.reader(
            f"SELECT k.code, {at} AS at_us, {', '.join(chosen)} FROM lake_{view.contract} AS e "
            f"JOIN {keys} AS k ON {' AND '.join(equal)} WHERE {' AND '.join(wanted)}",
            BATCH_ROWS,
        )
        # Packed at once, so that rows of equal time are compared as the stream compares them, and kept rows are small.
        packing = [replace(field, feature=f"f{view.features.index(field.feature)}") for field in view.vectors]
        schema = packed_columns(pa.schema(list(reader.schema)[2:]).empty_table(), packing)[0].schema
        for batch in reader:
            codes, times = (np.asarray(batch.column(i).to_numpy(), np.int64) for i in (0, 1))
            values, _bad = packed_columns(pa.Table.from_batches([batch.select(schema.names)]), packing)
            newest.add(codes, times, values)
        found = newest.result(schema, ttl_us=view.ttl_us)
    return {f: found.column(i) for i, f in enumerate(view.features)}


def windowed_features(
    query: Query, view: WindowView, entities: Entities, at_us: Ints, before_us: int | None
) -> Mapping[str, Floats]:
    """The view's windows at each row's instant, by feature. Arguments are those of `newest_features`."""
    query.need(view.contract, view.source_columns, f"view {view.name}")
    since_us = (int(at_us.min()) - view.reach_us) // view.hop_us * view.hop_us if len(at_us) else None
    rows = query.count(view.contract, view.event_time, since_us)
    parts = max(1, -(-rows // PART_ROWS))
    if parts == 1:
        tiles = query.tiles(view, since_us, before_us)
        return window_features(view, tiles, _codes_in(entities, tiles.keys, entities.codes), at_us)
    out = {name: np.zeros(len(at_us)) for name in view.features}
    keys = ", ".join(f"{quoted(key)}::VARCHAR" for key in view.join_keys)
    # Null keys and entities without rows belong to every part: the first one answers for them.
    done = np.zeros(len(at_us), np.bool_)
    for number in range(parts):
        with query.part(view.contract, f"hash({keys}) % {parts} = {number}") as contract:
            tiles = query.tiles(replace(view, contract=contract), since_us, before_us)
        codes = _codes_in(entities, tiles.keys, entities.codes)
        mine = (codes >= 0) | ~done if number == parts - 1 else codes >= 0
        found = window_features(view, tiles, codes[mine], at_us[mine])
        for name, column in found.items():
            out[name][mine] = column
        done |= mine
    return out


def _codes_in(entities: Entities, keys: Sequence[str], codes: Ints) -> Ints:
    """Per row the entity's place in `keys`; -1 where it is not there."""
    place = {key: number for number, key in enumerate(keys)}
    found = np.array([*(place.get(word, -1) for word in entities.words), NULL_KEY], np.int64)
    return found[np.where(codes >= 0, codes, len(entities.words))]


def _keys_table(entities: Entities) -> pa.Table:
    columns = {f"k{i}": column for i, column in enumerate(entities.columns)}
    return pa.table({**columns, "code": pa.array(np.arange(len(entities.words)))})
