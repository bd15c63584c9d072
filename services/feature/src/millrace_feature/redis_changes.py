"""One change to the online store in Redis: what it needs to know, and the commands that make it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from millrace_kit.bus import TopicPartition

from millrace_feature.packed_rows import pack_row, unpack_row
from millrace_feature.redis_layout import Group, Keys, Progress, parse_groups
from millrace_feature.rows import Row, order_of
from millrace_feature.store import Change, Followed, StoreFillingError, StoreMovedError
from millrace_feature.tile_fields import Fields

SEEN_PER_SOURCE = 10_000
"""Batches remembered per source. Ingestion's offsets rise per source, so an older one than these was applied."""
COMMANDS = 2_000
"""Commands of one round trip while a change is read or a group is filled."""

FIELDS = 1_000
"""Fields of one entity that one call of a script names; Lua's stack has a bound."""
# Loops and nothing else: one command with thousands of keys costs a client a tenth of thousands of commands.
_GET = """
local out, at = {}, 1
for i, key in ipairs(KEYS) do
  local n = tonumber(ARGV[at])
  out[i] = redis.call('HMGET', key, unpack(ARGV, at + 1, at + n))
  at = at + n + 1
end
return out"""
_PUT = """
local at = 1
for _, key in ipairs(KEYS) do
  local n = tonumber(ARGV[at])
  redis.call('HSET', key, unpack(ARGV, at + 1, at + n))
  at = at + n + 1
end"""

# Other replicas may write an entity's rows too, so whoever has the newest is decided where it lies.
_PUT_NEWEST = """
for i, key in ipairs(KEYS) do
  local old = redis.call('HGET', key, ARGV[1])
  if not old or struct.unpack('>i8', old) <= struct.unpack('>i8', ARGV[i + 1]) then
    redis.call('HSET', key, ARGV[1], ARGV[i + 1])
  end
end"""


def get_fields(client: Any, wanted: Iterable[tuple[str, Sequence[str]]]) -> list[list[bytes | None]]:
    """Some fields of each of some hashes."""
    out: list[list[bytes | None]] = []
    for part in in_parts(wanted):
        pieces = [
            (i, key, names[at : at + FIELDS])
            for i, (key, names) in enumerate(part)
            for at in range(0, len(names), FIELDS)
        ]
        arguments = [argument for _i, _key, names in pieces for argument in (len(names), *names)]
        replies = client.eval(_GET, len(pieces), *(key for _i, key, _names in pieces), *arguments)
        found: list[list[bytes | None]] = [[] for _item in part]
        for (i, _key, _names), reply in zip(pieces, replies, strict=True):
            found[i] += reply
        out += found
    return out


