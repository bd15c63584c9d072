"""Triton as a process of this machine: from the wheel's files to a command, and from a process id to a running server.

The wheel `nvidia-pytriton` brings the server and its Python backend; its Python package is only looked at for where it lies, never imported
(it asks for an older numpy). The backend's stub embeds Python in isolated mode, which ignores PYTHONPATH, so it finds this environment's
packages by the first `python3` on its PATH.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from millrace_rollout_controller import triton_options
from millrace_rollout_controller.server_block import Server

LOG_BYTES = 16 * 1024 * 1024
START_TIME_SLACK_S = 1.0
HTTP_THREADS = 2


class TritonMissingError(Exception):
    """The wheel with the server is not installed."""


@dataclass(frozen=True, slots=True)
class Triton:
    """Where the server's parts are."""

    binary: Path
    backends: Path
    libraries: Path

    @classmethod
    def prepare(cls, folder: Path) -> "Triton":
        """Find the wheel's files and lay the backend out in `folder`, with this Python's stub beside its library.

        Raises:
            TritonMissingError: the wheel is not installed, or has no stub for this Python.
        """
        spec = importlib.util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise TritonMissingError("the wheel nvidia-pytriton is not installed")
        package = Path(spec.origin).parent
        root = package / "tritonserver"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
        target = folder / "backends" / "python"
        target.mkdir(parents=True, exist_ok=True)
        try:
            for source in [*(root / "backends" / "python").iterdir(), stub]:
                _copy(source, target / source.name)
        except OSError as error:
            raise TritonMissingError(f"{error.filename}: {error.strerror}") from error
        binary = root / "bin" / "tritonserver"
        if not os.access(binary, os.X_OK):
            binary = _copy(binary, folder / "bin" / "tritonserver")
        return cls(binary, target.parent, package.parent / "nvidia_pytriton.libs")

    def command(self, server_id: str, repository: Path, host: str, port: int) -> list[str]:
        """The command of one server: gRPC at `port`, HTTP at the one before it and metrics at the one after it (as Triton's own 8001, 8000 and
        8002); nothing is guessed about the model.
        """
        return [
            str(self.binary),
            f"--id={server_id}",
            f"--model-repository={repository}",
            f"--backend-directory={self.backends}",
            f"--backend-config=python,shm-region-prefix-name={server_id}_",
            "--disable-auto-complete-config",
            f"--http-address={host}",
            f"--http-port={port - 1}",
            f"--http-thread-count={HTTP_THREADS}",
            f"--metrics-address={host}",
            f"--metrics-port={port + 1}",
            "--allow-cpu-metrics=false",
            "--allow-gpu-metrics=false",
            f"--grpc-address={host}",
            f"--grpc-port={port}",
            "--exit-timeout-secs=5",
            "--pinned-memory-pool-byte-size=0",
            "--log-info=false",
        ]

    def environment(self) -> dict[str, str]:
        """The environment of one server."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_"))}
        libraries = [str(self.libraries), str(sysconfig.get_config_var("LIBDIR") or "")]
        python = str(Path(sys.prefix) / "bin")
        kept["PATH"] = f"{python}:{os.environ.get('PATH', '/usr/bin:/bin')}"
        kept["LD_LIBRARY_PATH"] = ":".join(path for path in libraries if path)
        kept["PYTHONUNBUFFERED"] = "1"
        return kept

    def arguments(self, server: Server) -> list[str]:
        """What the manifest asks of the server as a whole."""
        found = triton_options.arguments(server)
        return (
            [f"--cache-directory={self.binary.parent.parent / 'caches'}", *found]
            if server.response_cache_mib
            else found
        )

    def start(
        self, server_id: str, repository: Path, host: str, port: int, log: Path, *, arguments: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Start one server in its own session; it outlives this process."""
        log.parent.mkdir(parents=True, exist_ok=True)
        trim(log)
        with log.open("ab") as output:
            return subprocess.Popen(
                [*self.command(server_id, repository, host, port), *arguments],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=log.parent,
            )


def _copy(source: Path, target: Path) -> Path:
    """Copy once, executable; a rename, so that a server that runs the old file is not disturbed."""
    if not target.exists() or target.stat().st_size != source.stat().st_size:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(source, scratch)
        scratch.chmod(0o755)
        scratch.rename(target)
    return target


def started_at(pid: int) -> float | None:
    """When a process started, in Unix seconds; None when it does not run (a zombie does not)."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def runs(pid: int, since: float) -> bool:
    """Whether the very process that was recorded still runs, and not another one with its number."""
    found = started_at(pid) if pid else None
    return found is not None and abs(found - since) <= START_TIME_SLACK_S


def find(server_id: str) -> int | None:
    """The process with this server id on its command line: one that was started but whose number was not recorded any more."""
    mark = f"--id={server_id}"
    for process in psutil.process_iter(["cmdline"]):
        if mark in (process.info["cmdline"] or ()) and process.status() != psutil.STATUS_ZOMBIE:
            return int(process.pid)
    return None


def terminate(pid: int, since: float) -> None:
    """Ask a server to finish its requests and end."""
    if runs(pid, since):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def sweep(pid: int, since: float, server_id: str) -> None:
    """Kill what is left of a server, its stubs too, and remove its shared memory."""
    if runs(pid, since):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in psutil.process_iter(["cmdline"]):
        # A stub's command line carries the prefix of its server's shared memory, so nobody else's process is meant.
        if any(part.startswith(f"{server_id}_") for part in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                process.kill()
    for region in Path("/dev/shm").glob(f"{server_id}_*"):  # noqa: S108 - where the kernel keeps shared memory
        region.unlink(missing_ok=True)


def free_port(host: str, taken: frozenset[int], wanted: int = 0) -> int:
    """`wanted` when it and the ports beside it (HTTP before, metrics after) are free, else another such port; none of them is beside one of
    `taken`.
    """
    closed = {beside for port in taken for beside in (port - 1, port, port + 1)}
    for port in (wanted, *[0] * 50):
        if (found := _bound(host, port)) is None or closed & {found - 1, found, found + 1}:
            continue
        if _bound(host, found - 1) is not None and _bound(host, found + 1) is not None:
            return found
    raise OSError(f"no free port on {host}")


def _bound(host: str, port: int) -> int | None:
    """The port that was bound and let go again; None when it is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return None
        return int(probe.getsockname()[1])


def last_lines(log: Path, count: int = 5) -> str:
    """The end of a server's log in one line, for the reason of a crash."""
    try:
        tail = log.read_bytes()[-8192:].decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    words = [" ".join(line.split()) for line in tail if line.strip(" +-|")]
    return " / ".join(words[-count:])[-1500:]


def trim(log: Path) -> None:
    """Empty a log that grew past its limit; the server appends on."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > LOG_BYTES:
            os.truncate(log, 0)
