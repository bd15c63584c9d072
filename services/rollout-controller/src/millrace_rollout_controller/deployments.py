"""What people do to deployments: apply, delete, and the verbs. Each is one small change of one row, made again if somebody was faster."""

from collections.abc import Callable
from typing import Literal

from millrace_kit.clock import Clock
from millrace_kit.errors import (
    ConflictError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)

from millrace_rollout_controller import actions, manifest, sleeping
from millrace_rollout_controller.actions import Refused, Verb
from millrace_rollout_controller.evidence import Evidence
from millrace_rollout_controller.executor import Executor
from millrace_rollout_controller.state import Status
from millrace_rollout_controller.store import Row, Store

ApplyResult = Literal["created", "configured", "unchanged"]
CONFLICT_RETRIES = 20


class Deployments:
    """Blocking; callers use a thread."""

    def __init__(self, store: Store, executor: Executor, clock: Clock, *, max_deployments: int) -> None:
        self._store = store
        self._executor = executor
        self._clock = clock
        self._max_deployments = max_deployments

    def apply(self, text: str) -> tuple[Row, ApplyResult]:
        """Create or change the deployment the manifest names.

        Raises:
            InvalidArgumentError: the manifest is wrong; names the path.
            FailedPreconditionError: another deployment has the model, or this one is being deleted.
            ResourceExhaustedError: there are too many deployments.
        """
        wanted = manifest.parse(text)
        self._executor.check(wanted.spec)
        for attempt in range(CONFLICT_RETRIES):
            try:
                return self._apply_once(wanted, text)
            except ConflictError:
                if attempt == CONFLICT_RETRIES - 1:
                    raise
        raise AssertionError

    def _apply_once(self, wanted: manifest.Manifest, text: str) -> tuple[Row, ApplyResult]:
        name, model = wanted.metadata.name, wanted.spec.model
        row = self._store.get(name)
        if row is None:
            self._check_new(name, model)
            now = self._clock.now()
            return self._store.create(Row(name, model, text, 1, 1, False, Status(), Evidence(), now)), "created"
        if row.deleting:
            raise FailedPreconditionError("DEPLOYMENT_DELETING", f"{name!r} is being deleted", {"name": name})
        if row.model != model:
            raise InvalidArgumentError("spec.model", f"cannot change from {row.model!r}; delete the deployment first")
        before = manifest.parse(row.manifest)
        if before.spec.server.placement != wanted.spec.server.placement:
            message = f"cannot change from {before.spec.server.placement}; delete the deployment first"
            raise InvalidArgumentError("spec.server.placement", message)
        pools = [m.spec.server.pool.name if m.spec.server.pool is not None else "" for m in (before, wanted)]
        if pools[0] != pools[1]:
            message = f"cannot change from {pools[0] or 'servers of its own'}; delete the deployment first"
            raise InvalidArgumentError("spec.server.pool", message)
        if before == wanted:
            return row, "unchanged"
        return self._store.update(_changed(row, manifest=text, generation=row.generation + 1)), "configured"

    def _check_new(self, name: str, model: str) -> None:
        rows = self._store.rows()
        if len(rows) >= self._max_deployments:
            raise ResourceExhaustedError("max_deployments", f"{self._max_deployments} deployments exist")
        other = next((row.name for row in rows if row.model == model), None)
        if other is not None:
            raise FailedPreconditionError(
                "MODEL_TAKEN",
                f"model {model!r} belongs to deployment {other!r}",
                {"model": model, "deployment": other, "name": name},
            )

    def delete(self, name: str) -> None:
        """Begin to take the deployment away; asking again is free."""
        self._change(name, lambda row: row if row.deleting else _changed(row, deleting=True))

    def act(self, name: str, verb: Verb, weight: float | None = None, to: str = "") -> Row:
        """Do what a person asks.

        Raises:
            FailedPreconditionError: there is nothing to do it to.
            InvalidArgumentError: the weight is wrong, or `to` (of undo) names nothing that was stable.
        """
        return self._change(name, lambda row: self._acted(row, verb, weight, to))

    def wake(self, model: str, version: str) -> Status:
        """Wish that a version which is asleep has servers; asking again is free.

        Returns: the deployment's status with the wish.

        Raises:
            NotFoundError: nobody deploys the model.
        """
        name = next((row.name for row in self._store.rows() if row.model == model), None)
        if name is None:
            raise NotFoundError("deployment of model", model)

        def changed(row: Row) -> Row:
            after = sleeping.wake(row.status, version, self._clock.now())
            return row if after is None or row.deleting else _changed(row, status=after)

        return self._change(name, changed).status

    def _acted(self, row: Row, verb: Verb, weight: float | None, to: str) -> Row:
        if row.deleting:
            raise FailedPreconditionError("DEPLOYMENT_DELETING", f"{row.name!r} is being deleted", {"name": row.name})
        spec = manifest.parse(row.manifest).spec
        found = actions.act(spec, row.status, verb, weight, self._clock.now(), to=to)
        if isinstance(found, Refused):
            if found.field:
                raise InvalidArgumentError(found.field, found.message)
            metadata = {"name": row.name, "phase": row.status.phase}
            raise FailedPreconditionError(found.reason, f"{row.name!r}: {found.message}", metadata)
        if verb != "undo" or spec.version == found.undo:
            return _changed(row, status=found)
        text = actions.with_version(row.manifest, found.undo)
        return _changed(row, status=found, manifest=text, generation=row.generation + 1)

    def get(self, name: str) -> Row:
        """One deployment."""
        row = self._store.get(name)
        if row is None:
            raise NotFoundError("deployment", name)
        return row

    def rows(self) -> list[Row]:
        """Every deployment."""
        return self._store.rows()

    def _change(self, name: str, change: Callable[[Row], Row]) -> Row:
        for attempt in range(CONFLICT_RETRIES):
            row = self.get(name)
            changed = change(row)
            if changed is row:
                return row
            try:
                return self._store.update(changed)
            except ConflictError:
                if attempt == CONFLICT_RETRIES - 1:
                    raise
        raise AssertionError


def _changed(row: Row, **values: object) -> Row:
    return Row(**({name: getattr(row, name) for name in Row.__slots__} | values))
