"""`millrace-stage`: what runs in every pod of a stage, around the stage's own command.

It brings code, inputs and the last checkpoint from the work store, runs the command (under torchrun when it is distributed), copies
checkpoints while it runs, stores what it left and says how it ended: in the termination message, which the coordinator reads from the
pod, and in the work store, for when the pod is gone. Its exit code is the command's.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from millrace_kit.errors import MillraceError

from millrace_training_coordinator import processtree, ranks
from millrace_training_coordinator.checkpoints import Checkpoints
from millrace_training_coordinator.executor import Ending, Place
from millrace_training_coordinator.stagespec import (
    INDEX_VARIABLE,
    RENDEZVOUS_VARIABLE,
    ROOT_VARIABLE,
    TERMINATION_VARIABLE,
    StageSpec,
    load_spec,
)
from millrace_training_coordinator.torchrun import THREAD_VARIABLES, command_line
from millrace_training_coordinator.transfers import fetch_code, fetch_inputs, store_outputs
from millrace_training_coordinator.workstore import WorkStore, attempt_path

log = logging.getLogger("millrace-stage")

PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.1
DETAIL_CHARS = 2000
# sysexits.h EX_TEMPFAIL and EX_CANTCREAT: the work store failed, the command is not to blame.
EXIT_STORE = 75
EXIT_NOT_STARTED = 127


@dataclass(frozen=True, slots=True)
class Ended:
    """How the command ended."""

    ending: Ending
    code: int = 0
    detail: str = ""
    at: float = 0.0
    """Unix time."""


class StagePod:
    """One pod of one attempt.

    Args:
        spec: what to do.
        store: the work store.
        root: folder of the pod's own.
        index: which pod of the attempt this is.
        rendezvous: `host:port` where the pods of a distributed stage meet.
    """

    def __init__(self, spec: StageSpec, store: WorkStore, root: Path, index: int, rendezvous: str) -> None:
        self._spec = spec
        self._store = store
        self._root = root
        self._index = index
        self._rendezvous = rendezvous
        self._stop = threading.Event()
        self._over = threading.Event()
        folders = ("output", "checkpoint", "scratch", "home", ranks.FOLDER)
        self._output, self._checkpoint, self._scratch, self._home, self._ranks = (root / name for name in folders)
        for folder in (self._output, self._checkpoint, self._scratch, self._home, self._ranks):
            folder.mkdir(parents=True, exist_ok=True)
        self._checkpoints = Checkpoints(store, spec.place, index, self._checkpoint)

    def stop(self) -> None:
        """End the command soon."""
        self._stop.set()

    def run(self) -> Ended:
        """Run the attempt; everything it left is stored when this returns."""
        spec = self._spec
        try:
            code = fetch_code(self._store, spec, self._root / "code")
            inputs = fetch_inputs(self._store, spec, self._root / "inputs")
            restored = self._checkpoints.restore(spec.pods)
        except (OSError, MillraceError) as error:
            return Ended(Ending.EXITED, EXIT_STORE, f"the work store cannot be read: {error}", time.time())
        if restored:
            self._say(f"the checkpoint of attempt {restored} is back")
        if spec.workers and not self._meet():
            return self._stopped() or Ended(
                Ending.EXITED,
                EXIT_STORE,
                f"{self._rendezvous} did not resolve in {spec.start_limit_s:g} s",
                time.time(),
            )
        copier = threading.Thread(target=self._copy_checkpoints, name="checkpoints", daemon=True)
        copier.start()
        ended = self._command(code, inputs)
        self._over.set()
        copier.join(timeout=spec.checkpoint_every_s)
        return self._store_all(ended)

    def _command(self, code: Path, inputs: dict[str, Path]) -> Ended:
        spec = self._spec
        oom_kills = processtree.memory_kills()
        command = command_line(spec.command, spec.workers, self._rendezvous_options(), self._scratch)
        try:
            child = subprocess.Popen(
                command, cwd=code, env=self._environment(inputs), stdin=subprocess.DEVNULL, process_group=0
            )
        except OSError as error:
            permanent = isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError))
            ending = Ending.NOT_STARTED if permanent else Ending.EXITED
            problem = f"cannot start {command[0]!r}: {error.strerror}"
            self._say(problem)
            return Ended(ending, EXIT_NOT_STARTED, problem, time.time())
        ending, detail = self._watch(child)
        at = time.time()
        if ending is not Ending.EXITED:
            self._end(child)
        exit_code = child.wait()
        processtree.kill_all(lambda: _below(os.getpid()))
        if ending is Ending.EXITED and exit_code != 0:
            worker = ranks.first_exit(self._ranks)
            exit_code = exit_code if worker is None else worker
        if ending is Ending.EXITED and exit_code == -signal.SIGKILL and processtree.memory_kills() > oom_kills:
            ending, detail = Ending.MEMORY, "more than the pod's memory limit"
        return Ended(ending, exit_code, detail, at)

    def _watch(self, child: subprocess.Popen[bytes]) -> tuple[Ending, str]:
        deadline = time.monotonic() + self._spec.timeout_s
        while child.poll() is None:
            if self._stop.wait(POLL_S):
                return Ending.STOPPED, "the pod was told to end"
            if time.monotonic() > deadline:
                return Ending.TIMEOUT, f"ran longer than {self._spec.timeout_s:g} s"
        return Ending.EXITED, ""

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        """SIGTERM to the command's group, then after the grace SIGKILL to everything."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(self._spec.stop_grace_s)
        processtree.kill_all(lambda: _below(os.getpid()))

    def _environment(self, inputs: dict[str, Path]) -> dict[str, str]:
        return {
            **os.environ,
            **dict.fromkeys(THREAD_VARIABLES, str(self._spec.threads)),
            **self._spec.environment,
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "HOME": str(self._home),
            "TMPDIR": str(self._scratch),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "MILLRACE_OUTPUT_DIR": str(self._output),
            "MILLRACE_CHECKPOINT_DIR": str(self._checkpoint),
            "MILLRACE_INPUTS": json.dumps({name: str(folder) for name, folder in inputs.items()}),
            ranks.FOLDER_VARIABLE: str(self._ranks),
            # Ranks of the whole stage in front of log lines, not those within a pod.
            "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[${role_name}${rank}]:",
        }

    def _rendezvous_options(self) -> list[str]:
        if self._spec.pods == 1:
            return ["--standalone"]
        host, _, port = self._rendezvous.rpartition(":")
        meet = ["--nnodes", str(self._spec.pods), "--node-rank", str(self._index)]
        return [
            *meet,
            "--master-addr",
            host,
            "--master-port",
            port,
            "--rdzv-conf",
            f"timeout={self._spec.start_limit_s:.0f}",
        ]

    def _meet(self) -> bool:
        """Wait until the name of pod 0 resolves; the cluster's DNS learns it some seconds after the pod starts."""
        host = self._rendezvous.rpartition(":")[0]
        deadline = time.monotonic() + self._spec.start_limit_s
        while self._spec.pods > 1 and time.monotonic() < deadline:
            try:
                socket.getaddrinfo(host, None)
            except socket.gaierror:
                if self._stop.wait(POLL_S * 5):
                    return False
            else:
                return True
        return self._spec.pods == 1

    def _copy_checkpoints(self) -> None:
        while not self._over.wait(self._spec.checkpoint_every_s):
            self._copy_checkpoint()

    def _copy_checkpoint(self) -> None:
        try:
            self._checkpoints.sync()
        except OSError as error:
            self._say(f"the checkpoint could not be stored, it is tried again: {error}")

    def _store_all(self, ended: Ended) -> Ended:
        """Store the last checkpoint and what the command left."""
        succeeded = ended.ending is Ending.EXITED and ended.code == 0
        if not succeeded:
            self._copy_checkpoint()
        try:
            store_outputs(self._store, self._spec, self._index, self._output, succeeded=succeeded)
        except OSError as error:
            if succeeded:
                return Ended(Ending.EXITED, EXIT_STORE, f"its outputs could not be stored: {error}", time.time())
            self._say(f"its result could not be stored: {error}")
        return ended

    def _stopped(self) -> Ended | None:
        return Ended(Ending.STOPPED, 0, "the pod was told to end", time.time()) if self._stop.is_set() else None

    def _say(self, text: str) -> None:
        print(f"[millrace-stage {self._index}] {text}", flush=True)


