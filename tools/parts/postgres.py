"""A real PostgreSQL server; it refuses to run as root, so root starts it as another user."""

import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from parts.server import PartError, Server, free_port, start

USERS = ("postgres", "nobody")
ROLE = "millrace"


def _program(name: str) -> str:
    """The newest installed version's program, or empty."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda p: int(p.parts[-3]))
    return str(found[-1]) if found else shutil.which(name) or ""


def missing() -> str:
    """What to install, or empty when a server can be started."""
    if not (_program("postgres") and _program("initdb")):
        return "needs PostgreSQL (Debian: postgresql)"
    return ""


def start_postgres(folder: Path, *, owner_pid: int | None = None, port: int = 0) -> Server:
    """A server on loopback; the address is the SQLAlchemy URL of its database `postgres`, role `millrace`."""
    reason = missing()
    if reason:
        raise PartError(f"postgres {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "server.pid").unlink(missing_ok=True)
    user = ""
    if os.geteuid() == 0:
        known = {entry.pw_name for entry in pwd.getpwall()}
        user = next(name for name in USERS if name in known)
        shutil.chown(folder, user)
    data = folder / "data"
    if not data.exists():
        command = [
            _program("initdb"),
            "-D",
            str(data),
            "-U",
            ROLE,
            "--auth=trust",
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C",
        ]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=120, cwd=folder, **_as_user(user)
        )
        if done.returncode:
            raise PartError(f"initdb failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    port = port or free_port()
    command = [_program("postgres"), "-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"]
    command += ["-c", "fsync=off", "-c", "max_connections=200"]
    return start(
        "postgres",
        command,
        address=f"postgresql+psycopg://{ROLE}@127.0.0.1:{port}/postgres",
        folder=folder,
        ready=lambda: _answers(port),
        owner_pid=owner_pid or os.getpid(),
        stop_signal=signal.SIGQUIT,
        user=user,
    )


def _as_user(user: str) -> dict[str, Any]:
    return {"user": user, "group": user, "extra_groups": []} if user else {}


def _answers(port: int) -> bool:
    check = [_program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    return subprocess.run(check, check=False, timeout=10).returncode == 0
