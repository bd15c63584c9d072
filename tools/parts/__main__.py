"""`python -m parts kafka|postgres|redis|s3`: start one by hand; `missing`: what tests lack here, one a line; `fetch NAME`: get or
build what kafka, s3 or kubernetes runs.
"""

import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from cluster import binaries, controlplane

from parts import chromium, kafka, postgres, prometheus, redis, s3
from parts.server import PartError

CHECKS = {
    "kafka": kafka.missing,
    "postgres": postgres.missing,
    "redis": redis.missing,
    "s3": s3.missing,
    "browser": chromium.missing,
    "kubernetes": controlplane.missing,
    "prometheus": prometheus.missing,
}
STARTS = {
    "kafka": kafka.start_kafka,
    "postgres": postgres.start_postgres,
    "redis": redis.start_redis,
    "s3": s3.start_s3,
}
FETCHES: dict[str, Callable[[], object]] = {
    "kafka": kafka.fetch,
    "s3": s3.fetch,
    "kubernetes": lambda: binaries.build("kube-all", "helm", "untt"),
}


def main() -> int:
    """Run the command."""
    if len(sys.argv) == 3 and sys.argv[1] == "fetch" and sys.argv[2] in FETCHES:
        return _fetch(sys.argv[2])
    wanted = sys.argv[1] if len(sys.argv) == 2 else ""
    if wanted == "missing":
        for name, check in CHECKS.items():
            if reason := check():
                print(f"{name}: {reason}")
        return 0
    if wanted not in STARTS:
        print(__doc__, file=sys.stderr)
        return 2
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stop.set())
    folder = Path(tempfile.mkdtemp(prefix=f"millrace-{wanted}-"))
    folder.chmod(0o711)
    try:
        server = STARTS[wanted](folder / wanted)
    except PartError as error:
        print(error, file=sys.stderr)
        return 1
    print(server.address, flush=True)
    stop.wait()
    server.stop()
    folder.rmdir()
    return 0


def _fetch(name: str) -> int:
    """Resolve what is resolved at the first use, so that no test waits for it."""
    if CHECKS[name]():
        return 0
    try:
        FETCHES[name]()
    except PartError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
