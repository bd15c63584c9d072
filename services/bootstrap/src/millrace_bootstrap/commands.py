"""`millrace-bootstrap COMMAND --config FILE [--check]`: the chart's jobs. Each may run any number of times, also twice at once.

Exits with 0 when everything is as it should be, 1 when something failed, 2 for wrong settings, 3 when the deadline passed.
"""

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

import psycopg
from kafka.errors import KafkaError
from millrace_kit.probes import Probes
from millrace_kit.references import mask
from millrace_kit.settings import SettingsError, load_settings
from millrace_kit.telemetry import start_telemetry, stop_telemetry
from millrace_kit.tls import CertificateError

from millrace_bootstrap.buckets import bring_buckets
from millrace_bootstrap.databases import bring_databases
from millrace_bootstrap.issuer import Issuer
from millrace_bootstrap.secret_store import KubernetesSecrets, SecretConflictError, SecretStoreError
from millrace_bootstrap.settings import BootstrapSettings
from millrace_bootstrap.smoke import Smoke, table
from millrace_bootstrap.topics import bring_topics
from millrace_bootstrap.waiting import NotThereError, checks, wait

T = TypeVar("T")

log = logging.getLogger(__name__)

OK, FAILED, WRONG_SETTINGS, TOO_LATE = 0, 1, 2, 3
# What may be another answer the next time: it is tried again until the deadline.
TRANSIENT = (KafkaError, psycopg.OperationalError, SecretStoreError, SecretConflictError, OSError)


class MissingBlockError(Exception):
    """The settings say nothing about this job; the message names the key."""


def certificates(settings: BootstrapSettings, deadline: float) -> int:
    """Make and renew the authority and every certificate."""
    wanted = _block(settings.certificates, "certificates")
    _until(deadline, settings, lambda: Issuer(wanted, KubernetesSecrets(wanted.namespace), datetime.now(UTC)).run())
    return OK


def topics(settings: BootstrapSettings, deadline: float) -> int:
    """Make and extend topics; what only a person can change is a warning."""
    if settings.bus.kind != "kafka":
        raise MissingBlockError("bus.kind: must be kafka")
    drifted = _until(deadline, settings, lambda: bring_topics(settings.bus, settings.topics, settings.records))
    log.info("%d topics are as they should be; %d differences are left to you", len(settings.topics), drifted)
    return OK


def databases(settings: BootstrapSettings, deadline: float) -> int:
    """Make roles and databases."""
    wanted = _block(settings.databases, "databases")
    _until(deadline, settings, lambda: bring_databases(wanted))
    return OK


def buckets(settings: BootstrapSettings, deadline: float) -> int:
    """Make buckets."""
    wanted = _block(settings.buckets or None, "buckets")
    _until(deadline, settings, lambda: bring_buckets(wanted))
    return OK


def wait_for(settings: BootstrapSettings, deadline: float) -> int:
    """Wait until everything answers."""
    wait(checks(_block(settings.wait, "wait"), settings.bus), deadline, settings.retry_s)
    return OK


def smoke(settings: BootstrapSettings, deadline: float) -> int:
    """Call every service."""
    results = Smoke(_block(settings.smoke, "smoke")).run(deadline)
    print(mask(table(results)), flush=True)
    failed = [f"{result.service} {result.call}" for result in results if result.problem]
    if failed:
        log.error("failed: %s", "; ".join(failed))
    return FAILED if failed or not results else OK


COMMANDS: Mapping[str, Callable[[BootstrapSettings, float], int]] = {
    "certificates": certificates,
    "topics": topics,
    "databases": databases,
    "buckets": buckets,
    "wait": wait_for,
    "smoke": smoke,
}


def _block(block: T | None, key: str) -> T:
    if block is None:
        raise MissingBlockError(f"{key}: is needed by this command")
    return block


def _until(deadline: float, settings: BootstrapSettings, work: Callable[[], T]) -> T:
    """The result of `work`, tried again while it fails for a reason that may pass.

    Raises:
        TimeoutError: it failed until the deadline; the message is the last reason.
    """
    while True:
        try:
            return work()
        except TRANSIENT as error:
            reason = mask(f"{type(error).__name__}: {error}")
            if time.monotonic() + settings.retry_s > deadline:
                raise TimeoutError(reason) from None
            log.warning("not yet: %s", reason)
            time.sleep(settings.retry_s)


def _cut_off(seconds: float) -> threading.Timer:
    """Ends the process should a library wait longer than the deadline by itself."""

    def end() -> None:
        log.critical("the deadline has passed inside one step")
        os._exit(TOO_LATE)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def run(command: str, settings: BootstrapSettings) -> int:
    """Run one job; returns the exit code."""
    deadline = time.monotonic() + settings.deadline_s
    cut = _cut_off(settings.deadline_s + 2 * settings.bus.request_timeout_s)
    try:
        code = COMMANDS[command](settings, deadline)
    except MissingBlockError as error:
        log.error("%s", error)  # noqa: TRY400 - the message is all there is to say
        return WRONG_SETTINGS
    except (TimeoutError, NotThereError) as error:
        log.error("not done within %g s: %s", settings.deadline_s, error)  # noqa: TRY400
        return TOO_LATE
    except (psycopg.Error, CertificateError) as error:
        log.error("%s", error)  # noqa: TRY400
        return FAILED
    except Exception:
        log.exception("unexpected error")
        return FAILED
    finally:
        cut.cancel()
    return code


def main() -> None:
    """Run `millrace-bootstrap`."""
    parser = argparse.ArgumentParser(prog="millrace-bootstrap", description="Jobs of the chart.")
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("--config", required=True, help="settings file (YAML)")
    parser.add_argument("--check", action="store_true", help="validate the settings file and exit")
    arguments = parser.parse_args()
    try:
        settings = load_settings(BootstrapSettings, arguments.config, tolerant=arguments.check)
    except SettingsError as error:
        print(f"millrace-bootstrap: {error}", file=sys.stderr)
        raise SystemExit(WRONG_SETTINGS) from None
    if arguments.check:
        print(f"{arguments.config}: ok")
        raise SystemExit(OK)
    probes = Probes()
    start_telemetry(f"bootstrap-{arguments.command}", settings.telemetry, probes)
    probes.ready()
    try:
        code = run(arguments.command, settings)
    finally:
        stop_telemetry()
    raise SystemExit(code)
