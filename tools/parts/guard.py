"""Runs one server and ends it when it is told to, or when the process it serves is gone (killed test runs leave nothing).

Usage: guard.py OWNER_PID STOP_SIGNAL PID_FILE USER COMMAND…
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

POLL_S = 0.2
GRACE_S = 10.0


def main() -> int:
    """Start the server and watch its owner."""
    owner_pid, stop_signal, pid_file, user = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: told.append(received))
    if user:
        server = subprocess.Popen(sys.argv[5:], user=user, group=user, extra_groups=[])
    else:
        server = subprocess.Popen(sys.argv[5:])
    scratch = pid_file.with_suffix(".tmp")
    scratch.write_text(str(server.pid), encoding="ascii")
    scratch.replace(pid_file)
    while not told and _there(owner_pid):
        try:
            return server.wait(POLL_S)
        except subprocess.TimeoutExpired:
            continue
    server.send_signal(stop_signal)
    deadline = time.monotonic() + GRACE_S
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    server.kill()
    return server.wait()


def _there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