def put_fields(pipe: Any, fields: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Add the commands that set some fields of each of some hashes."""
    for part in in_parts(fields):
        pieces = []
        for key, content in part:
            flat = [argument for pair in content.items() for argument in pair]
            pieces += [(key, flat[at : at + 2 * FIELDS]) for at in range(0, len(flat), 2 * FIELDS)]
        arguments = [argument for _key, flat in pieces for argument in (len(flat), *flat)]
        pipe.eval(_PUT, len(pieces), *(key for key, _flat in pieces), *arguments)


def put_rows(pipe: Any, keys: Keys, group: Group, rows: Iterable[Row]) -> None:
    """Add the commands that keep some rows of a group, and the newest of each entity among them where reads look first."""
    newest: dict[str, tuple[int, bytes]] = {}
    for row in rows:
        packed = pack_row(row.time_us, row.values)
        pipe.zadd(keys.rows(group.id, row.key), {packed: row.time_us})
        if row.key not in newest or newest[row.key][0] <= row.time_us:
            newest[row.key] = row.time_us, packed
    for part in in_parts(newest.items()):
        names = [keys.newest(entity) for entity, _row in part]
        pipe.eval(_PUT_NEWEST, len(part), *names, group.id, *(packed for _entity, (_time, packed) in part))


def in_parts(items: Iterable[Any], size: int = COMMANDS) -> Iterator[list[Any]]:
    """`items` in lists of at most `size`."""
    part: list[Any] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


class ChangeWriter:
    """Prepares and writes one change; made anew for each attempt.

    Args:
        client: a client of its own connections; reads go through it while the transaction's connection watches.
        keys: names of keys.
        opened: the groups this replica relies on.
        change: the change.
    """

    def __init__(self, client: Any, keys: Keys, opened: Mapping[str, Group], change: Change) -> None:
        self._client = client
        self._keys = keys
        self._opened = opened
        self._change = change
        self._tiles: list[tuple[Group, Fields]] = []
        self._rows: list[tuple[Group, list[tuple[Row, bytes | None]]]] = []
        """Rows that count, each with the row of the same instant that it replaces."""
        self._progress: dict[str, Progress] = {}

    def read(self) -> None:
        """Look at what stands in Redis.

        Raises:
            StoreMovedError, StoreFillingError: see `OnlineStore.apply`.
        """
        change = self._change
        topics = sorted({place.topic for place in change.positions})
        contracts = sorted(change.groups)
        pipe = self._client.pipeline(transaction=False)
        pipe.hgetall(self._keys.groups)
        pipe.hmget(self._keys.followed, contracts or [""])
        for topic in topics:
            pipe.hgetall(self._keys.positions(topic))
        standing, progress, *positions = pipe.execute()
        self._check_positions(dict(zip(topics, positions, strict=True)))
        self._check_groups(parse_groups(standing))
        for contract, text in zip(contracts, progress, strict=False):
            self._progress[contract] = Progress.parse(text) if text is not None else Progress(Followed())
            base = change.base.get(contract)
            if base is not None and base.version != self._progress[contract].followed.version:
                raise StoreMovedError(f"contract {contract} was filled anew")
        self._read_tiles()
        self._read_rows()

    def _check_positions(self, found: Mapping[str, Mapping[bytes, bytes]]) -> None:
        for place in self._change.positions:
            stored = int(found[place.topic].get(str(place.partition).encode(), b"0"))
            if stored != self._change.starts.get(place, 0):
                raise StoreMovedError(f"{place.topic}/{place.partition} stands at {stored}: another replica reads it")

    def _check_groups(self, standing: Mapping[str, Group]) -> None:
        for contract, planned in self._change.groups.items():
            mine = {name: group for name, group in standing.items() if group.contract == contract}
            if any(group.state == "filling" for group in mine.values()):
                raise StoreFillingError(contract)
            ids = {name: group.id for name, group in mine.items() if group.state == "ready"}
            if ids != {name: self._opened[name].id for name in planned if name in self._opened}:
                raise StoreMovedError(f"groups of contract {contract} have changed")

    def _read_tiles(self) -> None:
        for name, change in self._change.tiles:
            group = self._opened[name]
            named = ((self._keys.tiles(group.id, e), n) for e, n in zip(change.entities, change.names, strict=True))
            old = get_fields(self._client, named)
            self._tiles.append((group, change.content(old)))

    def _read_rows(self) -> None:
        for name, rows in self._change.rows:
            group = self._opened[name]
            counted: list[tuple[Row, bytes | None]] = []
            for part in in_parts(rows):
                pipe = self._client.pipeline(transaction=False)
                for row in part:
                    pipe.zrangebyscore(self._keys.rows(group.id, row.key), row.time_us, row.time_us)
                for row, old in zip(part, pipe.execute(), strict=True):
                    if not old or order_of(row.values) > order_of(unpack_row(old[0])[1]):
                        counted.append((row, old[0] if old else None))
            if counted:
                self._rows.append((group, counted))

    def write(self, pipe: Any) -> None:
        """Add the commands to the transaction `pipe`."""
        entities: dict[str, set[str]] = {}
        for group, fields in self._tiles:
            put_fields(pipe, ((self._keys.tiles(group.id, entity), content) for entity, content in fields))
            if fields:
                entities.setdefault(group.id, set()).update(entity for entity, _content in fields)
        for group, rows in self._rows:
            for row, loser in rows:
                if loser is not None:
                    pipe.zrem(self._keys.rows(group.id, row.key), loser)
            put_rows(pipe, self._keys, group, (row for row, _loser in rows))
            entities.setdefault(group.id, set()).update(row.key for row, _loser in rows)
        for group_id, names in entities.items():
            pipe.sadd(self._keys.entities(group_id), *names)
        self._write_progress(pipe)
        for contract, source, offset in self._change.seen:
            pipe.zadd(self._keys.seen(contract, source), {str(offset): offset})
        for contract, source in {(contract, source) for contract, source, _offset in self._change.seen}:
            pipe.zremrangebyrank(self._keys.seen(contract, source), 0, -SEEN_PER_SOURCE - 1)
        write_positions(pipe, self._keys, self._change.positions)

    def _write_progress(self, pipe: Any) -> None:
        """Add what the change moved to what stands: another partition of the contract may have moved it meanwhile."""
        for contract, before in self._progress.items():
            moved, base = self._change.followed.get(contract), self._change.base.get(contract, Followed())
            stood = before.followed
            followed = stood
            if moved is not None:
                newest = [us for us in (stood.watermark_us, moved.watermark_us) if us is not None]
                watermark_us = max(newest) if newest else None
                followed = Followed(stood.records + moved.records - base.records, watermark_us, stood.version)
            applied = max(before.applied, self._change.versions[contract])
            pipe.hset(self._keys.followed, contract, Progress(followed, applied).text())


def write_positions(pipe: Any, keys: Keys, positions: Mapping[TopicPartition, int]) -> None:
    """Add the commands that keep `positions`."""
    for place, offset in positions.items():
        pipe.sadd(keys.topics(), place.topic)
        pipe.hset(keys.positions(place.topic), str(place.partition), offset)
