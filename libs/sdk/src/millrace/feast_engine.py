"""Feast's compute engine on Millrace: `feast materialize` waits until the feature service can serve what was asked, and answers as Feast's jobs do.

```yaml
batch_engine:
  type: millrace.feast_engine.MillraceComputeEngine
  address: feature:7402        # or MILLRACE_FEATURE_ADDRESS
  timeout_s: 1800
```
Views fill themselves from the lake and follow the records by themselves, whatever the period: a view is materialized once reads are answered with
it and every record that ingestion had published when the command began is in it. So scripts that materialize and then read keep working,
and end with an error where the service does not serve the view or does not get that far in time. Needs Feast (`pip install millrace[feast]`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import grpc
from feast.infra.common.materialization_job import MaterializationJob, MaterializationJobStatus, MaterializationTask
from feast.infra.common.retrieval_task import HistoricalRetrievalTask
from feast.infra.compute_engines.base import ComputeEngine
from feast.protos.feast.core.Registry_pb2 import Registry
from feast.repo_config import FeastConfigBaseModel
from millrace_api.feature.v1.feature_pb2 import GetDefinitionsRequest, GetProgressRequest, GetProgressResponse
from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub
from millrace_kit.client import open_sync_channel
from millrace_kit.errors import FailedPreconditionError, MillraceError
from pydantic import Field

from millrace.endpoints import Endpoints, tls_from_environment
from millrace.feast_offline import MillraceOfflineStoreConfig, MillraceRetrievalJob, historical_job
from millrace.transport import DEFAULT_TIMEOUT_S, call


class MillraceComputeEngineConfig(FeastConfigBaseModel):  # type: ignore[misc]
    """Settings in `feature_store.yaml`."""

    type: Literal["millrace.feast_engine.MillraceComputeEngine"] = "millrace.feast_engine.MillraceComputeEngine"
    """Chooses this engine."""
    address: str = ""
    """host:port of the feature service; empty takes MILLRACE_FEATURE_ADDRESS, else a local run's. Mutual TLS by MILLRACE_TLS_*."""
    timeout_s: float = Field(default=1800.0, gt=0, le=86_400)
    """Longest wait of one `feast materialize`, all its views together."""
    poll_s: float = Field(default=0.5, gt=0, le=60)
    """Time between two looks at the service's progress; also how often a service that is away is tried again."""


class DeadlineError(MillraceError):
    """The service did not get as far as was asked in `timeout_s`."""

    def __init__(self, view: str, timeout_s: float, state: str) -> None:
        super().__init__(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "MATERIALIZE_TIMEOUT",
            f"view {view}: {state} after {timeout_s:g} s (batch_engine.timeout_s); the service goes on by itself",
            {"view": view, "timeout_s": f"{timeout_s:g}"},
        )


class MillraceMaterializationJob(MaterializationJob):  # type: ignore[misc]
    """A wait that is over."""

    def __init__(self, task: MaterializationTask, error: BaseException | None = None) -> None:
        self.task = task
        self._error = error

    def status(self) -> MaterializationJobStatus:
        """SUCCEEDED or ERROR."""
        return MaterializationJobStatus.ERROR if self._error else MaterializationJobStatus.SUCCEEDED

    def error(self) -> BaseException | None:
        """Why the view is not served as asked."""
        return self._error

    def should_be_retried(self) -> bool:
        """Feast retries nothing itself; asking again is always harmless."""
        return False

    def job_id(self) -> str:
        """View and period."""
        return f"{self.task.feature_view.name}-{self.task.start_time}-{self.task.end_time}"

    def url(self) -> str | None:
        """There is no page."""
        return None


@dataclass
class _Wait:
    """What one `materialize` waits for."""

    definitions_hash: str
    contracts: frozenset[str]
    until: float
    """Monotonic."""
    targets: dict[str, int] = field(default_factory=dict)
    """Offsets after the newest message, when the contracts were first seen."""

    def look(self, progress: GetProgressResponse) -> int | None:
        """Messages that are still to be applied; None while reads are not answered with the definitions."""
        found = {item.contract: item for item in progress.contracts}
        if progress.definitions_hash != self.definitions_hash or not self.contracts <= found.keys():
            return None
        for contract in self.contracts:
            self.targets.setdefault(contract, found[contract].end_offset)
        return sum(max(0, target - found[contract].next_offset) for contract, target in self.targets.items())


