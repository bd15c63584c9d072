"""Runs Envoy and ends it without failing a call: the parent of Envoy in its container.

    python envoy_supervisor.py --admin HOST:PORT [--deregister-s S] [--drain-s S] [--goaway-s S]
        [--log-folder F --log-bytes N --log-files N] -- ENVOY ARGUMENTS…

Envoy writes its access log into `F/current`, a link to the newest of the files there. When that has its size, the supervisor makes the
link point to the next name and has Envoy open it. Whoever reads the files removes them; while nobody does, the oldest go here, and
their lines are counted in `F/dropped`.

On SIGTERM:
1. Envoy says that it is not ready, and asks every connection that brings an answer to end (GOAWAY). It still takes new connections
   for the time load balancers need to turn away.
2. It takes no more connections; the calls that run have their time to end.
3. It writes out its access log and ends.
A second signal ends it at once, and its parent's death does too. When Envoy ends by itself, so does this process, with its status.

Standard library only, and started by path: this process stays beside Envoy for its whole life and should cost little.
"""

import argparse
import contextlib
import ctypes
import http.client
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

POLL_S = 0.1
ADMIN_TIMEOUT_S = 2.0
END_S = 5.0
# How often the size of the access log is looked at.
LOOK_S = 1.0
LOG_SUFFIX, CURRENT, DROPPED = ".log", "current", "dropped"
PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


class Admin:
    """The few things asked of Envoy's admin page at `host:port`; failures are answers too, for Envoy may be gone."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = host.removeprefix("[").removesuffix("]"), int(port)

    def tell(self, path: str) -> None:
        """POST; a failure is only reported."""
        try:
            self._call("POST", path)
        except (OSError, http.client.HTTPException) as error:
            print(f"envoy: {path}: {error}", file=sys.stderr)

    def counts(self) -> tuple[int, int]:
        """Client calls running and client connections open; zeros when Envoy does not answer."""
        names = ("http.v2.downstream_rq_active", "http.v2.downstream_cx_active")
        try:
            body = self._call("GET", "/stats?format=json&filter=" + "http%5C.v2%5C.downstream_(rq|cx)_active%24")
            found = {entry["name"]: int(entry["value"]) for entry in json.loads(body)["stats"] if "name" in entry}
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            return 0, 0
        return found.get(names[0], 0), found.get(names[1], 0)

    def _call(self, method: str, path: str) -> bytes:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=ADMIN_TIMEOUT_S)
        try:
            connection.request(method, path)
            return connection.getresponse().read()
        finally:
            connection.close()


class AccessLog:
    """The files in `folder`, named by growing numbers (about the time they were begun, in ns)."""

    def __init__(self, folder: str, max_bytes: int, max_files: int) -> None:
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._folder.mkdir(parents=True, exist_ok=True)
        self.begin()

    def files(self) -> list[Path]:
        """Oldest first."""
        return sorted(self._folder.glob("*" + LOG_SUFFIX))

    def begin(self) -> None:
        """Give Envoy a new name to write to; it makes the file once it opens it, and by then has written all of the one before."""
        last = max((int(path.stem) for path in self.files()), default=0)
        with contextlib.suppress(OSError, ValueError):
            last = max(last, int((self._folder / CURRENT).readlink().stem))
        name = f"{max(time.time_ns(), last + 1):020d}{LOG_SUFFIX}"
        scratch = self._folder / f".{CURRENT}"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(name)
        scratch.replace(self._folder / CURRENT)

    def look(self, admin: Admin) -> None:
        """Begin the next file when the newest is full, remove the oldest when there are too many."""
        try:
            if (self._folder / CURRENT).stat().st_size >= self._max_bytes:
                self.begin()
                admin.tell("/reopen_logs")
            for path in self.files()[: -self._max_files]:
                self._drop(path)
        except OSError as error:
            # Nothing written yet, the reader was faster, or the disk is full: looked at again in a moment.
            if not isinstance(error, FileNotFoundError):
                print(f"envoy: access log: {error}", file=sys.stderr)

    def _drop(self, path: Path) -> None:
        with path.open("rb") as file:
            lines = sum(1 for _ in file)
        kept = self._folder / DROPPED
        with contextlib.suppress(OSError, ValueError):
            lines += int(kept.read_text(encoding="ascii"))
        scratch = self._folder / f".{DROPPED}"
        scratch.write_text(str(lines), encoding="ascii")
        scratch.replace(kept)
        path.unlink()
        print(f"envoy: access log: nobody reads it, {path.name} was removed", file=sys.stderr)


class Envoy:
    """The process."""

    def __init__(self, command: list[str]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        library = ctypes.CDLL(None)

        def prepare() -> None:
            library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

        self.process = subprocess.Popen(command, preexec_fn=prepare)  # noqa: PLW1509 - one thread only
        self.told = 0

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self.process.poll() is not None

    def wait(self, seconds: float | None) -> None:
        """Wait until a signal comes, Envoy ends or the time is over."""
        if self.ended:
            return
        found = signal.sigwait(SIGNALS) if seconds is None else signal.sigtimedwait(SIGNALS, seconds)
        number = found if isinstance(found, int) else (found.si_signo if found else 0)
        self.told += number in {signal.SIGTERM, signal.SIGINT}

    def end(self) -> int:
        """End it; returns its exit status as a shell would."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            status = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        return status if status >= 0 else 128 - status


def drain(envoy: Envoy, admin: Admin, limits: argparse.Namespace) -> None:
    """Bring Envoy to where ending it fails no call, within the limits."""
    started = time.monotonic()

    def over(seconds: float) -> bool:
        return envoy.ended or envoy.told > 1 or time.monotonic() >= started + seconds

    admin.tell("/healthcheck/fail")
    while not over(limits.deregister_s):
        envoy.wait(min(POLL_S, limits.deregister_s))
    admin.tell("/drain_listeners?inboundonly")
    last = limits.deregister_s + limits.drain_s
    while not over(last):
        calls, connections = admin.counts()
        if not connections:
            break
        # Connections that never bring an answer are not asked to end; they may be cut once nothing runs on any.
        if not calls:
            last = min(last, time.monotonic() - started + limits.goaway_s)
        else:
            last = limits.deregister_s + limits.drain_s
        envoy.wait(POLL_S)


def main() -> int:
    """Run until told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--admin", required=True)
    for name in ("deregister", "drain", "goaway"):
        parser.add_argument(f"--{name}-s", type=float, default=0.0)
    parser.add_argument("--log-folder", default="")
    parser.add_argument("--log-bytes", type=int, default=1 << 24)
    parser.add_argument("--log-files", type=int, default=16)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    admin = Admin(arguments.admin)
    log = AccessLog(arguments.log_folder, arguments.log_bytes, arguments.log_files) if arguments.log_folder else None
    envoy = Envoy(command)
    while not envoy.told and not envoy.ended:
        envoy.wait(LOOK_S)
        if log is not None:
            log.look(admin)
    if envoy.told:
        drain(envoy, admin, arguments)
        envoy.end()
        return 0
    return envoy.end()


if __name__ == "__main__":
    raise SystemExit(main())
