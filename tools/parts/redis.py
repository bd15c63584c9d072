"""A real Redis server."""

import os
import shutil
from pathlib import Path

from parts.server import PartError, Server, free_port, listening, start

DATABASES = 256


def missing() -> str:
    """What to install, or empty when a server can be started."""
    return "" if shutil.which("redis-server") else "needs Redis (Debian: redis-server)"


def start_redis(folder: Path, *, owner_pid: int | None = None, port: int = 0) -> Server:
    """A server on loopback without persistence; the address is its `redis://` URL without a database number."""
    reason = missing()
    if reason:
        raise PartError(f"redis {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "server.pid").unlink(missing_ok=True)
    port = port or free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
    command += ["--appendonly", "no", "--databases", str(DATABASES)]
    return start(
        "redis",
        command,
        address=f"redis://127.0.0.1:{port}",
        folder=folder,
        ready=lambda: listening(port),
        owner_pid=owner_pid or os.getpid(),
    )
