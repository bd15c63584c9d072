"""`python -m parts kafka|postgres|redis|s3`: start one by hand; `missing`: what tests lack here, one a line; `fetch`: get or build it."""

import signal
import sys
import tempfile
import threading
from pathlib import Path

from cluster import binaries, controlplane

from parts import chromium, kafka, postgres, redis, s3
from parts.server import PartError

CHECKS = {
    "kafka": kafka.missing,
    "postgres": postgres.missing,
    "redis": redis.missing,
    "browser": chromium.missing,
    "kubernetes": controlplane.missing,
}
STARTS = {"kafka": kafka.start_kafka, "postgres": postgres.start_postgres, "redis": redis.start_redis, "s3": s3.start_s3}


def main() -> int:
    """Run the command."""
    wanted = sys.argv[1] if len(sys.argv) == 2 else ""
    if wanted == "missing":
        for name, check in CHECKS.items():
            if reason := check():
                print(f"{name}: {reason}")
        return 0
    if wanted == "fetch":
        return _fetch()
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


def _fetch() -> int:
    """Resolve what is resolved at the first use, so that no test waits for it."""
    try:
        if not kafka.missing():
            kafka.fetch()
    except PartError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if not controlplane.missing():
            binaries.build("kube-all")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
