"""The online store of a cluster: Redis, shared by every replica of the feature service.

Any replica answers any read. The replicas share the partitions of the records topics, and each change is one transaction that holds the
effects and the bus positions after them. It goes through only while the positions stand where its messages were read from and the groups
are those it was computed for (WATCH), so after kill -9, a rebalance or a change of definitions nothing counts twice and nothing is lost:
whoever loses reads positions and groups again.

One replica at a time fills a new group from the lake, holding a lock; the contract's changes wait meanwhile. Everything the service needs
lies in one Redis and goes back in time together, so a Redis that comes up empty or from an old snapshot is followed again from where it
stands; groups that are missing are filled from the lake. Redis must not evict (`maxmemory-policy noeviction`).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import redis
from millrace_kit.bus import TopicPartition
from redis.backoff import NoBackoff
from redis.retry import Retry

from millrace_feature.plan import LatestView, View, WindowView
from millrace_feature.redis_calls import asked, transaction
from millrace_feature.redis_changes import SEEN_PER_SOURCE, ChangeWriter, in_parts
from millrace_feature.redis_groups import RedisGroups
from millrace_feature.redis_layout import Group, Keys, Progress
from millrace_feature.redis_pipeline import PipelinedRedis
from millrace_feature.redis_reads import RedisAnswers, RedisReader, rebuilding
from millrace_feature.settings import RedisSettings
from millrace_feature.store import Ask, Change, Content, Followed, Mark, rows_bound_us
from millrace_feature.tile_fields import is_outdated, layout_of

_FORGET_IF_EMPTY = """
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('SREM', KEYS[2], ARGV[1])
  redis.call('HDEL', KEYS[3], ARGV[2])
