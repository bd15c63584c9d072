"""Which groups stand in Redis: made by one replica at a time, retired when no definitions name them, removed later."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from millrace_kit.clock import uuid7
from millrace_kit.errors import FailedPreconditionError, UnavailableError
from redis.exceptions import LockError, RedisError

from millrace_feature.plan import View, WindowView
from millrace_feature.redis_calls import asked, transaction
from millrace_feature.redis_changes import in_parts, put_fields, put_rows
from millrace_feature.redis_layout import Group, Keys, Progress, parse_groups
from millrace_feature.rows import Row
from millrace_feature.store import Content, Followed, StoreMovedError, rows_of, tiles_of
from millrace_feature.tile_fields import FieldChange, layout_of

log = logging.getLogger(__name__)

FORMAT = b"1"
LOCK_S = 30.0
"""A replica that was killed while it filled holds the lock this long."""
LOCK_WAIT_S = 1.0
RETIRED_S = 30.0
"""Groups that no definitions name any more stay readable this long, for replicas that have not noticed yet."""


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class RedisGroups:
    """The life of groups; see `OnlineStore` for what the methods promise."""

    def __init__(self, client: Any, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._reserved: dict[str, Group] = {}

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Held while groups are made and dropped; renewed by a thread as long as this process lives."""
        lock = self._client.lock(self._keys.lock, timeout=LOCK_S, thread_local=False)
        if not asked(lambda: lock.acquire(blocking_timeout=LOCK_WAIT_S)):
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
        found = asked(lambda: self._client.set(self._keys.format, FORMAT, nx=True, get=True))
        if found not in {None, FORMAT}:
            message = f"the online store has format {found!r}, this version reads {FORMAT!r}; use another prefix"
            raise FailedPreconditionError("STORE_FORMAT", message, {"format": str(found)})
        memory = asked(lambda: self._client.info("memory"))
        if memory.get("maxmemory") and memory.get("maxmemory_policy") != "noeviction":
            message = f"Redis may evict values ({memory['maxmemory_policy']}); set maxmemory-policy to noeviction"
            raise FailedPreconditionError("STORE_EVICTS", message, {"policy": str(memory["maxmemory_policy"])})

    def standing(self) -> dict[str, Group]:
        """Every group, in whatever state."""
        return parse_groups(asked(lambda: self._client.hgetall(self._keys.groups)))

    def reserve(self, view: View, version: int) -> bool:
        """Announce that the view's group will be filled from `version`; from now on the contract's changes wait for it."""
        columns = len(view.columns) if isinstance(view, WindowView) else 0
        group = Group(uuid7()[-17:].replace("-", ""), view.contract, version, columns, "filling", _now_ms())

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
        done = transaction(self._client, attempt, self._keys.groups, self._keys.followed)
        if done:
            self._reserved[view.group] = group
        return done

    def fill(self, view: View, content: Content, *, version: int, followed: Followed | None) -> None:
        """Make the view's group from the lake at `version`."""
        group = self._reserved.pop(view.group)
        items: Sequence[tuple[str, dict[str, bytes]] | Row] = rows_of(content)
        if isinstance(view, WindowView):
            items = FieldChange(layout_of(view), tiles_of(content)).content(None)
        for part in in_parts(items):
            if self.standing().get(view.group) != group:
                raise StoreMovedError(f"group {view.group} was reserved by another replica")
            asked(lambda part=part: self._put(group, part))  # type: ignore[misc]
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

        transaction(self._client, attempt, self._keys.groups, self._keys.followed)

    def _put(self, group: Group, part: Sequence[tuple[str, dict[str, bytes]] | Row]) -> None:
        pipe = self._client.pipeline(transaction=False)
        fields = [item for item in part if isinstance(item, tuple)]
        put_fields(pipe, [(self._keys.tiles(group.id, entity), content) for entity, content in fields])
        rows = [item for item in part if isinstance(item, Row)]
        put_rows(pipe, self._keys, group, rows)
        entities = {entity for entity, _content in fields} | {row.key for row in rows}
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

        transaction(self._client, attempt, self._keys.groups)

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

        transaction(self._client, attempt, self._keys.groups)
        for group_id in asked(lambda: self._client.smembers(self._keys.trash)):
            asked(lambda group_id=group_id: self._sweep(group_id.decode()))  # type: ignore[misc]

    def _sweep(self, group_id: str) -> None:
        """Remove the keys of one id; may be cut off and begun again anywhere."""
        names = self._keys.entities(group_id)
        while members := self._client.srandmember(names, 1000):
            entities = [member.decode() for member in members]
            doomed = [self._keys.tiles(group_id, entity) for entity in entities]
            doomed += [self._keys.rows(group_id, entity) for entity in entities]
            pipe = self._client.pipeline(transaction=False)
            pipe.unlink(*doomed)
            for entity in entities:
                pipe.hdel(self._keys.newest(entity), group_id)
            pipe.srem(names, *members)
            pipe.execute()
        self._client.srem(self._keys.trash, group_id)