class MillraceComputeEngine(ComputeEngine):  # type: ignore[misc]
    """Waits for the service's own filling, and has it compute historical features."""

    def __init__(self, *, repo_config: Any, offline_store: Any, online_store: Any, **given: Any) -> None:
        super().__init__(repo_config=repo_config, offline_store=offline_store, online_store=online_store)
        self._settings = MillraceComputeEngineConfig(**given)
        self._monotonic: Callable[[], float] = time.monotonic
        self._pause: Callable[[float], None] = time.sleep

    @property
    def supports_batch(self) -> bool:
        """Whether all views come in one call: then one deadline holds for all of them."""
        return True

    def update(
        self,
        project: str,
        views_to_delete: Sequence[Any],
        views_to_keep: Sequence[Any],
        entities_to_delete: Sequence[Any],
        entities_to_keep: Sequence[Any],
    ) -> None:
        """Nothing: definitions come into force with `millrace features apply`."""

    def teardown_infra(self, project: str, fvs: Sequence[Any], entities: Sequence[Any]) -> None:
        """Nothing: what the service keeps is the service's."""

    def materialize(
        self,
        registry: Any,  # noqa: ARG002 - Feast's signature
        tasks: MaterializationTask | list[MaterializationTask],
        **_options: Any,
    ) -> list[MaterializationJob]:
        """Wait for every task's view; a job each, those with an error besides those without."""
        wanted = [tasks] if isinstance(tasks, MaterializationTask) else tasks
        started = self._monotonic()
        channel = open_sync_channel(self._address, tls_from_environment())
        with channel:
            stub = FeatureServiceStub(channel)
            try:
                digest, served = _served(stub)
            except MillraceError as error:
                return [MillraceMaterializationJob(task, error) for task in wanted]
            errors = [_unlike(task.feature_view, served) for task in wanted]
            contracts = {_contract(task.feature_view) for task, error in zip(wanted, errors, strict=True) if not error}
            wait = _Wait(digest, frozenset(contracts), started + self._settings.timeout_s)
            failure = self._wait(stub, wait, wanted[0]) if contracts else None
        return [MillraceMaterializationJob(t, e or failure) for t, e in zip(wanted, errors, strict=True)]

    def _wait(self, stub: FeatureServiceStub, wait: _Wait, task: MaterializationTask) -> MillraceError | None:
        """Wait until everything is there; what was in the way otherwise."""
        bar, left = None, None
        state = "its definitions are being filled"
        try:
            while True:
                try:
                    before, left = left, wait.look(call(stub.GetProgress, GetProgressRequest(), self._call_s(wait)))
                    if left is None:  # others may have come into force meanwhile
                        wait.definitions_hash, _views = _served(stub)
                except MillraceError as error:
                    if error.code is not grpc.StatusCode.UNAVAILABLE:
                        return error
                    state = f"the service is away ({error.message})"
                else:
                    if left is not None:
                        state = f"{left} messages are not applied yet"
                        if bar is None and task.tqdm_builder is not None:
                            bar, before = task.tqdm_builder(left), left
                        if bar is not None and before is not None:
                            bar.update(before - left)
                    if left == 0:
                        return None
                if self._monotonic() >= wait.until:
                    return DeadlineError(", ".join(sorted(wait.contracts)), self._settings.timeout_s, state)
                self._pause(min(self._settings.poll_s, max(0.0, wait.until - self._monotonic())))
        finally:
            if bar is not None:
                bar.close()

    def _call_s(self, wait: _Wait) -> float:
        return min(DEFAULT_TIMEOUT_S, max(1.0, wait.until - self._monotonic()))

    def get_historical_features(self, registry: Any, task: HistoricalRetrievalTask) -> MillraceRetrievalJob:
        """All features of the task's view for its entity frame, by the service; see `millrace.feast_offline`."""
        view = task.feature_view
        refs = [f"{view.projection.name_to_use()}:{name}" for name in _features(view)]
        config = MillraceOfflineStoreConfig(address=self._address)
        return historical_job(config, [view], refs, task.entity_df, registry, task.project, task.full_feature_name)

    @property
    def _address(self) -> str:
        return self._settings.address or Endpoints.from_environment().feature


def _served(stub: FeatureServiceStub) -> tuple[str, dict[str, frozenset[str]]]:
    """(hash of the definitions in force, names of the features by view)."""
    found = call(stub.GetDefinitions, GetDefinitionsRequest())
    registry = Registry.FromString(found.feast_registry)
    views = {
        view.spec.name: frozenset(feature.name for feature in view.spec.features)
        for view in (*registry.feature_views, *registry.stream_feature_views)
    }
    return found.definitions_hash, views


def _unlike(view: Any, served: dict[str, frozenset[str]]) -> MillraceError | None:
    """What is wrong with asking for `view`."""
    advice = "apply the repository to it: millrace features apply"
    if view.name not in served:
        return FailedPreconditionError(
            "VIEW_NOT_SERVED", f"view {view.name}: the feature service does not have it; {advice}"
        )
    if missing := set(_features(view)) - served[view.name]:
        names = ", ".join(sorted(missing))
        return FailedPreconditionError(
            "VIEW_NOT_SERVED", f"view {view.name}: the feature service has it without {names}; {advice}"
        )
    return None


def _features(view: Any) -> list[str]:
    """Names of a view's features; those of stream views have join keys among them."""
    keys = {column.name for column in view.entity_columns}
    return [item.name for item in view.features if item.name not in keys]


def _contract(view: Any) -> str:
    """The contract whose records fill `view`: its source's name."""
    return str((view.stream_source or view.batch_source).name)