end"""


class RedisOnlineStore:
    """`OnlineStore` on one Redis database. Connects at the first use, so a service may start before Redis does."""

    is_shared = True

    def __init__(self, settings: RedisSettings) -> None:
        common: dict[str, Any] = {
            "socket_connect_timeout": settings.read_timeout_s,
            "max_connections": settings.max_connections,
        }
        if settings.username:
            common["username"] = settings.username
        if settings.password:
            common["password"] = settings.password
        if settings.ca_file and settings.url.startswith("rediss:"):
            common["ssl_ca_certs"] = settings.ca_file
        self._keys = Keys(settings.prefix)
        self._client = redis.Redis.from_url(
            settings.url, socket_timeout=settings.write_timeout_s, retry=Retry(NoBackoff(), 0), **common
        )
        self._reader = RedisReader(PipelinedRedis(settings), self._keys, settings.read_timeout_s)
        self._opened: dict[str, Group] = {}
        self._groups = RedisGroups(self._client, self._keys)

    def exclusive(self) -> AbstractContextManager[None]:
        """Held while groups are made and dropped; renewed by a thread as long as this process lives."""
        return self._groups.exclusive()

    def groups(self) -> Mapping[str, int]:
        """Filled group -> Delta version it was filled from."""
        return {name: group.version for name, group in self._groups.standing().items() if group.state == "ready"}

    def open(self, views: Iterable[View]) -> None:
        """Refer to the groups of `views` as they stand now."""
        standing = self._groups.standing()
        wanted = {view.group for view in views}
        found = {name: group for name, group in standing.items() if name in wanted and group.state == "ready"}
        self._opened = {**{n: g for n, g in self._opened.items() if n not in wanted}, **found}

    def reserve(self, view: View, version: int) -> bool:
        """Announce that the view's group will be filled from `version`; from now on the contract's changes wait for it."""
        return self._groups.reserve(view, version)

    def fill(self, view: View, content: Content, *, version: int, followed: Followed | None) -> None:
        """Make the view's group from the lake at `version`."""
        self._groups.fill(view, content, version=version, followed=followed)
        self.open([view])

    def keep(self, groups: Iterable[str]) -> None:
        """Retire every group that is not named: `tidy` removes it once no replica can be reading it."""
        wanted = set(groups)
        self._groups.keep(wanted)
        self._opened = {name: group for name, group in self._opened.items() if name in wanted}

    def tidy(self) -> None:
        """Remove groups that were retired a while ago, and what failed fills left."""
        self._groups.tidy()

    def is_intact(self) -> bool:
        """Whether every group that was opened is still there."""
        standing = self._groups.standing()
        return all(name in standing and standing[name].id == group.id for name, group in self._opened.items())

    def followed(self) -> Mapping[str, Followed]:
        """Progress by contract."""
        found = asked(lambda: self._client.hgetall(self._keys.followed))
        return {contract.decode(): Progress.parse(text).followed for contract, text in found.items()}

    def positions(self) -> Mapping[TopicPartition, int]:
        """Next bus offset to read."""

        def read() -> list[tuple[str, Mapping[bytes, bytes]]]:
            topics = [topic.decode() for topic in self._client.smembers(self._keys.topics())]
            pipe = self._client.pipeline(transaction=False)
            for topic in topics:
                pipe.hgetall(self._keys.positions(topic))
            return list(zip(topics, pipe.execute(), strict=True))

        return {
            TopicPartition(topic, int(partition)): int(offset)
            for topic, found in asked(read)
            for partition, offset in found.items()
        }

    def seen(self, marks: Sequence[Mark]) -> Collection[Mark]:
        """Those of some batches that were applied, or are older than those remembered."""
        sources: dict[tuple[str, str], list[int]] = {}
        for contract, source, offset in marks:
            sources.setdefault((contract, source), []).append(offset)

        def read() -> list[Any]:
            pipe = self._client.pipeline(transaction=False)
            for (contract, source), offsets in sources.items():
                name = self._keys.seen(contract, source)
                pipe.zmscore(name, [str(offset) for offset in offsets]).zrange(name, 0, 0, withscores=True).zcard(name)
            return list(pipe.execute())

        replies = iter(asked(read)) if sources else iter(())
        found: list[Mark] = []
        for (contract, source), offsets in sources.items():
            scores, oldest, count = next(replies), next(replies), next(replies)
            forgotten = oldest[0][1] if count >= SEEN_PER_SOURCE else float("-inf")
            applied = zip(offsets, scores, strict=True)
            found += [(contract, source, at) for at, score in applied if score is not None or at < forgotten]
        return found

    def apply(self, change: Change) -> None:
        """One transaction: the effects, the progress, the batches seen and the positions."""

        def attempt(pipe: Any) -> None:
            writer = ChangeWriter(self._client, self._keys, self._opened, change)
            writer.read()
            pipe.multi()
            writer.write(pipe)
            pipe.execute()

        topics = sorted({place.topic for place in change.positions})
        transaction(self._client, attempt, self._keys.groups, *map(self._keys.positions, topics))

    def prune(self, view: View, before_us: int, head_before_us: int) -> None:
        """Forget what no read at or after the bounds needs; tiles by whole hash fields."""
        group = self._opened.get(view.group)
        if group is None:
            return
        names = self._keys.entities(group.id)
        for part in in_parts(asked(lambda: list(self._client.sscan_iter(names, count=1000)))):
            asked(lambda part=part: self._prune(view, group, [m.decode() for m in part], before_us, head_before_us))  # type: ignore[misc]

    def _prune(self, view: View, group: Group, entities: Sequence[str], before_us: int, head_before_us: int) -> None:
        look = self._client.pipeline(transaction=False)
        remove = self._client.pipeline(transaction=False)
        keys = [
            self._keys.tiles(group.id, e) if isinstance(view, WindowView) else self._keys.rows(group.id, e)
            for e in entities
        ]
        if isinstance(view, WindowView):
            layout, bounds = layout_of(view), (before_us - view.reach_us, head_before_us - view.hop_us)
            for key in keys:
                look.hkeys(key)
            for key, fields in zip(keys, look.execute(), strict=True):
                if old := [field for field in fields if is_outdated(field.decode(), layout, *bounds)]:
                    remove.hdel(key, *old)
        else:
            self._prune_rows(look, remove, view, keys, before_us)
        for entity, key in zip(entities, keys, strict=True):
            names = key, self._keys.entities(group.id), self._keys.newest(entity)
            remove.eval(_FORGET_IF_EMPTY, len(names), *names, entity, group.id)
        remove.execute()

    @staticmethod
    def _prune_rows(look: Any, remove: Any, view: LatestView, keys: Sequence[str], before_us: int) -> None:
        bound = rows_bound_us(view, before_us)
        if view.ttl_us:
            for key in keys:
                remove.zremrangebyscore(key, "-inf", f"({bound}")
            return
        for key in keys:  # the newest row before the bound is what reads at the bound see
            look.zrevrangebyscore(key, f"({bound}", "-inf", start=0, num=1, withscores=True)
        for key, newest in zip(keys, look.execute(), strict=True):
            if newest:
                remove.zremrangebyscore(key, "-inf", f"({int(newest[0][1])}")

    async def fetch(self, asks: Sequence[Ask], contracts: Sequence[str]) -> RedisAnswers:
        """One pipelined round trip."""
        return await self._reader.fetch(asks, contracts, self._opened)

    def keys(self, group: str) -> Sequence[str]:
        """The entities of a newest-row view's group."""
        found = self._opened.get(group)
        if found is None:
            raise rebuilding(group)
        names = self._keys.entities(found.id)
        return [name.decode() for name in asked(lambda: set(self._client.sscan_iter(names, count=1000)))]

    def entities(self) -> int:
        """Entities with at least one tile or row, over all groups that are in use."""
        groups = [group for group in self._groups.standing().values() if group.state == "ready"]

        def read() -> int:
            pipe = self._client.pipeline(transaction=False)
            for group in groups:
                pipe.scard(self._keys.entities(group.id))
            return sum(pipe.execute())

        return asked(read)

    async def close(self) -> None:
        """Disconnect."""
        self._client.close()
        await self._reader.close()
