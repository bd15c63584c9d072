"""Several processes of one service behind the same ports, because one process of Python uses one core.

Each is a whole replica: it binds the same ports (SO_REUSEPORT, the kernel spreads connections over them), keeps its files in a folder of its
own and has an endpoint for metrics and probes of its own, on the port of the first one plus its number. The process that was started runs
them and nothing else: it hands on SIGTERM and SIGINT, and when one of them ends the others end too, so that what started it starts all
anew. In a cluster replicas do the same with a Service in front; this is for a machine without one.
"""

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import TypeVar

from millrace_kit.settings import ServiceSettings

NUMBER = "MILLRACE_PROCESS_NUMBER"
"""Environment variable that tells such a process its number, from 0."""
_STOPS = (signal.SIGTERM, signal.SIGINT)

S = TypeVar("S", bound=ServiceSettings)


def own_number() -> int | None:
    """This process's number; None where it is the only one."""
    found = os.environ.get(NUMBER)
    return int(found) if found is not None else None


def own_settings(settings: S) -> S:
    """The settings of all as this process needs them."""
    number = own_number()
    if number is None:
        return settings
    host, _, port = settings.telemetry.metrics_listen.rpartition(":")
    metrics = f"{host}:{int(port) + number}" if int(port) else settings.telemetry.metrics_listen
    telemetry = settings.telemetry.model_copy(update={"metrics_listen": metrics})
    return settings.model_copy(update={"telemetry": telemetry, "state_dir": f"{settings.state_dir}/process-{number}"})


def run_processes(count: int) -> int:
    """Run this program's command line `count` times until one of them ends or a signal comes; returns the exit status."""
    children: list[subprocess.Popen[bytes]] = []
    told = False

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal told
        told = True
        for child in children:
            child.send_signal(number)

    for stopping in _STOPS:
        signal.signal(stopping, stop)
    for number in range(count):
        if not told:
            # In a session of its own, so that Ctrl-C reaches it once, through here.
            command = [sys.executable, *sys.orig_argv[1:]]
            children.append(subprocess.Popen(command, env={**os.environ, NUMBER: str(number)}, start_new_session=True))
    ended = {child.pid: child for child in children}
    status = 0
    while ended:
        pid, waited = os.wait()
        child = ended.pop(pid, None)
        if child is None:
            continue
        child.returncode = os.waitstatus_to_exitcode(waited)
        if child.returncode != 0 or not told:
            status = status or abs(child.returncode) or 1
        for other in () if told else ended.values():
            other.send_signal(signal.SIGTERM)
        told = True
    return status
