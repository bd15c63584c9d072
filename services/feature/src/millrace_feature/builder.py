"""From a request to a stored training set: resolve, build, store, record."""

import asyncio
import json
import tempfile
import time
from pathlib import Path

from millrace_api.common.v1 import common_pb2
from millrace_api.feature.v1 import feature_pb2
from millrace_kit.clock import Clock
from millrace_kit.content import ContentStore
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, ResourceExhaustedError

from millrace_feature.catalog import Catalog
from millrace_feature.convert import labels_of, now_timestamp, versions_of
from millrace_feature.lake import Lake
from millrace_feature.metrics import BUILD_ROWS, BUILD_SECONDS
from millrace_feature.named import named_plan
from millrace_feature.plan import Definitions, ServicePlan
from millrace_feature.set_pins import SetPins
from millrace_feature.settings import FeatureSettings
from millrace_feature.training import Build, Built, contracts_of

MANIFEST_FORMAT = 1


class Builder:
    """Builds training sets, at most `max_builds` at once."""

    def __init__(
        self,
        *,
        lake: Lake,
        catalog: Catalog,
        content: ContentStore,
        pins: SetPins,
        settings: FeatureSettings,
        clock: Clock,
    ) -> None:
        self._lake = lake
        self._catalog = catalog
        self._content = content
        self._pins = pins
        self._settings = settings
        self._clock = clock
        self._turns = asyncio.Semaphore(settings.max_builds)
        self._waiting = 0

    async def build(self, request: feature_pb2.BuildTrainingSetRequest) -> feature_pb2.TrainingSet:
        """The training set a checked request describes; the same request on the same data gives the same one."""
        labels = labels_of(request)
        definitions = await asyncio.to_thread(self._definitions, request.definitions_hash)
        plan = definitions.service(request.feature_service)
        if plan is None and (request.feature_service or not request.features):
            raise NotFoundError("feature service", request.feature_service)
        if request.features:
            plan = named_plan(definitions, request.features, plan)
        assert plan is not None
        if clash := {"event_time", labels.join_column, labels.label_column} & set(plan.features):
            raise InvalidArgumentError("label_column", f"{clash.pop()!r} is the name of a feature")
        tables = contracts_of(plan, definitions, labels)
        versions = versions_of(request, tables)
        if self._waiting >= self._settings.max_builds + self._settings.max_queued_builds:
            raise ResourceExhaustedError("max_queued_builds", f"{self._waiting} builds run or wait; retry later")
        self._waiting += 1
        try:
            async with self._turns:
                for table in tables:
                    if table not in versions:
                        versions[table] = await asyncio.to_thread(self._lake.newest_version, table)
                exact = _exact(request, definitions, versions)
                await self._pins.hold(exact)
                work = Build(
                    self._lake, plan, definitions, labels,
                    max_rows=self._settings.max_training_rows, rows_at_once=self._settings.build_rows,
                )  # fmt: skip
                running = asyncio.ensure_future(asyncio.to_thread(self._make, work, exact, plan, versions))
                try:
                    made = await asyncio.shield(running)
                except asyncio.CancelledError:
                    work.cancel()
                    await asyncio.wait([running])
                    running.exception()
                    raise
                made.pin_owner = await self._pins.keep(made)
                return await asyncio.to_thread(self._recorded, made)
        finally:
            self._waiting -= 1

    def _definitions(self, digest: str) -> Definitions:
        stored = self._catalog.get(digest) if digest else self._catalog.current()
        if stored is None:
            raise FailedPreconditionError("NO_DEFINITIONS", "no definitions are applied yet")
        return stored.definitions

    def _make(
        self, work: Build, exact: feature_pb2.BuildTrainingSetRequest, plan: ServicePlan, versions: dict[str, int]
    ) -> feature_pb2.TrainingSet:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=_made(Path(self._settings.state_dir) / "builds")) as folder:
            built = work.run(versions, Path(folder) / "data.parquet")
            data = common_pb2.Artifact(
                path="data.parquet", sha256=self._content.put_file(built.path), size_bytes=built.path.stat().st_size
            )
        digest = self._content.put_bytes(manifest(exact, plan, data, built))
        training_set = feature_pb2.TrainingSet(
            digest=digest,
            data=data,
            store_url=self._content.url,
            feature_service=plan.name,
            feature_names=plan.features,
            label_column=exact.label_column,
            definitions_hash=exact.definitions_hash,
            table_versions=exact.table_versions,
            rows=built.rows,
            rows_without_label=built.rows_without_label,
            time_range=exact.time_range if exact.HasField("time_range") else None,
            created_at=now_timestamp(self._clock.now()),
            request=exact,
        )
        BUILD_SECONDS.observe(time.perf_counter() - started)
        BUILD_ROWS.inc(built.rows)
        return training_set

    def _recorded(self, made: feature_pb2.TrainingSet) -> feature_pb2.TrainingSet:
        """The record of a set: the first one, with the pins there are now."""
        kept = feature_pb2.TrainingSet.FromString(self._catalog.put_training_set(made.digest, made.SerializeToString()))
        if kept.pin_owner != made.pin_owner and made.pin_owner:
            kept.pin_owner = made.pin_owner
            self._catalog.replace_training_set(made.digest, kept.SerializeToString())
        return kept


def _exact(
    request: feature_pb2.BuildTrainingSetRequest, definitions: Definitions, versions: dict[str, int]
) -> feature_pb2.BuildTrainingSetRequest:
    """`request` with the definitions and versions it means now."""
    exact = feature_pb2.BuildTrainingSetRequest()
    exact.CopyFrom(request)
    exact.definitions_hash = definitions.digest
    del exact.table_versions[:]
    exact.table_versions.extend(common_pb2.TableVersion(table=t, version=versions[t]) for t in sorted(versions))
    return exact


def manifest(
    request: feature_pb2.BuildTrainingSetRequest, plan: ServicePlan, data: common_pb2.Artifact, built: Built
) -> bytes:
    """What a training set is, as canonical JSON; its SHA-256 is the set's digest."""
    content = {
        "format": MANIFEST_FORMAT,
        "definitions_hash": request.definitions_hash,
        "feature_service": plan.name,
        "feature_names": plan.features,
        "entity_contract": request.entity_contract,
        "label_contract": request.label_contract,
        "join_column": request.join_column,
        "label_column": request.label_column,
        "start": request.time_range.start.ToJsonString() if request.time_range.HasField("start") else None,
        "end": request.time_range.end.ToJsonString() if request.time_range.HasField("end") else None,
        "known_at": request.known_at.ToJsonString() if request.HasField("known_at") else None,
        "tables": {item.table: item.version for item in request.table_versions},
        "data": {"path": data.path, "sha256": data.sha256, "size_bytes": data.size_bytes},
        "rows": built.rows,
        "rows_without_label": built.rows_without_label,
        **({"named": True} if request.features else {}),
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
