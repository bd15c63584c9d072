"""Applying definitions: compile, check against the lake, keep, and hand over to the stream worker."""

import asyncio
import contextlib
import functools
import hashlib
from collections import Counter
from pathlib import Path

from millrace_kit.clock import Clock
from millrace_kit.errors import InvalidArgumentError, NotFoundError

from millrace_feature.canonical import FIELD
from millrace_feature.catalog import Catalog, Stored
from millrace_feature.compiler import compile_registry
from millrace_feature.feast_files import write_feast_files
from millrace_feature.lake import NO_TABLE, Lake
from millrace_feature.plan import Definitions, LatestView
from millrace_feature.settings import FeatureSettings
from millrace_feature.transformers.attach import Pinned
from millrace_feature.versioning.access import Access, Audit, Caller, Resource, split_permissions
from millrace_feature.versioning.changes import changes_between
from millrace_feature.versioning.history import Pin, Versions
from millrace_feature.worker import StreamWorker

REMEMBERED = 64
"""Registries remembered by their bytes, so that applying the same repository again costs nothing."""


class Applier:
    """Takes definitions in; one at a time."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        lake: Lake,
        worker: StreamWorker,
        pinned: Pinned,
        versions: Versions,
        access: Access,
        audit: Audit,
        settings: FeatureSettings,
        clock: Clock,
    ) -> None:
        self._catalog = catalog
        self._lake = lake
        self._worker = worker
        self._pinned = pinned
        self._versions = versions
        self._access = access
        self._audit = audit
        self._settings = settings
        self._clock = clock
        self._turn = asyncio.Lock()
        self._known: dict[str, str] = {}

    async def apply(self, project: str, content: bytes, caller: Caller) -> tuple[str, bool]:
        """Make a serialized Feast registry the current definitions, and its permissions those in force.

        Returns:
            (definitions hash, whether they were not current before). Reads change over once new views are filled; this waits for it, but at
            most `apply_wait_s`.

        Raises:
            InvalidArgumentError: they cannot be read or computed.
            FailedPreconditionError: a table exists and lacks a column they need.
            AccessDeniedError: the caller may not change one of the objects; nothing is changed then.
        """
        self._check_size(content)
        async with self._turn:
            changed, digest = await asyncio.to_thread(self._apply, project, content, caller)
            if not changed:
                return digest, False
            done = await self._switch()
        await self._wait(done)
        return digest, True

    def _apply(self, project: str, content: bytes, caller: Caller) -> tuple[bool, str]:
        stripped, permissions = split_permissions(content)
        compiled = self._compiled(project, stripped)
        digest = compiled.definitions.digest
        changes = changes_between(self.registry() or b"", compiled.registry)
        self._access.check_changes(caller, [need for change in changes for need in change.needs])
        self._access.replace(caller, permissions)
        at, kept_s = self._clock.now(), self._settings.previous_kept_s
        changed = self._catalog.apply(
            compiled.definitions, compiled.registry, at, author=caller.name[:256], kept_s=kept_s
        )
        if changed:
            kinds = Counter(change.kind for change in changes)
            detail = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            self._audit.add(caller, "apply", digest, allowed=True, detail=detail)
        return changed, digest

    async def roll_back(self, digest: str, caller: Caller) -> bool:
        """Put definitions in force again that were; false when they are. Reads change over with the data, as after `apply`.

        Raises:
            NotFoundError: they never were in force here.
            AccessDeniedError: the caller may not change one of the objects that differ.
        """
        async with self._turn:
            if not await asyncio.to_thread(self._roll_back, digest, caller):
                return False
            done = await self._switch()
        await self._wait(done)
        return True

    def _roll_back(self, digest: str, caller: Caller) -> bool:
        changes = changes_between(self.registry() or b"", self._catalog.get(digest).registry)
        self._access.check_changes(caller, [need for change in changes for need in change.needs])
        at, kept_s = self._clock.now(), self._settings.previous_kept_s
        changed = self._versions.roll_back(digest, at=at, author=caller.name[:256], kept_s=kept_s)
        if changed:
            self._audit.add(caller, "rollback", digest, allowed=True)
        return changed

    async def pin(self, pin: Pin, caller: Caller) -> None:
        """Have definitions served beside those in force; waits as `apply` does.

        Raises:
            NotFoundError: there are no such definitions.
            ResourceExhaustedError: there are too many pins.
            FailedPreconditionError: a table lacks a column they need.
            AccessDeniedError: the caller may not update the feature services in them.
        """
        async with self._turn:
            await asyncio.to_thread(self._pin, pin, caller)
            if pin.digest in self._worker.wanted_digests:
                return
            done = await self._switch()
        await self._wait(done)

    def _pin(self, pin: Pin, caller: Caller) -> None:
        definitions = self._catalog.get(pin.digest).definitions
        self._may_pin(definitions, caller)
        self._check(definitions)
        self._versions.pin(pin)
        self._audit.add(caller, "pin", pin.digest, allowed=True, detail=pin.name)

    async def unpin(self, digest: str, name: str, caller: Caller) -> None:
        """Take a pin away; what nobody else pins is no longer served.

        Raises:
            NotFoundError: there is no such pin.
            AccessDeniedError: as of `pin`.
        """

        def unpin() -> None:
            self._may_pin(self._catalog.get(digest).definitions, caller)
            self._versions.unpin(digest, name)
            self._audit.add(caller, "unpin", digest, allowed=True, detail=name)

        async with self._turn:
            await asyncio.to_thread(unpin)
        await self.refresh()

    def _may_pin(self, definitions: Definitions, caller: Caller) -> None:
        self._access.check_changes(
            caller, [("update", Resource("FeatureService", plan.name, {})) for plan in definitions.services]
        )

    async def refresh(self) -> None:
        """Follow what is in force and pinned, when that has changed."""
        if await asyncio.to_thread(self._versions.live) == self._worker.wanted_digests:
            return
        async with self._turn:
            await self._switch()

    def registry(self) -> bytes | None:
        """The canonical registry in force; None before there is one."""
        current = self._catalog.current()
        return current.registry if current is not None else None

    def compiled(self, project: str, content: bytes) -> Stored:
        """What a serialized registry would be, without applying it. Errors are those of `apply`."""
        self._check_size(content)
        return self._compiled(project, split_permissions(content)[0])

    async def _switch(self) -> asyncio.Event:
        live = await asyncio.to_thread(self._versions.live)
        if not live:
            nothing = asyncio.Event()
            nothing.set()
            return nothing
        current, *kept = await asyncio.to_thread(lambda: [self._catalog.get(digest).definitions for digest in live])
        self._access.forget()
        return self._worker.switch(current, kept)

    async def _wait(self, done: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.apply_wait_s):
                await done.wait()

    def _check_size(self, content: bytes) -> None:
        limit = self._settings.max_registry_mib * 1024 * 1024
        if not content:
            raise InvalidArgumentError(FIELD, "must not be empty")
        if len(content) > limit:
            raise InvalidArgumentError(FIELD, f"is larger than {self._settings.max_registry_mib} MiB")

    def _compiled(self, project: str, content: bytes) -> Stored:
        mark = hashlib.sha256(project.encode() + b"\0" + content).hexdigest()
        if mark in self._known:
            with contextlib.suppress(NotFoundError):  # compiled for a comparison and not applied
                return self._catalog.get(self._known[mark])
        compiled = compile_registry(project, content, self._pinned)
        self._check(compiled.definitions)
        write_feast_files(Path(self._settings.state_dir) / "feast", project, compiled.registry)
        if len(self._known) >= REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[mark] = compiled.definitions.digest
        return Stored(compiled.definitions, compiled.registry)

    def _check(self, definitions: Definitions) -> None:
        """Tables that exist have the columns the views need."""
        newest = functools.cache(self._lake.newest_version)
        for view in definitions.views:
            version = newest(view.contract)
            if version == NO_TABLE:
                continue
            columns = (
                (view.event_time, *view.join_keys, *view.features)
                if isinstance(view, LatestView)
                else view.source_columns
            )
            with self._lake.query({view.contract: version}) as query:
                query.need(view.contract, columns, f"view {view.name}")
