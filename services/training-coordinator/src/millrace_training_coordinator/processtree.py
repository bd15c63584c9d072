"""Finding and ending all processes of an attempt, wherever they went.

torchrun starts its workers in sessions of their own, so a process group is not enough. Three nets: the descendants of the
supervisor (to which orphans return, it is their subreaper), the session, and a mark in every process's environment, which still
finds them after the supervisor itself was killed.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable

import psutil

MARK_VARIABLE = "MILLRACE_ATTEMPT_FOLDER"
KILL_ROUNDS = 50
KILL_PAUSE_S = 0.02


def descendants(pid: int) -> list[psutil.Process]:
    """Living processes below `pid`, at any depth."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
    return [process for process in children if _lives(process)]


def marked(folder: str) -> list[psutil.Process]:
    """Living processes whose environment names the attempt's folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK_VARIABLE) == folder and _lives(process):
                found.append(process)
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def birth(pid: int) -> str:
    """When `pid` started, in a form that no other process of this or another boot shares; empty when it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            # The name in parentheses may hold anything; state is the first field after it, start time (in ticks) the 20th.
            fields = file.read().rpartition(")")[2].split()
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:  # noqa: PTH123
            boot = file.read().strip()
    except OSError:
        return ""
    return "" if fields[0] in {"Z", "X"} else f"{boot}:{fields[19]}"


def alive(pid: int, born: str) -> bool:
    """Whether the process that was born as `born` still runs; a reused pid is another process."""
    return birth(pid) == born


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    """Signal each that is still the process it was."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def kill_all(find: Callable[[], list[psutil.Process]]) -> bool:
    """SIGKILL what `find` returns until it returns nothing; False when something survived every round."""
    for _round in range(KILL_ROUNDS):
        found = find()
        if not found:
            return True
        send(found, signal.SIGKILL)
        time.sleep(KILL_PAUSE_S)
    return not find()


def memory_bytes(pid: int) -> int:
    """Memory of all processes below `pid`; pages they share count once (PSS), so that torch's libraries are not multiplied."""
    total = 0
    for process in descendants(pid):
        with contextlib.suppress(psutil.Error, OSError):
            rss = process.memory_info().rss
            # Reading shares is dear; it matters only where several processes share what is large.
            total += process.memory_full_info().pss if rss > 64 << 20 else rss
    return total


def kernel_oom_kills() -> int:
    """How often the kernel ended a process because memory ran out, since boot; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat", encoding="ascii") as file:  # noqa: PTH123
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


# Where the kernel counts processes it ended in this container for want of memory: cgroup v2, then v1.
CGROUP_COUNTS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")


def memory_kills() -> int:
    """How often the kernel ended a process of this container, or where it does not say, of this machine, for want of memory."""
    for path in CGROUP_COUNTS:
        with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return kernel_oom_kills()
