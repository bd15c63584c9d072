"""What runs stages: the border behind which local processes, or a cluster's jobs, stand.

An executor keeps what it needs to find an attempt again by its place alone, so the coordinator may die at any moment.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from millrace_training_coordinator.manifest import Stage
    from millrace_training_coordinator.results import Output


@dataclass(frozen=True, slots=True)
class Place:
    """One attempt of one stage of one run; attempts count from 1."""

    run_id: str
    stage: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything an attempt needs to start."""

    place: Place
    pipeline: str
    stage: "Stage"
    """The stage as in the manifest; `python` at the head of its command is the executor's own interpreter."""
    code_hash: str
    """The code tree in which the command runs."""
    archive_digest: str
    """The kept archive of that tree."""
    inputs: Mapping[str, Place]
    """Stages this one depends on, directly or not, and the attempt of each that succeeded."""
    environment: Mapping[str, str]


class Ending(StrEnum):
    """Why an attempt is over."""

    EXITED = "exited"
    """The command ended by itself, with a code or by a signal."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    """It used more than it claimed, or the kernel ran out."""
    NOT_PLACED = "not_placed"
    """It waited too long for a node or its image."""
    STOPPED = "stopped"
    """The executor was asked to end it, or nobody was there to want its result."""
    LOST = "lost"
    """It vanished without a word: the machine restarted, or its supervisor was killed."""
    NOT_STARTED = "not_started"
    """The program cannot be started at all."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How an attempt ended."""

    ending: Ending
    code: int = 0
    """Exit code; a signal's number negated."""
    detail: str = ""
    """More for people, for example how much memory it used."""


class Found(StrEnum):
    """What is left of an attempt after a restart."""

    RUNNING = "running"
    ENDED = "ended"
    LOST = "lost"


class Executor(Protocol):
    """Starts, finds, awaits and stops attempts."""

    async def start(self, launch: Launch) -> None:
        """Start an attempt.

        Raises:
            OSError: it could not be started; nothing of it runs.
            MillraceError: it can never be started.
        """
        ...

    async def recover(self, place: Place) -> Found:
        """Look for an attempt that an earlier coordinator started. After LOST nothing of it runs or ever will."""
        ...

    async def wait(self, place: Place) -> Exit:
        """Wait until a started or recovered attempt is over and none of its processes is left."""
        ...

    async def stop(self, place: Place) -> None:
        """Ask for the end of an attempt; `wait` then reports it. Asking again changes nothing."""
        ...

    def result_folder(self, place: Place) -> Path:
        """A local folder with the `result.json` of an attempt that is over, if it left one.

        Raises:
            OSError: it cannot be read now.
        """
        ...

    def keep(self, place: Place, declared: tuple[str, ...], limit_bytes: int) -> "tuple[Output, ...]":
        """Keep the declared outputs of an attempt that succeeded.

        Raises:
            StageFailedError: one is missing, is no regular file, or is larger than `limit_bytes`.
            OSError: it could not be stored; trying again may help.
        """
        ...

    def read_log(self, place: Place, offset: int, limit: int) -> bytes:
        """At most `limit` bytes of the attempt's log from `offset`; empty when there are none yet."""
        ...

    async def forget(self, run_id: str) -> None:
        """Remove logs and working files of a finished run.

        Raises:
            OSError: not all could be removed; asking again may help.
        """
        ...

    def release(self) -> None:
        """Give up what only one coordinator may own."""
        ...
