"""The online store of a cluster: Redis, shared by every replica of the feature service.

Any replica answers any read. The replicas share the partitions of the records topics, and each change is one transaction that holds the
effects and the bus positions after them. It goes through only while the positions stand where its messages were read from and the groups
are those it was computed for (WATCH), so after kill -9, a rebalance or a change of definitions nothing counts twice and nothing is lost:
whoever loses reads positions and groups again.

One replica at a time fills a new group from the lake, holding a lock; the contract's changes wait meanwhile. Everything the service needs
lies in one Redis and goes back in time together, so a Redis that comes up empty or from an old snapshot is followed again from where it
stands; groups that are missing are filled from the lake. Redis must not evict (`maxmemory-policy noeviction`).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import redis
import redis.asyncio
from millrace_kit.bus import TopicPartition
from millrace_kit.clock import uuid7
from millrace_kit.errors import FailedPreconditionError, UnavailableError
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import LockError, RedisError, WatchError
from redis.retry import Retry

from millrace_feature.plan import LatestView, View, WindowView
from millrace_feature.redis_changes import SEEN_PER_SOURCE, ChangeWriter, Piece, group_commands, in_parts
from millrace_feature.redis_layout import CHUNK_HOPS, Group, Keys, Progress, pack_row, parse_groups
from millrace_feature.redis_reads import RedisAnswers, RedisReader, unavailable
from millrace_feature.rows import Row
from millrace_feature.settings import RedisSettings
from millrace_feature.store import Ask, Change, Followed, StoreMovedError, rows_bound_us
from millrace_feature.tiles import Tiles

log = logging.getLogger(__name__)

FORMAT = b"1"
LOCK_S = 30.0
"""A replica that was killed while it filled holds the lock this long."""
LOCK_WAIT_S = 1.0
ATTEMPTS = 20
"""Tries of a transaction that others disturb."""
RETIRED_S = 30.0
"""Groups that no definitions name any more stay readable this long, for replicas that have not noticed yet."""

T = TypeVar("T")

_FORGET_IF_EMPTY = "if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('SREM', KEYS[2], ARGV[1]) end"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


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
        if settings.ca_file:
            common["ssl_ca_certs"] = settings.ca_file
        self._keys = Keys(settings.prefix)
        self._client = redis.Redis.from_url(
            settings.url, socket_timeout=settings.write_timeout_s, retry=Retry(NoBackoff(), 0), **common
        )
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            settings.url,
            socket_timeout=settings.read_timeout_s,
            timeout=settings.read_timeout_s,
            retry=AsyncRetry(NoBackoff(), 0),
            **common,
        )
        self._reader = RedisReader(redis.asyncio.Redis.from_pool(pool), self._keys, settings.read_timeout_s)
        self._opened: dict[str, Group] = {}
        self._reserved: dict[str, Group] = {}

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Held while groups are made and dropped; renewed by a thread as long as this process lives."""
        lock = self._client.lock(self._keys.lock, timeout=LOCK_S, thread_local=False)
        if not _asked(lambda: lock.acquire(blocking_timeout=LOCK_WAIT_S)):
            raise UnavailableError("ONLINE_STORE_BUSY", "another replica fills the online store")
        released = threading.Event()

        def renew() -> None:
            while not released.wait(LOCK_S / 3):
                try:
                    lock.reacquire()
                except RedisError as error:  # what is filled without the lock is refused at its end
                    log.warning("the lock of the online store could not be renewed: %s", error)

        renewing = threading.Thread(target=renew, name="online-store-lock", daemon=True)
        renewing.start()
        try:
            self._check_server()
            yield
        finally:
            released.set()
            renewing.join()
            try:
                lock.release()
            except (LockError, RedisError) as error:
                log.warning("the lock of the online store was lost: %s", error)

    def _check_server(self) -> None:
        """Refuse a store of another format, and a Redis that may drop values by itself."""
        found = _asked(lambda: self._client.set(self._keys.format, FORMAT, nx=True, get=True))
        if found not in {None, FORMAT}:
            message = f"the online store has format {found!r}, this version reads {FORMAT!r}; use another prefix"
            raise FailedPreconditionError("STORE_FORMAT", message, {"format": str(found)})
        memory = _asked(lambda: self._client.info("memory"))
        if memory.get("maxmemory") and memory.get("maxmemory_policy") != "noeviction":
            message = f"Redis may evict values ({memory['maxmemory_policy']}); set maxmemory-policy to noeviction"
            raise FailedPreconditionError("STORE_EVICTS", message, {"policy": str(memory["maxmemory_policy"])})

    def _standing(self) -> dict[str, Group]:
        return parse_groups(_asked(lambda: self._client.hgetall(self._keys.groups)))

    def groups(self) -> Mapping[str, int]:
        """Filled group -> Delta version it was filled from."""
        return {name: group.version for name, group in self._standing().items() if group.state == "ready"}

    def open(self, views: Iterable[View]) -> None:
        """Refer to the groups of `views` as they stand now."""
        standing = self._standing()
        wanted = {view.group for view in views}
        found = {name: group for name, group in standing.items() if name in wanted and group.state == "ready"}
        self._opened = {**{n: g for n, g in self._opened.items() if n not in wanted}, **found}

    def reserve(self, view: View, version: int) -> bool:
        """Announce that the view's group will be filled from `version`; from now on the contract's changes wait for it."""
        columns = len(view.columns) if isinstance(view, WindowView) else 0
        group = Group(uuid7().replace("-", ""), view.contract, version, columns, "filling", _now_ms())

        def attempt(pipe: Any) -> bool:
            standing = parse_groups(pipe.hgetall(self._keys.groups))
            progress = pipe.hget(self._keys.followed, view.contract)
            if progress is not None and Progress.parse(progress).applied > version:
                return False
            pipe.multi()
            if view.group in standing:  # of a fill that failed, or not in use any more
                pipe.sadd(self._keys.trash, standing[view.group].id)
            pipe.hset(self._keys.groups, view.group, group.text())
            pipe.execute()
            return True

        # Each change of the contract's progress changes a position too, and the positions' topic is not known here.
        done = self._transaction(attempt, self._keys.groups, self._keys.followed)
        if done:
            self._reserved[view.group] = group
        return done

    def fill(self, view: View, content: Tiles | Sequence[Row], *, version: int, followed: Followed | None) -> None:
        """Make the view's group from the lake at `version`."""
        group = self._reserved.pop(view.group)
        for part in in_parts(group_commands(content)):
            if self._standing().get(view.group) != group:
                raise StoreMovedError(f"group {view.group} was reserved by another replica")
            _asked(lambda part=part: self._put(group, part))  # type: ignore[misc]
        ready = Group(group.id, group.contract, version, group.columns, "ready", _now_ms())

        def attempt(pipe: Any) -> None:
            if parse_groups(pipe.hgetall(self._keys.groups)).get(view.group) != group:
                raise StoreMovedError(f"group {view.group} was reserved by another replica")
            progress = pipe.hget(self._keys.followed, view.contract)
            pipe.multi()
            pipe.hset(self._keys.groups, view.group, ready.text())
            if followed is not None:
                applied = max(version, Progress.parse(progress).applied if progress is not None else -1)
                pipe.hset(self._keys.followed, view.contract, Progress(followed, applied).text())
            pipe.execute()

        self._transaction(attempt, self._keys.groups, self._keys.followed)
        self.open([view])

    def _put(self, group: Group, part: Sequence[Piece | Row]) -> None:
        pipe = self._client.pipeline(transaction=False)
        entities: set[str] = set()
        for item in part:
            if isinstance(item, Piece):
                pipe.hset(self._keys.tiles(group.id, item.entity), item.chunk, item.run.pack())
                entities.add(item.entity)
            else:
                key = self._keys.rows(group.id, item.key)
                pipe.zadd(key, {pack_row(item.time_us, item.values): item.time_us})
                entities.add(item.key)
        pipe.sadd(self._keys.entities(group.id), *entities)
        pipe.execute()

    def keep(self, groups: Iterable[str]) -> None:
        """Retire every group that is not named: `tidy` removes it once no replica can be reading it."""
        wanted = set(groups)

        def attempt(pipe: Any) -> None:
            standing = parse_groups(pipe.hgetall(self._keys.groups))
            pipe.multi()
            for name, group in standing.items():
                if name in wanted or group.state == "retired":
                    continue
                retired = Group(group.id, group.contract, group.version, group.columns, "retired", _now_ms())
                pipe.hset(self._keys.groups, name, retired.text())
            pipe.execute()

        self._transaction(attempt, self._keys.groups)
        self._opened = {name: group for name, group in self._opened.items() if name in wanted}

    def tidy(self) -> None:
        """Remove groups that were retired a while ago, and what failed fills left."""
        before_ms = _now_ms() - int(RETIRED_S * 1000)

        def attempt(pipe: Any) -> None:
            standing = parse_groups(pipe.hgetall(self._keys.groups))
            pipe.multi()
            for name, group in standing.items():
                if group.state == "retired" and group.since_ms < before_ms:
                    pipe.sadd(self._keys.trash, group.id)
                    pipe.hdel(self._keys.groups, name)
            pipe.execute()

        self._transaction(attempt, self._keys.groups)
        for group_id in _asked(lambda: self._client.smembers(self._keys.trash)):
            _asked(lambda group_id=group_id: self._sweep(group_id.decode()))  # type: ignore[misc]

    def _sweep(self, group_id: str) -> None:
        """Remove the keys of one id; may be cut off and begun again anywhere."""
        names = self._keys.entities(group_id)
        while members := self._client.srandmember(names, 1000):
            entities = [member.decode() for member in members]
            doomed = [self._keys.tiles(group_id, entity) for entity in entities]
            doomed += [self._keys.rows(group_id, entity) for entity in entities]
            self._client.unlink(*doomed)
            self._client.srem(names, *members)
        self._client.srem(self._keys.trash, group_id)

    def is_intact(self) -> bool:
        """Whether every group that was opened is still there."""
        standing = self._standing()
        return all(name in standing and standing[name].id == group.id for name, group in self._opened.items())

    def followed(self) -> Mapping[str, Followed]:
        """Progress by contract."""
        found = _asked(lambda: self._client.hgetall(self._keys.followed))
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
            for topic, found in _asked(read)
            for partition, offset in found.items()
        }

    def is_seen(self, contract: str, source: str, source_offset: int) -> bool:
        """Whether that batch was applied, or is older than those remembered."""
        name = self._keys.seen(contract, source)

        def read() -> tuple[float | None, list[tuple[bytes, float]], int]:
            pipe = self._client.pipeline(transaction=False)
            pipe.zscore(name, str(source_offset)).zrange(name, 0, 0, withscores=True).zcard(name)
            score, oldest, count = pipe.execute()
            return score, oldest, count

        score, oldest, count = _asked(read)
        return score is not None or (count >= SEEN_PER_SOURCE and source_offset < oldest[0][1])

    def apply(self, change: Change) -> None:
        """One transaction: the effects, the progress, the batches seen and the positions."""

        def attempt(pipe: Any) -> None:
            writer.read()
            pipe.multi()
            writer.write(pipe)
            pipe.execute()

        for _attempt in range(ATTEMPTS):
            writer = ChangeWriter(self._client, self._keys, self._opened, change)
            try:
                self._once(attempt, *writer.watched())
            except WatchError:
                continue
            return
        raise UnavailableError("ONLINE_STORE_BUSY", "other replicas change the online store all the time")

    def prune(self, view: View, before_us: int) -> None:
        """Forget what no read at or after `before_us` needs; tiles by whole hash fields."""
        group = self._opened.get(view.group)
        if group is None:
            return
        names = self._keys.entities(group.id)
        for part in in_parts(_asked(lambda: list(self._client.sscan_iter(names, count=1000)))):
            _asked(lambda part=part: self._prune(view, group, [m.decode() for m in part], before_us))  # type: ignore[misc]

    def _prune(self, view: View, group: Group, entities: Sequence[str], before_us: int) -> None:
        look = self._client.pipeline(transaction=False)
        remove = self._client.pipeline(transaction=False)
        keys = [
            self._keys.tiles(group.id, e) if isinstance(view, WindowView) else self._keys.rows(group.id, e)
            for e in entities
        ]
        if isinstance(view, WindowView):
            before_chunk = (before_us - view.reach_us) // view.hop_us // CHUNK_HOPS
            for key in keys:
                look.hkeys(key)
            for key, fields in zip(keys, look.execute(), strict=True):
                if old := [field for field in fields if int(field) < before_chunk]:
                    remove.hdel(key, *old)
        else:
            self._prune_rows(look, remove, view, keys, before_us)
        for entity, key in zip(entities, keys, strict=True):
            remove.eval(_FORGET_IF_EMPTY, 2, key, self._keys.entities(group.id), entity)
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

    def entities(self) -> int:
        """Entities with at least one tile or row, over all groups that are in use."""
        groups = [group for group in self._standing().values() if group.state == "ready"]

        def read() -> int:
            pipe = self._client.pipeline(transaction=False)
            for group in groups:
                pipe.scard(self._keys.entities(group.id))
            return sum(pipe.execute())

        return _asked(read)

    async def close(self) -> None:
        """Disconnect."""
        self._client.close()
        await self._reader.close()

    def _transaction(self, attempt: Callable[[Any], T], *watched: str) -> T:
        for _attempt in range(ATTEMPTS):
            try:
                return self._once(attempt, *watched)
            except WatchError:
                continue
        raise UnavailableError("ONLINE_STORE_BUSY", "other replicas change the online store all the time")

    def _once(self, attempt: Callable[[Any], T], *watched: str) -> T:
        def run() -> T:
            with self._client.pipeline(transaction=True) as pipe:
                pipe.watch(*watched)
                return attempt(pipe)

        return _asked(run)


def _asked(ask: Callable[[], T]) -> T:
    """What Redis answers, its failures as the service's one error."""
    try:
        return ask()
    except WatchError:
        raise
    except (RedisError, OSError) as error:
        raise unavailable(error) from error
