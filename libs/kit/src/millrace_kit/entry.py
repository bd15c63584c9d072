"""The command line every service has: `millrace-<service> --config FILE [--check]`."""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from millrace_kit.errors import UnavailableError
from millrace_kit.probes import Probes
from millrace_kit.processes import own_number, own_settings, run_processes
from millrace_kit.server import Service, WorkerFailedError, serve
from millrace_kit.settings import ServiceSettings, Settings, SettingsError, load_settings
from millrace_kit.telemetry import start_telemetry, stop_telemetry

S = TypeVar("S", bound=Settings)
T = TypeVar("T", bound=ServiceSettings)


def read_arguments(name: str, kind: type[S]) -> S:
    """Parse `--config FILE [--check]` and load the settings; `--check` ends the program with 0, even where the secrets that the file
    refers to are not here.

    Exits with 2 for a wrong settings file.
    """
    parser = argparse.ArgumentParser(prog=f"millrace-{name}")
    parser.add_argument("--config", required=True, help="settings file (YAML)")
    parser.add_argument("--check", action="store_true", help="validate the settings file and exit")
    arguments = parser.parse_args()
    try:
        settings = load_settings(kind, arguments.config, tolerant=arguments.check)
    except SettingsError as error:
        print(f"millrace-{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if arguments.check:
        print(f"{arguments.config}: ok")
        raise SystemExit(0)
    return settings


def run_service(
    name: str,
    kind: type[T],
    build: Callable[[T], Awaitable[Service]],
    processes: Callable[[T], int] = lambda _settings: 1,
    adapt: Callable[[T], T] = lambda settings: settings,
    *,
    new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> None:
    """Read the command line, then run the service, in as many processes as `processes` says, until it is told to stop.

    `adapt` is for a program that is given another one's settings file, and has addresses of its own.

    Exits with 0 after an orderly stop, 1 when a worker failed or what the start needs does not answer, 2 for a wrong settings file.
    `new_loop` makes another event loop than asyncio's own.
    """
    settings = read_arguments(name, kind)
    if own_number() is None and (count := processes(settings)) > 1:
        raise SystemExit(run_processes(count))
    settings = adapt(own_settings(settings))
    probes = Probes()
    start_telemetry(name, settings.telemetry, probes)

    async def run() -> None:
        await serve(await build(settings), settings, probes)

    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(run())
    except WorkerFailedError as error:
        print(f"millrace-{name}: worker {error} failed", file=sys.stderr)
        raise SystemExit(1) from None
    except UnavailableError as error:
        print(f"millrace-{name}: cannot start: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        stop_telemetry()
