"""Runs Envoy and ends it without failing a call: the parent of Envoy in its container.

    python envoy_supervisor.py --admin HOST:PORT [--deregister-s S] [--drain-s S] [--goaway-s S] [--flush-s S] -- ENVOY ARGUMENTS…

On SIGTERM:
1. Envoy says that it is not ready, and asks every connection that brings an answer to end (GOAWAY). It still takes new connections
   for the time load balancers need to turn away.
2. It takes no more connections; the calls that run have their time to end.
3. It hands over its access log and ends.
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

POLL_S = 0.1
ADMIN_TIMEOUT_S = 2.0
END_S = 5.0
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
    flushed = time.monotonic() - started + limits.flush_s
    while not over(flushed):
        envoy.wait(POLL_S)


def main() -> int:
    """Run until told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--admin", required=True)
    for name in ("deregister", "drain", "goaway", "flush"):
        parser.add_argument(f"--{name}-s", type=float, default=0.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    envoy = Envoy(command)
    while not envoy.told and not envoy.ended:
        envoy.wait(None)
    if envoy.told:
        drain(envoy, Admin(arguments.admin), arguments)
        envoy.end()
        return 0
    return envoy.end()


if __name__ == "__main__":
    raise SystemExit(main())
