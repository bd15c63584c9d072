"""The Docker that builds images: this machine's, or a daemon of our own with its data below one folder, gone when the work is done.

Builds share the host's network, so that our own daemon needs no network and no firewall rules. It writes nothing outside its folder.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 2400.0
POLL_S = 0.1


class ImageError(Exception):
    """An image that could not be made; the message shows the end of what the tool said."""


def client() -> str:
    """A `docker` command that builds with BuildKit: one with buildx, or one old enough (before 23) to bring its own.

    Raises:
        ImageError: there is none.
    """
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        found = shutil.which("docker", path=folder)
        if found is None:
            continue
        buildx = subprocess.run([found, "buildx", "version"], check=False, capture_output=True, timeout=30)
        if buildx.returncode == 0:
            return found
        said = subprocess.run([found, "--version"], check=False, capture_output=True, text=True, timeout=30).stdout
        if int((said.partition("version ")[2] or "99").split(".")[0]) < 23:
            return found
    raise ImageError("needs docker with BuildKit (Debian: docker.io)")


class Builder:
    """The daemon, as a context manager.

    Args:
        folder: where our own daemon keeps everything; used again, what was built before is found again. None: the machine's Docker.
    """

    def __init__(self, folder: Path | None) -> None:
        self._own = folder is not None
        self.folder = folder or Path()
        self._socket = self.folder / "docker.sock"
        self._docker = client()
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        if not self._own:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("ab")
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # one run at a time; the daemon ends with it
        try:
            if not self._answers():  # one that does was left by a run that was killed
                self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        daemon = shutil.which("dockerd")
        if daemon is None:
            raise ImageError("needs dockerd (Debian: docker.io)")
        (self.folder / "daemon.json").write_text("{}", encoding="ascii")
        (self.folder / "docker.pid").unlink(missing_ok=True)
        command = [daemon, "--config-file", str(self.folder / "daemon.json"), "-H", f"unix://{self._socket}"]
        command += ["--data-root", str(self.folder / "data"), "--exec-root", str(self.folder / "exec")]
        command += [
            "--pidfile",
            str(self.folder / "docker.pid"),
            "--bridge=none",
            "--iptables=false",
            "--ip6tables=false",
        ]
        with (self.folder / "dockerd.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                text = (self.folder / "dockerd.log").read_text(encoding="utf-8", errors="replace")
                raise ImageError(f"dockerd did not start:\n{text[-2000:]}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End our own daemon; the machine's is left alone."""
        with contextlib.suppress(OSError, ValueError):  # until there is no such process
            pid = int((self.folder / "docker.pid").read_text(encoding="ascii")) if self._own else 0
            deadline = time.monotonic() + STOP_TIMEOUT_S
            wanted = int(signal.SIGTERM)  # once: the third one makes dockerd end without order
            while pid:
                os.kill(pid, wanted if time.monotonic() < deadline else signal.SIGKILL)
                wanted = 0  # only asks whether it is there
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
                time.sleep(POLL_S)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def command(self, *words: str) -> list[str]:
        """A docker command line for this daemon."""
        return [self._docker, *(["-H", f"unix://{self._socket}"] if self._own else []), *words]

    def run(self, *words: str, stdin: int | None = subprocess.DEVNULL, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run a docker command to its end; what it printed.

        Raises:
            ImageError: it failed.
        """
        done = subprocess.run(
            self.command(*words),
            check=False,
            capture_output=True,
            text=True,
            stdin=stdin,
            env={**os.environ, "DOCKER_BUILDKIT": "1"},
            timeout=timeout_s,
        )
        if done.returncode:
            raise ImageError(f"docker {' '.join(words)}:\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def label(self, image: str, label: str) -> str:
        """A label of an image; empty when there is no such image or label."""
        done = subprocess.run(
            self.command("image", "inspect", "--format", f'{{{{index .Config.Labels "{label}"}}}}', image),
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout.strip()

    def pipe(self, words: Sequence[str], into: Sequence[str]) -> None:
        """Run a docker command and give what it prints to another program.

        Raises:
            ImageError: one of them failed.
        """
        with subprocess.Popen(self.command(*words), stdout=subprocess.PIPE) as source:
            done = subprocess.run(
                into, check=False, stdin=source.stdout, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
            )
            if done.returncode or source.wait():
                raise ImageError(f"docker {' '.join(words)} | {' '.join(into)}:\n{done.stderr[-2000:]}")

    def _answers(self) -> bool:
        if not self._socket.exists():
            return False
        done = subprocess.run(self.command("version"), check=False, capture_output=True, timeout=30)
        return done.returncode == 0
