"""The executor of one machine: every attempt is a supervisor process in its own session, found again by its folder."""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from millrace_training_coordinator import processtree, supervisor
from millrace_training_coordinator.executor import Ending, Exit, Found, Launch, Place

POLL_S = 0.05
LOCK_WAIT_S = 10.0
# Environment of the coordinator that stages may see; the rest, with whatever secrets it holds, stays out.
PASSED_VARIABLES = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SSL_CERT_FILE")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_MAX_THREADS")


class WorkDirTakenError(Exception):
    """Another coordinator owns the work folder."""


class ProcessExecutor:
    """Runs attempts as local processes below `<work_dir>/runs/<run>/<stage>/<attempt>`.

    Args:
        work_dir: folder of its own; `acquire` makes this coordinator its owner.
        gpus: how many devices may be handed out.
        stop_grace_s: time between SIGTERM and SIGKILL.
        orphan_grace_s: how long attempts run on without a coordinator.
        log_limit_mib: largest log of an attempt.
    """

    def __init__(
        self, work_dir: Path, *, gpus: int, stop_grace_s: float, orphan_grace_s: float, log_limit_mib: int
    ) -> None:
        self._work_dir = work_dir
        self._runs = work_dir / "runs"
        self._lock_file = work_dir / "coordinator.lock"
        self._lock_fd: int | None = None
        self._free_gpus = set(range(gpus))
        self._held_gpus: dict[Place, list[int]] = {}
        self._stop_grace_s = stop_grace_s
        self._orphan_grace_s = orphan_grace_s
        self._log_limit_mib = log_limit_mib
        self._children: dict[Place, subprocess.Popen[bytes]] = {}

    async def acquire(self) -> None:
        """Become the owner of the work folder.

        Raises:
            WorkDirTakenError: another coordinator holds it.
        """
        self._runs.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        # Supervisors look at the lock for moments, so one refusal says little.
        for _attempt in range(int(LOCK_WAIT_S / POLL_S)):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._lock_fd = fd
                return
            await asyncio.sleep(POLL_S)
        os.close(fd)
        raise WorkDirTakenError(f"{self._work_dir} belongs to another running coordinator")

    def release(self) -> None:
        """Give the work folder up."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def folder(self, place: Place) -> Path:
        """Where everything of an attempt lies."""
        return self._runs / place.run_id / place.stage / str(place.attempt)

    def output_dir(self, place: Place) -> Path:
        """Where the attempt leaves its files."""
        return self.folder(place) / supervisor.OUTPUT

    async def start(self, launch: Launch) -> None:
        """Start an attempt.

        Raises:
            OSError: it could not be started; nothing of it runs.
        """
        gpus = sorted(self._free_gpus)[: launch.claim.gpus]
        if len(gpus) < launch.claim.gpus:
            raise OSError(f"{launch.claim.gpus} GPUs are wanted, {len(gpus)} are free")
        self._free_gpus.difference_update(gpus)
        self._held_gpus[launch.place] = gpus
        try:
            self._children[launch.place] = await asyncio.to_thread(self._spawn, launch, gpus)
        except BaseException:
            self._release_gpus(launch.place)
            raise

    def _spawn(self, launch: Launch, gpus: list[int]) -> subprocess.Popen[bytes]:
        folder = self.folder(launch.place)
        if folder.exists():
            shutil.rmtree(folder)
        (folder / supervisor.OUTPUT).mkdir(parents=True)
        (folder / "tmp").mkdir()
        spec = {
            "command": command_line(launch, folder.absolute() / "tmp"),
            "code": str(launch.code.absolute()),
            "environment": self._environment(launch, gpus),
            "timeout_s": launch.timeout_s,
            "memory_mib": launch.claim.memory_mib,
            "gpus": gpus,
            "log_limit_mib": self._log_limit_mib,
            "stop_grace_s": self._stop_grace_s,
            "orphan_grace_s": self._orphan_grace_s,
            "coordinator_lock": str(self._lock_file.absolute()),
        }
        supervisor.write_json(folder / supervisor.SPEC, spec)
        with (folder / "supervisor.log").open("ab") as own_log:
            return subprocess.Popen(
                [sys.executable, "-I", "-m", supervisor.__name__, str(folder.absolute())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=own_log,
                cwd="/",
                start_new_session=True,
            )

    def _environment(self, launch: Launch, gpus: list[int]) -> dict[str, str]:
        folder = self.folder(launch.place).absolute()
        threads = str(max(1, int(launch.claim.cpus / max(1, launch.workers))))
        passed = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
        return {
            **passed,
            **dict.fromkeys(THREAD_VARIABLES, threads),
            **launch.environment,
            "PATH": f"{Path(sys.executable).parent}:{passed.get('PATH', os.defpath)}",
            "TMPDIR": str(folder / "tmp"),
            "PYTHONUNBUFFERED": "1",
            # The code folder is shared by runs and named by its content: nothing may be written there.
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
            "MILLRACE_OUTPUT_DIR": str(folder / supervisor.OUTPUT),
            processtree.MARK_VARIABLE: self._mark(launch.place),
        }

    def _mark(self, place: Place) -> str:
        return str(self.folder(place).absolute())

    async def recover(self, place: Place) -> Found:
        """Look for an attempt of an earlier coordinator."""
        return await asyncio.to_thread(self._recover, place)

    def _recover(self, place: Place) -> Found:
        folder = self.folder(place)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / supervisor.LOCK).open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._adopt_gpus(place)
                return Found.RUNNING
            if (folder / supervisor.EXIT).exists():
                return Found.ENDED
            # Under the lock: a supervisor that is only now starting will see this and leave.
            (folder / supervisor.ABANDONED).touch()
        processtree.kill_all(lambda: processtree.marked(self._mark(place)))
        return Found.LOST

    def _adopt_gpus(self, place: Place) -> None:
        spec = json.loads((self.folder(place) / supervisor.SPEC).read_text(encoding="utf-8"))
        self._held_gpus[place] = spec["gpus"]
        self._free_gpus.difference_update(spec["gpus"])

    def _release_gpus(self, place: Place) -> None:
        self._free_gpus.update(self._held_gpus.pop(place, []))

    async def wait(self, place: Place) -> Exit:
        """Wait until the attempt is over and none of its processes is left."""
        folder = self.folder(place)
        while True:
            gone = not self._supervisor_alive(place)
            # In this order: a supervisor writes its report before it goes.
            if gone or (folder / supervisor.EXIT).exists():
                break
            await asyncio.sleep(POLL_S)
        child = self._children.pop(place, None)
        if child is not None:
            await asyncio.to_thread(child.wait)
        try:
            if not (folder / supervisor.EXIT).exists():
                await self.recover(place)
                return Exit(Ending.LOST, detail="its supervisor was killed")
            report = json.loads((folder / supervisor.EXIT).read_text(encoding="utf-8"))
            return Exit(Ending(report["ending"]), report["code"], report["detail"])
        finally:
            self._release_gpus(place)

    def _supervisor_alive(self, place: Place) -> bool:
        child = self._children.get(place)
        if child is not None:
            return child.poll() is None
        identity = self._identity(place)
        return self._locked(place) if identity is None else processtree.alive(*identity)

    def _locked(self, place: Place) -> bool:
        """Whether an adopted supervisor holds the attempt's lock."""
        with (self.folder(place) / supervisor.LOCK).open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _identity(self, place: Place) -> tuple[int, str] | None:
        """Pid and birth of the attempt's supervisor; None until it wrote them."""
        try:
            record = json.loads((self.folder(place) / supervisor.PROCESS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return record["pid"], record["born"]

    async def stop(self, place: Place) -> None:
        """Ask the attempt's supervisor to end it."""
        child = self._children.get(place)
        identity = self._identity(place)
        if identity is not None and processtree.alive(*identity):
            os.kill(identity[0], signal.SIGTERM)
        elif child is not None and child.poll() is None:
            # Before it wrote its identity it does not yet listen to SIGTERM: the signal ends it, and nothing else runs yet.
            child.terminate()

    def read_log(self, place: Place, offset: int, limit: int) -> bytes:
        """At most `limit` bytes of the attempt's log from `offset`."""
        try:
            with (self.folder(place) / supervisor.LOG).open("rb") as file:
                file.seek(offset)
                return file.read(limit)
        except FileNotFoundError:
            return b""

    def forget(self, run_id: str) -> None:
        """Remove the run's folder."""
        shutil.rmtree(self._runs / run_id, ignore_errors=True)


def command_line(launch: Launch, scratch: Path) -> list[str]:
    """The command as it is started: `python` replaced, torchrun in front of a distributed one."""
    command = list(launch.command)
    if launch.workers:
        # Workers write to files of their own, which torchrun copies line by line with the rank in front: on one shared pipe
        # their lines would run into each other.
        own_logs = ["--tee", "3", "--log-dir", str(scratch / "torchrun")]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *own_logs]
        return [*torchrun, "--nproc-per-node", str(launch.workers), *command[1:]]
    return [sys.executable, *command[1:]] if command[0] == "python" else command
