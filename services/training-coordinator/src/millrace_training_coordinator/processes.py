"""The executor of one machine: every attempt is a supervisor process in its own session, found again by its folder."""

import asyncio
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from millrace_kit.content import ContentStore

from millrace_training_coordinator import processtree, ranks, supervisor
from millrace_training_coordinator.codetrees import CodeTrees
from millrace_training_coordinator.executor import Ending, Exit, Found, Launch, Place
from millrace_training_coordinator.ownership import WorkDirLock
from millrace_training_coordinator.results import Output, keep_outputs
from millrace_training_coordinator.torchrun import THREAD_VARIABLES, command_line

POLL_S = 0.05
# Environment of the coordinator that stages may see; the rest, with whatever secrets it holds, stays out.
PASSED_VARIABLES = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SSL_CERT_FILE")


class ProcessExecutor:
    """Runs attempts as local processes below `<work_dir>/runs/<run>/<stage>/<attempt>`.

    Args:
        work_dir: folder of its own; `acquire` makes this coordinator its owner.
        trees: code of the stages.
        content: where declared outputs are kept.
        gpus: how many devices may be handed out.
        stop_grace_s: time between SIGTERM and SIGKILL.
        orphan_grace_s: how long attempts run on without a coordinator.
        log_limit_mib: largest log of an attempt.
    """

    def __init__(
        self,
        work_dir: Path,
        trees: CodeTrees,
        content: ContentStore,
        *,
        gpus: int,
        stop_grace_s: float,
        orphan_grace_s: float,
        log_limit_mib: int,
    ) -> None:
        self._runs = work_dir / "runs"
        self._lock = WorkDirLock(work_dir)
        self._trees = trees
        self._content = content
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
        await self._lock.acquire()
        self._runs.mkdir(parents=True, exist_ok=True)

    def release(self) -> None:
        """Give the work folder up."""
        self._lock.release()

    def folder(self, place: Place) -> Path:
        """Where everything of an attempt lies."""
        return self._runs / place.run_id / place.stage / str(place.attempt)

    def _output(self, place: Place) -> Path:
        return self.folder(place) / supervisor.OUTPUT

    def result_folder(self, place: Place) -> Path:
        """The attempt's output folder."""
        return self._output(place)

    def keep(self, place: Place, declared: tuple[str, ...], limit_bytes: int) -> tuple[Output, ...]:
        """Put the declared outputs into the content store."""
        return keep_outputs(place.stage, declared, self._output(place), self._content, limit_bytes)

    async def start(self, launch: Launch) -> None:
        """Start an attempt.

        Raises:
            OSError: it could not be started; nothing of it runs.
            MillraceError: its code is lost.
        """
        code = await asyncio.to_thread(self._trees.open, launch.code_hash, launch.archive_digest)
        wanted = launch.stage.resources.gpus
        gpus = sorted(self._free_gpus)[:wanted]
        if len(gpus) < wanted:
            raise OSError(f"{wanted} GPUs are wanted, {len(gpus)} are free")
        self._free_gpus.difference_update(gpus)
        self._held_gpus[launch.place] = gpus
        try:
            self._children[launch.place] = await asyncio.to_thread(self._spawn, launch, code, gpus)
        except BaseException:
            self._release_gpus(launch.place)
            raise

    def _spawn(self, launch: Launch, code: Path, gpus: list[int]) -> subprocess.Popen[bytes]:
        folder = self.folder(launch.place)
        if folder.exists():
            shutil.rmtree(folder)
        (folder / supervisor.OUTPUT).mkdir(parents=True)
        (folder / "tmp").mkdir()
        (folder / ranks.FOLDER).mkdir()
        self._checkpoint(launch.place).mkdir(exist_ok=True)
        stage = launch.stage
        alone = ["--standalone"]
        spec = {
            "command": command_line(stage.command, stage.workers, alone, folder.absolute() / "tmp"),
            "code": str(code.absolute()),
            "environment": self._environment(launch, gpus),
            "timeout_s": stage.timeout_s,
            "memory_mib": stage.resources.memory_mib,
            "gpus": gpus,
            "log_limit_mib": self._log_limit_mib,
            "stop_grace_s": self._stop_grace_s,
            "orphan_grace_s": self._orphan_grace_s,
            "coordinator_lock": str(self._lock.path.absolute()),
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
        stage = launch.stage
        threads = str(max(1, int(stage.resources.cpus / max(1, stage.workers))))
        inputs = {name: str(self._output(place).absolute()) for name, place in launch.inputs.items()}
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
            "MILLRACE_CHECKPOINT_DIR": str(self._checkpoint(launch.place).absolute()),
            "MILLRACE_INPUTS": json.dumps(inputs),
            ranks.FOLDER_VARIABLE: str(folder / ranks.FOLDER),
            processtree.MARK_VARIABLE: self._mark(launch.place),
        }

    def _checkpoint(self, place: Place) -> Path:
        """What an attempt leaves there the next attempt of the stage finds."""
        return self._runs / place.run_id / place.stage / "checkpoint"

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

    async def forget(self, run_id: str) -> None:
        """Remove the run's folder."""
        await asyncio.to_thread(shutil.rmtree, self._runs / run_id, ignore_errors=True)
