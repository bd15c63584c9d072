"""The real servers as pytest fixtures, and an honest account of tests that cannot run here.

A server starts when the first test asks for it, is shared by all workers of a run (pytest-xdist too) and is stopped by pid when the
run ends; a killed run leaves none, because each server's guard watches the run's main process. A test that needs one carries its
marker (`kafka`, `postgres`, `redis`, `browser`, `kubernetes`, `prometheus`). Where a part is missing such tests are left out and named, with the reason, after
pytest's closing line; with CI=true they fail instead, and so does a run that skipped anything.
"""

import fcntl
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from cluster import controlplane

from parts import chromium, kafka, postgres, prometheus, redis, s3
from parts.server import Server

CHECKS: dict[str, Callable[[], str]] = {
    "kafka": kafka.missing,
    "postgres": postgres.missing,
    "redis": redis.missing,
    "s3": s3.missing,
    "browser": chromium.missing,
    "kubernetes": controlplane.missing,
    "prometheus": prometheus.missing,
}
FOLDER_VARIABLE = "MILLRACE_PARTS_FOLDER"
OWNER_VARIABLE = "MILLRACE_PARTS_OWNER"
LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """The run's main process makes the folder that all workers share."""
    config.stash[LEFT_OUT] = Counter()
    if not _is_worker(config):
        folder = tempfile.mkdtemp(prefix="millrace-parts-")
        Path(folder).chmod(0o711)  # PostgreSQL runs as another user below it
        os.environ[FOLDER_VARIABLE] = folder
        os.environ[OWNER_VARIABLE] = str(os.getpid())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run here (never in CI, where it fails at its set-up)."""
    reasons = {marker: reason for marker, check in CHECKS.items() if (reason := check())}
    if not reasons or _in_ci():
        return
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        lacking = [marker for marker in reasons if item.get_closest_marker(marker)]
        (dropped if lacking else kept).append(item)
        for marker in lacking[:1]:
            config.stash[LEFT_OUT][f"{item.location[0]}: {marker} {reasons[marker]}"] += 1
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    """In CI a test whose part is missing fails and says why."""
    if _in_ci():
        for marker, check in CHECKS.items():
            if item.get_closest_marker(marker) and (reason := check()):
                pytest.fail(f"CI leaves no test out, and {marker} {reason}", pytrace=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Workers report what they left out; in CI a skipped test makes the run fail."""
    if _is_worker(session.config):
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT_OUT])  # type: ignore[attr-defined]
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if _in_ci() and reporter is not None and reporter.stats.get("skipped") and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:  # noqa: ARG001 - pytest-xdist's signature
    """Every worker collects the same tests: the account of one is the account of all."""
    left_out = getattr(node, "workeroutput", {}).get("left_out", {})
    config: pytest.Config = node.config  # type: ignore[attr-defined]
    config.stash[LEFT_OUT].update(Counter(left_out) - config.stash[LEFT_OUT])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the servers and print, below the closing line, what was left out."""
    folder = os.environ.get(FOLDER_VARIABLE, "")
    if _is_worker(config) or not folder:
        return
    for record in Path(folder).glob("*.json"):
        Server.load(record).stop()
    shutil.rmtree(folder, ignore_errors=True)
    os.environ.pop(FOLDER_VARIABLE)
    lines = [f"  {count} in {reason}" for reason, count in sorted(config.stash[LEFT_OUT].items())]
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    for report in reporter.stats.get("skipped", []) if reporter is not None else ():
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        lines.append(f"  1 in {report.nodeid}: {why.removeprefix('Skipped: ')}")
    if lines:
        print("left out here (CI=true runs them all, or fails):")
        print("\n".join(lines))


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() == "true"


def _shared(name: str, start: Callable[..., Server]) -> Server:
    """The run's server of this name, started by whichever worker asks first; started anew when a test killed it."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    record = folder / f"{name}.json"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if record.exists():
            server = Server.load(record)
            if server.alive():
                return server
            server.stop()
        server = start(folder / name, owner_pid=int(os.environ[OWNER_VARIABLE]))
        server.save(record)
        return server


@pytest.fixture(scope="session")
def kafka_address() -> str:
    """`host:port` of a real broker. Topics outlive a test: name your own, or read from their end."""
    return _shared("kafka", kafka.start_kafka).address


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """SQLAlchemy URL of a new, empty database on a real server."""
    import psycopg

    server = _shared("postgres", postgres.start_postgres)
    plain = server.address.replace("+psycopg", "")
    name = f"test_{uuid4().hex}"
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    yield server.address.rpartition("/")[0] + f"/{name}"
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def redis_url() -> str:
    """URL of an empty database on a real Redis; each pytest-xdist worker has its own."""
    import redis as client

    server = _shared("redis", redis.start_redis)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    url = f"{server.address}/{int(worker)}"
    with client.Redis.from_url(url) as connection:
        connection.flushdb()
    return url


@pytest.fixture
def s3_url() -> Iterator[str]:
    """`s3://bucket/prefix` that nothing is below yet on a real server, with the environment to reach it in this process and its children."""
    server = _shared("s3", s3.start_s3)
    with s3.in_environment(server.address):
        yield f"s3://{s3.BUCKET}/{uuid4().hex}"


@pytest.fixture(scope="session")
def chromium_program() -> str:
    """Path of the browser."""
    return chromium.program()


@pytest.fixture(scope="session")
def control_plane() -> Path:
    """Admin's kubeconfig of a real control plane without nodes. Namespaces outlive a test: make your own."""
    return Path(_shared("control-plane", controlplane.start_control_plane).address)
