"""The parent of one torchrun worker: `python -I ranks.py <command>` runs it and writes its exit code down, which torchrun does not pass on.

Run as a file, not as a module: it needs nothing but the standard library, starts quickly, and holds no memory worth naming.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

FOLDER = "ranks"
FOLDER_VARIABLE = "MILLRACE_RANKS_FOLDER"
PR_SET_PDEATHSIG = 1


def first_exit(folder: Path) -> int | None:
    """Exit code of the worker that failed first (a signal's number negated); None when none said that it failed."""
    ends = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(ValueError, KeyError, OSError):
            end = json.loads(path.read_text(encoding="utf-8"))
            ends.append((int(end["at_ns"]), int(end["code"])))
    return min(ends)[1] if ends else None


def run(command: list[str], folder: Path | None, rank: str) -> int:
    """Run the worker; returns its exit code."""
    stopping = False
    libc = ctypes.CDLL(None)

    def before_exec() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    child = subprocess.Popen(command, preexec_fn=before_exec)  # noqa: PLW1509 - no other thread runs yet

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    code = child.wait()
    # A worker that torchrun ends because another one failed says nothing about why.
    if code != 0 and not stopping and folder is not None:
        scratch = folder / f".{rank}"
        scratch.write_text(json.dumps({"code": code, "at_ns": time.time_ns()}), encoding="utf-8")
        scratch.replace(folder / f"{rank}.json")
    return code


def main() -> None:
    """Run the command in the arguments as the worker whose rank the environment names."""
    folder = os.environ.get(FOLDER_VARIABLE)
    code = run(sys.argv[1:], Path(folder) if folder else None, os.environ.get("RANK", "0"))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    raise SystemExit(abs(code))


if __name__ == "__main__":
    main()
