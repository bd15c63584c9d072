"""Waits until what a pod needs answers, by the protocol it will be spoken to."""

import logging
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial

import redis
from kafka.admin import KafkaAdminClient
from millrace_kit.bus.kafka_bus import kafka_options
from millrace_kit.references import mask
from millrace_kit.settings import BusSettings

from millrace_bootstrap.buckets import check_bucket
from millrace_bootstrap.databases import connect
from millrace_bootstrap.settings import WaitSettings

log = logging.getLogger(__name__)
CHECK_TIMEOUT_S = 5.0

Check = Callable[[], None]


class NotThereError(Exception):
    """Something did not answer until the deadline; the message names each and why."""


def checks(settings: WaitSettings, bus: BusSettings) -> Mapping[str, Check]:
    """One check for each thing, by a name without secrets; a check raises while the thing is not there."""
    found: dict[str, Check] = {}
    if settings.kafka:
        quick = bus.model_copy(update={"request_timeout_s": CHECK_TIMEOUT_S})
        found[f"Kafka at {', '.join(bus.bootstrap_servers)}"] = partial(_kafka, quick)
    for number, url in enumerate(settings.postgres):
        found[f"PostgreSQL {number + 1} at {_host(url)}"] = partial(_postgres, url)
    for number, url in enumerate(settings.redis):
        found[f"Redis {number + 1} at {_host(url)}"] = partial(_redis, url, settings.redis_ca_file)
    for url in settings.buckets:
        found[f"bucket {url}"] = partial(check_bucket, url)
    for address in settings.addresses:
        found[address] = partial(_connects, address)
    return found


def wait(
    wanted: Mapping[str, Check], deadline: float, retry_s: float, monotonic: Callable[[], float] = time.monotonic
) -> None:
    """Ask each until all have answered once; `deadline` is of `monotonic`.

    Raises:
        NotThereError: some did not until then.
    """
    problems = dict.fromkeys(wanted, "not asked")
    while True:
        for name in list(problems):
            try:
                wanted[name]()
            except Exception as error:
                problem = mask(f"{type(error).__name__}: {error}".splitlines()[0])
                if problem != problems[name]:
                    log.info("waiting for %s: %s", name, problem)
                problems[name] = problem
            else:
                log.info("%s answers", name)
                del problems[name]
        if not problems:
            return
        if monotonic() + retry_s > deadline:
            raise NotThereError("; ".join(f"{name}: {problem}" for name, problem in problems.items()))
        time.sleep(retry_s)


def _host(url: str) -> str:
    return url.rpartition("@")[2].removeprefix("redis://").removeprefix("rediss://").partition("?")[0]


def _kafka(bus: BusSettings) -> None:
    admin = KafkaAdminClient(**kafka_options(bus))
    try:
        admin.list_topics()
    finally:
        admin.close()


def _postgres(url: str) -> None:
    connect(url).close()


def _redis(url: str, ca_file: str) -> None:
    tls = {"ssl_ca_certs": ca_file} if ca_file and url.startswith("rediss:") else {}
    limits = {"socket_timeout": CHECK_TIMEOUT_S, "socket_connect_timeout": CHECK_TIMEOUT_S}
    with redis.Redis.from_url(url, **limits, **tls) as client:
        client.ping()


def _connects(address: str) -> None:
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), CHECK_TIMEOUT_S).close()
