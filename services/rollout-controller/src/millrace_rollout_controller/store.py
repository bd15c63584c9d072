"""What is kept of every deployment, and the border to where: SQL on one machine, Kubernetes objects in a cluster."""

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from millrace_rollout_controller.evidence import Evidence
from millrace_rollout_controller.hub import GatewaySeen, Table
from millrace_rollout_controller.state import Status


@dataclass(frozen=True, slots=True)
class Row:
    """One stored deployment."""

    name: str
    model: str
    manifest: str
    generation: int
    revision: int
    deleting: bool
    status: Status
    evidence: Evidence
    created_at: datetime


class Store(Protocol):
    """Blocking; callers use a thread. Every method raises `UnavailableError` while the storage does not answer."""

    def get(self, name: str) -> Row | None:
        """One deployment; None when there is none of that name."""
        ...

    def rows(self) -> list[Row]:
        """Every deployment, by name."""
        ...

    def create(self, row: Row) -> Row:
        """Add a deployment.

        Raises:
            ConflictError: the name or the model is taken.
        """
        ...

    def update(self, row: Row) -> Row:
        """Write `row`, which was read at `row.revision`; returns it with its new revision.

        Raises:
            ConflictError: it was changed meanwhile.
        """
        ...

    def delete(self, name: str) -> None:
        """Remove a deployment."""
        ...

    def load_routes(self) -> Table:
        """The table last published."""
        ...

    def save_routes(self, table: Table) -> None:
        """Keep the table, before it is published."""
        ...

    def load_gateways(self) -> dict[str, GatewaySeen]:
        """Gateways heard of before."""
        ...

    def save_gateways(self, seen: dict[str, GatewaySeen]) -> None:
        """Keep who was heard of; the others are forgotten."""
        ...

    def close(self) -> None:
        """Let go of the storage."""
        ...
