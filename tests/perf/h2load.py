"""A closed-loop load by nghttp2's `h2load`: a client in C, so that the serving side is what limits (Debian package nghttp2-client).

It knows nothing of gRPC statuses; callers ask once by a real client first, and count at the server where it matters.
"""

import asyncio
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

LONGEST_S = 120.0


@dataclass(frozen=True, slots=True)
class Load:
    """One kind of request, repeated."""

    url: str
    body: bytes
    headers: tuple[tuple[str, str], ...]
    http1: bool = False
    connections: int = 8
    streams: int = 1
    """Requests at once on each connection (HTTP/2)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a load."""

    seconds: float
    latencies_ms: list[float]
    """Sorted."""


def grpc_load(
    address: str,
    method: str,
    message: bytes,
    metadata: tuple[tuple[str, str], ...] = (),
    *,
    connections: int = 8,
    streams: int = 1,
) -> Load:
    """Unary calls."""
    headers = (("content-type", "application/grpc"), ("te", "trailers"), *metadata)
    body = b"\0" + len(message).to_bytes(4, "big") + message
    return Load(f"http://{address}{method}", body, headers, connections=connections, streams=streams)


async def run(load: Load, requests: int) -> Outcome:
    """That many requests; raises when one was not answered 2xx."""
    if shutil.which("h2load") is None:
        raise RuntimeError("h2load is missing (Debian: apt-get install nghttp2-client)")
    with tempfile.TemporaryDirectory(prefix="h2load-") as folder:
        body, log = Path(folder) / "body", Path(folder) / "log"
        body.write_bytes(load.body)
        command = [
            "h2load",
            "-n",
            str(requests),
            "-c",
            str(load.connections),
            "-m",
            str(load.streams),
            "-d",
            str(body),
            "--log-file",
            str(log),
        ]
        command += ["--h1"] if load.http1 else []
        for name, value in load.headers:
            command += ["-H", f"{name}: {value}"]
        process = await asyncio.create_subprocess_exec(*command, load.url, stdout=asyncio.subprocess.PIPE)
        try:
            output, _ = await asyncio.wait_for(process.communicate(), LONGEST_S)
        finally:
            if process.returncode is None:
                process.kill()
        text = output.decode()
        found = re.search(r"finished in ([\d.]+)(s|ms)", text)
        if not found or f" {requests} 2xx," not in text.replace("status codes:", " "):
            raise RuntimeError(f"{load.url}: {text}")
        seconds = float(found[1]) / (1000 if found[2] == "ms" else 1)
        lines = (line.split("\t") for line in log.read_text().splitlines())
        return Outcome(seconds, sorted(int(fields[2]) / 1000 for fields in lines))
