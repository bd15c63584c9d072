"""The small process between the coordinator and a stage: `python -m millrace_training_coordinator.supervisor <attempt folder>`.

It outlives the coordinator, so that a stage's exit code, time limit and memory limit do not depend on the coordinator being there:
it runs the command, watches it, ends every process the command left behind, and writes `exit.json` last. While it lives it holds
a lock on `lock`; whoever gets that lock knows that nothing of the attempt runs. A file `abandoned` forbids a late start.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import psutil

from millrace_training_coordinator import processtree, ranks
from millrace_training_coordinator.executor import Ending

SPEC, LOCK, ABANDONED, PROCESS, EXIT, LOG, OUTPUT = (
    "spec.json", "lock", "abandoned", "process.json", "exit.json", "log", "out",
)  # fmt: skip
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.05
MEMORY_EVERY_S = 1.0
ORPHAN_EVERY_S = 1.0
PUMP_BYTES = 1 << 16


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file whole or not at all, and durably."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


class Supervisor:
    """Runs one attempt from its `spec.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spec: dict[str, Any] = json.loads((folder / SPEC).read_text(encoding="utf-8"))
        self._stop_asked = threading.Event()
        self._oom_kills = processtree.kernel_oom_kills()
        self._peak_bytes = 0
        self._orphan_since: float | None = None

    def run(self) -> None:
        """Run the command and write how it ended."""
        signal.signal(signal.SIGTERM, lambda *_: self._stop_asked.set())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        write_json(self._folder / PROCESS, {"pid": os.getpid(), "born": processtree.birth(os.getpid())})
        started = time.monotonic()
        log = (self._folder / LOG).open("ab", buffering=0)
        try:
            child = self._spawn(libc)
        except OSError as error:
            program = self._spec["command"][0]
            log.write(f"cannot start {program!r}: {error.strerror}\n".encode())
            # A missing program stays missing; a full process table does not.
            permanent = isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError))
            ending = Ending.NOT_STARTED if permanent else Ending.EXITED
            self._finish(ending, 127, f"cannot start {program!r}: {error.strerror}", started)
            return
        assert child.stdout is not None
        pump = threading.Thread(target=self._pump, args=(child.stdout, log), daemon=True)
        pump.start()
        ending, detail = self._watch(child, started)
        if ending is not Ending.EXITED:
            self._end_processes(child)
        code = child.wait()
        processtree.kill_all(self._leftovers)
        pump.join(timeout=2)
        if ending is Ending.EXITED and code != 0:
            worker = ranks.first_exit(self._folder / ranks.FOLDER)
            code = code if worker is None else worker
        if ending is Ending.EXITED and code == -signal.SIGKILL and processtree.kernel_oom_kills() > self._oom_kills:
            ending, detail = Ending.MEMORY, "the kernel ran out of memory"
        self._finish(ending, code, detail, started)

    def _spawn(self, libc: ctypes.CDLL) -> subprocess.Popen[bytes]:
        def before_exec() -> None:
            # If the supervisor is killed the command goes too.
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

        return subprocess.Popen(
            self._spec["command"],
            cwd=self._spec["code"],
            env=self._spec["environment"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=before_exec,  # noqa: PLW1509 - no other thread runs yet
            process_group=0,
        )

    def _watch(self, child: subprocess.Popen[bytes], started: float) -> tuple[Ending, str]:
        """Wait until the command ends or a limit is reached."""
        next_memory = started
        next_orphan = started
        while child.poll() is None:
            now = time.monotonic()
            if self._stop_asked.is_set():
                return Ending.STOPPED, ""
            if now - started > self._spec["timeout_s"]:
                return Ending.TIMEOUT, f"ran longer than {self._spec['timeout_s']:g} s"
            if now >= next_memory:
                next_memory = now + MEMORY_EVERY_S
                used = processtree.memory_bytes(os.getpid())
                self._peak_bytes = max(self._peak_bytes, used)
                limit = self._spec["memory_mib"] << 20
                if used > limit:
                    detail = f"used {used >> 20} MiB of memory, {self._spec['memory_mib']} MiB are allowed"
                    return Ending.MEMORY, detail
            if now >= next_orphan:
                next_orphan = now + ORPHAN_EVERY_S
                if self._orphaned(now):
                    return Ending.STOPPED, "no coordinator came back"
            self._stop_asked.wait(POLL_S)
        return Ending.EXITED, ""

    def _orphaned(self, now: float) -> bool:
        """Whether nobody held the coordinator's lock for the whole grace."""
        try:
            with Path(self._spec["coordinator_lock"]).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self._orphan_since = None
            return False
        except OSError:
            pass  # its folder is gone, and so is the coordinator
        if self._orphan_since is None:
            self._orphan_since = now
        return bool(now - self._orphan_since >= self._spec["orphan_grace_s"])

    def _leftovers(self) -> list[psutil.Process]:
        self._reap()
        return processtree.descendants(os.getpid())

    def _reap(self) -> None:
        """Collect orphans that came back to this process; the command itself was waited for."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    def _end_processes(self, child: subprocess.Popen[bytes]) -> None:
        """SIGTERM to the command's group, then after the grace SIGKILL to everything."""
        try:
            os.killpg(child.pid, signal.SIGTERM)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + self._spec["stop_grace_s"]
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if child.poll() is None:
            processtree.kill_all(lambda: processtree.descendants(os.getpid()))

    def _pump(self, source: IO[bytes], log: IO[bytes]) -> None:
        """Copy output to the log up to its limit; past that, read on and drop, so that the stage is not blocked."""
        left = self._spec["log_limit_mib"] << 20
        full = False
        while chunk := os.read(source.fileno(), PUMP_BYTES):
            if len(chunk) <= left:
                left -= len(chunk)
                self._write(log, chunk)
            elif not full:
                full = True
                note = f"\n[log limit of {self._spec['log_limit_mib']} MiB reached, the rest is dropped]\n"
                self._write(log, chunk[:left] + note.encode())
                left = 0

    def _write(self, log: IO[bytes], chunk: bytes) -> None:
        # A full disk must not stop the stage from being read and ended.
        with contextlib.suppress(OSError):
            log.write(chunk)

    def _finish(self, ending: Ending, code: int, detail: str, started: float) -> None:
        write_json(
            self._folder / EXIT,
            {
                "ending": ending.value,
                "code": code,
                "detail": detail,
                "seconds": time.monotonic() - started,
                "peak_bytes": self._peak_bytes,
            },
        )


def main() -> None:
    """Run the attempt whose folder is the only argument, unless it was given up before."""
    folder = Path(sys.argv[1])
    with (folder / LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(3) from None
        if not (folder / ABANDONED).exists() and not (folder / EXIT).exists():
            Supervisor(folder).run()


if __name__ == "__main__":
    main()
