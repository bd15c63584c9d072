"""The border between deciding and doing: what the controller asks of the machine or the cluster.

An implementation is told again and again what should run and reports what does. It keeps no opinion about rollouts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from millrace_rollout_controller.manifest import Spec
from millrace_rollout_controller.reconciler import ArmSeen
from millrace_rollout_controller.server_block import Server
from millrace_rollout_controller.state import ArtifactRef, VersionRef


@dataclass(frozen=True, slots=True)
class Wanted:
    """One version of one deployment should have servers."""

    deployment: str
    ref: VersionRef
    replicas: int
    server: Server


@dataclass(frozen=True, slots=True)
class PoolSeen:
    """One pool's server."""

    sizes: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Bytes that each wanted version takes or will take, by deployment and version."""
    used_bytes: int = 0
    """What the models in the server really take now."""
    free_bytes: int = 0
    """What the machine could still give it."""
    fresh: bool = False
    """Whether both were measured since a model was last loaded or unloaded."""


class Executor(Protocol):
    """Runs model servers."""

    def check(self, spec: Spec) -> None:
        """Refuse what cannot be given here.

        Raises:
            InvalidArgumentError: names the field of the manifest.
        """
        ...

    async def start(self) -> None:
        """Take over what an earlier process of this controller left running."""
        ...

    async def converge(self, wanted: Sequence[Wanted], in_use: frozenset[str] | None) -> None:
        """Start what is missing and stop what is too much; returns at once, the work goes on in the background.

        Args:
            wanted: everything that should run; what is not named here is stopped.
            in_use: endpoints a gateway may still send to, which are not stopped; None when that is unknown.
        """
        ...

    def seen(self) -> Mapping[tuple[str, str], ArmSeen]:
        """What runs now, by deployment and version."""
        ...

    def pools(self) -> Mapping[str, PoolSeen]:
        """Every pool's server, by the pool's name."""
        ...

    async def close(self) -> None:
        """End the background work, and the servers where the settings say so."""
        ...


class ArtifactSource(Protocol):
    """Where files of versions come from."""

    async def fetch(self, artifact: ArtifactRef, target: Path) -> None:
        """Write the file to `target`, with its digest proved, or not at all.

        Raises:
            DataLossError: the content has another digest than the version names.
            MillraceError: it cannot be had now.
        """
        ...
