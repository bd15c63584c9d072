"""A real Redis server."""

import os
import shutil
from pathlib import Path

from millrace_kit.settings import TlsSettings

from parts.server import PartError, Server, free_port, listening, start

DATABASES = 256


def missing() -> str:
    """What to install, or empty when a server can be started."""
    return "" if shutil.which("redis-server") else "needs Redis (Debian: redis-server)"


def start_redis(
    folder: Path, *, owner_pid: int | None = None, port: int = 0, tls: TlsSettings | None = None, password: str = ""
) -> Server:
    """A server on loopback without persistence; the address is its `redis://` URL without a database number.

    Args:
        folder: what it writes.
        owner_pid: process it ends with; this one when None.
        port: 0 takes a free one.
        tls: its certificate (for `localhost`); then it takes TLS alone and the address is `rediss://`.
        password: what clients must know; empty for none.
    """
    reason = missing()
    if reason:
        raise PartError(f"redis {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "server.pid").unlink(missing_ok=True)
    port = port or free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    command += ["--appendonly", "no", "--databases", str(DATABASES)]
    if tls is None:
        command += ["--port", str(port)]
    else:
        command += ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"]
        command += ["--tls-cert-file", tls.cert_file, "--tls-key-file", tls.key_file, "--tls-ca-cert-file", tls.ca_file]
    if password:
        command += ["--requirepass", password]
    return start(
        "redis",
        command,
        address=f"rediss://localhost:{port}" if tls else f"redis://127.0.0.1:{port}",
        folder=folder,
        ready=lambda: listening(port),
        owner_pid=owner_pid or os.getpid(),
    )