def _below(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return processtree.descendants(pid)


def exit_code(ended: Ended) -> int:
    """The pod's exit code: the command's, 128 + n for a signal."""
    match ended.ending:
        case Ending.EXITED | Ending.NOT_STARTED:
            return ended.code if ended.code >= 0 else 128 - ended.code
        case Ending.STOPPED:
            return 128 + signal.SIGTERM
        case _:
            return 1


def report(ended: Ended, termination: Path, store: WorkStore, place: Place, index: int) -> None:
    """Say how it ended where the kubelet and, when the pod is gone, the coordinator look."""
    message = {
        "ending": ended.ending.value,
        "code": ended.code,
        "detail": ended.detail[:DETAIL_CHARS],
        "at": ended.at,
    }
    with contextlib.suppress(OSError):
        termination.write_text(json.dumps(message), encoding="utf-8")
    try:
        store.write_json(f"{attempt_path(place)}/end-{index}.json", message)
    except OSError as error:
        log.warning("how it ended could not be stored: %s", error)


def main() -> None:
    """`millrace-stage --work-url URL --spec PATH --sha256 DIGEST`."""
    parser = argparse.ArgumentParser(prog="millrace-stage", description="Run one pod of a stage")
    parser.add_argument("--work-url", required=True, help="fsspec URL of the work store")
    parser.add_argument("--spec", required=True, help="path of the attempt's spec below it")
    parser.add_argument("--sha256", required=True, help="digest of the spec")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="[millrace-stage] %(message)s", stream=sys.stdout)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    termination = Path(os.environ.get(TERMINATION_VARIABLE, "/dev/termination-log"))
    index = int(os.environ.get(INDEX_VARIABLE, "0"))
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    store = WorkStore(arguments.work_url)
    try:
        spec = load_spec(store, arguments.spec, arguments.sha256)
    except (OSError, MillraceError) as error:
        print(f"[millrace-stage {index}] the work store cannot be read: {error}", flush=True)
        raise SystemExit(EXIT_STORE) from None
    root = Path(os.environ.get(ROOT_VARIABLE, "/work"))
    pod = StagePod(spec, store, root, index, os.environ.get(RENDEZVOUS_VARIABLE, ""))
    signal.signal(signal.SIGTERM, lambda *_: pod.stop())
    if told.is_set():
        pod.stop()
    ended = pod.run()
    report(ended, termination, store, spec.place, index)
    raise SystemExit(exit_code(ended))


if __name__ == "__main__":
    main()
