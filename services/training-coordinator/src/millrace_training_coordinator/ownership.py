"""The lock by which one coordinator at a time owns a work folder."""

import asyncio
import contextlib
import fcntl
import os
from pathlib import Path

POLL_S = 0.05
LOCK_WAIT_S = 10.0
LOCK_FILE = "coordinator.lock"


class WorkDirTakenError(Exception):
    """Another coordinator owns the work folder."""


class WorkDirLock:
    """The lock file of a work folder."""

    def __init__(self, work_dir: Path) -> None:
        self._work_dir = work_dir
        self.path = work_dir / LOCK_FILE
        self._fd: int | None = None

    async def acquire(self) -> None:
        """Become the owner.

        Raises:
            WorkDirTakenError: another coordinator holds it.
        """
        self._work_dir.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        # Supervisors look at the lock for moments, so one refusal says little.
        for _attempt in range(int(LOCK_WAIT_S / POLL_S)):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._fd = fd
                return
            await asyncio.sleep(POLL_S)
        os.close(fd)
        raise WorkDirTakenError(f"{self._work_dir} belongs to another running coordinator")

    def release(self) -> None:
        """Give the work folder up."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
