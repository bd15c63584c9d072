"""A real S3 server: versitygw over a folder, built once by Go."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from parts.server import PartError, Server, free_port, listening, start

VERSION = "v1.8.0"
PACKAGE = "github.com/versity/versitygw/cmd/versitygw"
BUILD_TIMEOUT_S = 900
BUCKET = "millrace"
KEY_ID, SECRET_KEY = "millrace-tests", "millrace-tests-secret"
REGION = "us-east-1"
# Set when Go was tried and had no access, so that tests are left out instead of failing one by one.
UNREACHABLE_VARIABLE = "MILLRACE_S3_UNREACHABLE"


def program() -> Path:
    """Where the built server is kept, for every checkout of this user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "millrace" / "bin" / "versitygw"


def missing() -> str:
    """What to install, or empty when a server can be started."""
    if program().exists():
        return ""
    if os.environ.get(UNREACHABLE_VARIABLE):
        return "needs versitygw's source, which Go could not get"
    return "" if shutil.which("go") else "needs Go to build versitygw"


def fetch() -> Path:
    """The server's program, built the first time."""
    target = program()
    if target.exists():
        return target
    scratch = target.parent / f".versitygw.{os.getpid()}"
    scratch.mkdir(parents=True)
    environment = {**os.environ, "GOBIN": str(scratch), "CGO_ENABLED": "0", "GOFLAGS": "-trimpath"}
    try:
        command = ["go", "install", f"{PACKAGE}@{VERSION}"]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, env=environment
        )
        if done.returncode:
            raise PartError(f"Go could not build versitygw {VERSION}:\n{done.stderr[-2000:]}")
        (scratch / "versitygw").replace(target)
    finally:
        shutil.rmtree(scratch)
    return target


def start_s3(folder: Path, *, owner_pid: int | None = None, port: int = 0) -> Server:
    """A server on loopback with one bucket, `BUCKET`; the address is its URL. Starting again in a used `folder` keeps the data."""
    reason = missing()
    if reason:
        raise PartError(f"s3 {reason}")
    fetched = fetch()
    for name in ("data", "meta"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "data" / BUCKET).mkdir(exist_ok=True)
    (folder / "server.pid").unlink(missing_ok=True)
    port = port or free_port()
    command = [str(fetched), "--port", f"127.0.0.1:{port}", "--region", REGION, "--keep-alive", "--quiet"]
    # Metadata beside the data: not every file system of a build machine has extended attributes.
    command += ["posix", "--sidecar", str(folder / "meta"), str(folder / "data")]
    return start(
        "s3",
        command,
        address=f"http://127.0.0.1:{port}",
        folder=folder,
        ready=lambda: listening(port),
        owner_pid=owner_pid or os.getpid(),
        environment={"ROOT_ACCESS_KEY": KEY_ID, "ROOT_SECRET_KEY": SECRET_KEY},
    )


def client_environment(address: str) -> dict[str, str]:
    """What a process needs in its environment to use the server; s3fs and delta-rs read the same names."""
    return {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL": address,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ALLOW_HTTP": "true",
    }


@contextlib.contextmanager
def in_environment(address: str) -> Iterator[None]:
    """`client_environment` as this process's own."""
    wanted = client_environment(address)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
