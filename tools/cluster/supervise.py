"""Runs the processes of a control plane or a cluster: starts each, starts it again when it ends, ends all in reverse order.

A test that wants a component to stay away creates `<name>.hold` in the folder and kills the pid in `<name>.pid`; removing the file brings
it back.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_S = 0.1
STOP_TIMEOUT_S = 5.0
RESTART_S = 0.5


@dataclass(frozen=True)
class Component:
    """One process."""

    name: str
    command: Sequence[str]
    ready: Callable[[], bool]
    """Whether it answers; the next one starts after that."""
    environment: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 90.0


class ComponentError(Exception):
    """A component that did not come up; the message shows the end of its log."""


class Supervisor:
    """Owns the processes until `stop`."""

    def __init__(self, folder: Path, components: Sequence[Component]) -> None:
        self._folder = folder
        self._components = list(components)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ended_at: dict[str, float] = {}

    def start(self, told: Callable[[], bool] = lambda: False) -> None:
        """Start everything in order; `told` ends the wait early.

        Raises:
            ComponentError: one did not get ready in time.
        """
        for component in self._components:
            self._start(component)
            deadline = time.monotonic() + component.start_timeout_s
            while not component.ready():
                if told():
                    return
                self.look()
                if time.monotonic() > deadline:
                    log = (self._folder / f"{component.name}.log").read_text(encoding="utf-8", errors="replace")
                    raise ComponentError(f"{component.name} is not ready:\n{log[-3000:]}")
                time.sleep(POLL_S)

    def look(self) -> None:
        """Start again what ended and is not held."""
        for component in self._components:
            process = self._running.get(component.name)
            if process is None or process.poll() is None:
                continue
            ended = self._ended_at.setdefault(component.name, time.monotonic())
            held = (self._folder / f"{component.name}.hold").exists()
            if not held and time.monotonic() - ended >= RESTART_S:
                self._start(component)

    def stop(self) -> None:
        """End everything, last started first."""
        for component in reversed(self._components):
            process = self._running.pop(component.name, None)
            if process is None or process.poll() is not None:
                continue
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            if process.poll() is None:
                process.kill()
                process.wait()

    def _start(self, component: Component) -> None:
        self._ended_at.pop(component.name, None)
        with (self._folder / f"{component.name}.log").open("ab") as log:
            process = subprocess.Popen(
                component.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **component.environment},
                start_new_session=True,
            )
        self._running[component.name] = process
        scratch = self._folder / f"{component.name}.pid.tmp"
        scratch.write_text(str(process.pid), encoding="ascii")
        scratch.replace(self._folder / f"{component.name}.pid")


def run(folder: Path, components: Sequence[Component], on_ready: Callable[[], None] = lambda: None) -> int:
    """Supervise until SIGTERM or SIGINT; `on_ready` is called once everything answers."""
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: told.append(received))
    supervisor = Supervisor(folder, components)
    try:
        supervisor.start(lambda: bool(told))
        if not told:
            on_ready()
        while not told:
            supervisor.look()
            time.sleep(POLL_S)
    finally:
        supervisor.stop()
    return 0
