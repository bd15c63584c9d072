"""Applying definitions: compile, check against the lake, keep, and hand over to the stream worker."""

import asyncio
import functools
import hashlib
from pathlib import Path

from millrace_kit.clock import Clock
from millrace_kit.errors import InvalidArgumentError

from millrace_feature.catalog import Catalog, Stored
from millrace_feature.compiler import FIELD, compile_registry
from millrace_feature.feast_files import write_feast_files
from millrace_feature.lake import NO_TABLE, Lake
from millrace_feature.plan import Definitions, LatestView
from millrace_feature.settings import FeatureSettings
from millrace_feature.transformers.attach import Pinned
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
        settings: FeatureSettings,
        clock: Clock,
    ) -> None:
        self._catalog = catalog
        self._lake = lake
        self._worker = worker
        self._pinned = pinned
        self._settings = settings
        self._clock = clock
        self._turn = asyncio.Lock()
        self._known: dict[str, str] = {}

    async def apply(self, project: str, content: bytes) -> tuple[str, bool]:
        """Make a serialized Feast registry the current definitions.

        Returns:
            (definitions hash, whether they were not current before). Reads change over once new views are filled; this waits for it, but at
            most `apply_wait_s`.

        Raises:
            InvalidArgumentError: they cannot be read or computed.
            FailedPreconditionError: a table exists and lacks a column they need.
        """
        limit = self._settings.max_registry_mib * 1024 * 1024
        if not content:
            raise InvalidArgumentError(FIELD, "must not be empty")
        if len(content) > limit:
            raise InvalidArgumentError(FIELD, f"is larger than {self._settings.max_registry_mib} MiB")
        async with self._turn:
            compiled = await asyncio.to_thread(self._compiled, project, content)
            definitions = compiled.definitions
            changed = await asyncio.to_thread(self._catalog.apply, definitions, compiled.registry, self._clock.now())
            if not changed:
                return definitions.digest, False
            done = self._worker.switch(definitions)
        try:
            async with asyncio.timeout(self._settings.apply_wait_s):
                await done.wait()
        except TimeoutError:
            pass
        return definitions.digest, True

    def _compiled(self, project: str, content: bytes) -> Stored:
        mark = hashlib.sha256(project.encode() + b"\0" + content).hexdigest()
        if mark in self._known:
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
