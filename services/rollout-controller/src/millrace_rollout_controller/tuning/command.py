"""`python -m millrace_rollout_controller.tuning`: what `millrace tune` runs. The report goes to stdout, progress to stderr.

Exits with 0 when the manifest has the best configuration (now, or as it was), 1 when that is undecided or something failed, 2 for wrong arguments.
"""

import argparse
import asyncio
import contextlib
import difflib
import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc.aio
from millrace_kit.client import open_channel
from millrace_kit.clock import Clock, SystemClock
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError, MillraceError, UnavailableError
from millrace_kit.settings import SettingsError, load_settings

from millrace_rollout_controller.manifest import MAX_MANIFEST_CHARACTERS, Manifest, Spec, parse
from millrace_rollout_controller.manifest_rules import seconds
from millrace_rollout_controller.peers import Figures, Registry
from millrace_rollout_controller.reconciler import Refusal
from millrace_rollout_controller.server_block import Server
from millrace_rollout_controller.settings import RolloutSettings
from millrace_rollout_controller.state import VersionRef
from millrace_rollout_controller.triton import TritonMissingError
from millrace_rollout_controller.tuning import edit, report, requests
from millrace_rollout_controller.tuning.bench import Bench, Method, private_executor, running
from millrace_rollout_controller.tuning.configuration import MAX_INSTANCES, Space, milliseconds
from millrace_rollout_controller.tuning.decision import ROUNDS, Decision, decide
from millrace_rollout_controller.tuning.points import Trial
from millrace_rollout_controller.tuning.search import Limits, Search, ServerFailedError

START_S = 10.0
"""Time that the two servers of the last rounds may take to start; kept back from the budget."""
MAX_RESERVE = 0.4
"""Largest part of the budget that is kept back for the last rounds."""
MAX_CONCURRENCY = 1024
MAX_TRIALS = 200
USAGE = 2
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Options:
    """One run."""

    manifest: Path
    p99_ms: float
    budget_s: float = 300.0
    max_concurrency: int = 64
    max_instances: int = 0
    """0 is twice the cores of this machine, at most the manifest's own limit."""
    max_trials: int = 20
    min_batch_size: int = 0
    """0 is the manifest's present maxBatchSize: callers may send so many rows."""
    requests: Path | None = None
    method: Method = field(default_factory=Method)
    write: bool = False
    output: Path | None = None


@dataclass(frozen=True, slots=True)
class _Measured:
    """What came out, before anything is written."""

    ref: VersionRef
    machine: report.Machine
    requests: str
    search: Search
    decision: Decision


async def tune(options: Options, settings: RolloutSettings, clock: Clock) -> report.Report:
    """Measure, decide and write.

    Raises:
        InvalidArgumentError: the manifest, the requests or an option does not fit; names the field.
        FailedPreconditionError: the version cannot be served, or another tuner runs.
        DataLossError: the registry's bytes are not those of the version.
        UnavailableError: the registry does not answer.
        ServerFailedError: a server that ran in the search does not start again.
    """
    began = clock.monotonic()
    text = read(options.manifest)
    manifest = parse(text)
    _check(options, manifest)
    found = await _measure(options, settings, manifest, began=began, clock=clock)
    search, decision = found.search, found.decision
    made, written, problem = text, "", ""
    try:
        # Minutes of measuring are not to be lost for a file that cannot be written.
        if decision.verdict == "better" and decision.chosen is not None:
            made = edit.edited(text, decision.chosen.configuration)
        written = _write(options, decision.verdict, text, made)
    except FailedPreconditionError as error:
        problem = error.message
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    return report.Report(
        found.ref,
        options.p99_ms,
        found.machine,
        found.requests,
        search.trials,
        decision,
        [*_notes(manifest, search), *report.notes(search.trials, decision, options.p99_ms, options.max_concurrency)],
        _diff(options.manifest, text, made),
        written,
        problem,
    )


async def _measure(
    options: Options, settings: RolloutSettings, manifest: Manifest, *, began: float, clock: Clock
) -> _Measured:
    server = manifest.spec.server
    folder = Path(settings.state_dir).absolute() / "tuning"
    async with contextlib.AsyncExitStack() as stack:

        def opened(address: str) -> grpc.aio.Channel:
            channel = open_channel(address, tls=settings.tls)
            stack.push_async_callback(channel.close)
            return channel

        registry = Registry(
            opened(settings.registry_address), clock,
            timeout_s=settings.registry_timeout_s, artifact_timeout_s=settings.artifact_timeout_s,
        )  # fmt: skip
        executor = private_executor(folder, settings.triton, registry, clock)
        # Nodes and autoscaling of a cluster do not matter for one server; GPUs do, and servers of one machine have none.
        asked = Server(resources=server.resources)
        executor.check(Spec(model=manifest.spec.model, version=manifest.spec.version, server=asked))
        ref = await _version(registry, manifest)
        figures = Figures(
            settings.gateway_addresses, lambda: (), opened, opened(settings.drift_address),
            timeout_s=settings.poll_timeout_s,
        )  # fmt: skip
        sent = await requests.load(ref, options.requests, figures.samples, max_rows=server.max_batch_size)
        space = _space(options, manifest, sent)
        machine = report.this_machine("")
        stack.enter_context(_alone(folder))
        await stack.enter_async_context(running(executor, folder))
        ready_s = settings.triton.start_timeout_s + settings.triton.warmup_s + START_S
        limits = _limits(options, began)
        bench = Bench(
            executor, folder, ref, server, sent.bodies,
            bound_ms=options.p99_ms, method=options.method, clock=clock, ready_s=ready_s, until=limits.until,
        )  # fmt: skip
        search = Search(space, limits, bench.measure, clock, _say)
        decision = await decide(search, options.p99_ms, bench.play)
    return _Measured(ref, replace(machine, triton=bench.triton), sent.source, search, decision)


def read(path: Path) -> str:
    """A manifest's text, its line ends as they are.

    Raises:
        InvalidArgumentError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read(MAX_MANIFEST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError("--filename", f"{path}: {error}") from None


def _check(options: Options, manifest: Manifest) -> None:
    server = manifest.spec.server
    if options.p99_ms > server.timeout_ms:
        raise InvalidArgumentError("--p99", f"is longer than spec.server.timeoutMs ({server.timeout_ms})")
    if options.min_batch_size > server.max_batch_size:
        message = f"is more than spec.server.maxBatchSize ({server.max_batch_size})"
        raise InvalidArgumentError("--min-batch-size", message)
    if options.output is not None and not options.output.absolute().parent.is_dir():
        raise InvalidArgumentError("--output", f"{options.output.parent} is no folder")


async def _version(registry: Registry, manifest: Manifest) -> VersionRef:
    found = await registry.version(manifest.spec.model, manifest.spec.version)
    if found is None:
        raise UnavailableError("REGISTRY_UNAVAILABLE", "the registry does not answer; `millrace status` tells")
    if isinstance(found, Refusal):
        message = f"{manifest.spec.model} {manifest.spec.version}: {found.message}"
        raise FailedPreconditionError("VERSION_REFUSED", message)
    return found


def _space(options: Options, manifest: Manifest, sent: requests.Requests) -> Space:
    server = manifest.spec.server
    cores = len(os.sched_getaffinity(0))
    most = options.max_instances or min(MAX_INSTANCES, max(2 * cores, server.instances))
    least = max(options.min_batch_size or server.max_batch_size, sent.max_rows)
    return Space(server, options.p99_ms, max_instances=most, min_batch_size=least, rows=sent.rows)


def _limits(options: Options, began: float) -> Limits:
    reserve_s = min(MAX_RESERVE * options.budget_s, 3 * ROUNDS * options.method.window_s + START_S)
    return Limits(options.max_concurrency, options.max_trials, began + options.budget_s - reserve_s)


def _say(trial: Trial) -> None:
    best = max((point.per_s for point in trial.points), default=0.0)
    words = trial.problem or f"{len(trial.points)} loads, at most {best:.0f} answers a second"
    print(f"  {{{trial.configuration.words}}}: {words}", file=sys.stderr, flush=True)


def _notes(manifest: Manifest, search: Search) -> list[str]:
    server = manifest.spec.server
    found = ["the load came from the same machine, without gateway and network; one server had this version alone"]
    if server.response_cache_mib:
        found.append("measured without responseCacheMib: repeated requests would be answered without the model")
    if cpu := server.resources.limits.get("cpu"):
        found.append(f"limits.cpu ({cpu}) was not enforced: the servers had the whole machine")
    if search.cut_short:
        found.append(f"the search ended early: {search.cut_short}")
    return found


def _diff(path: Path, text: str, made: str) -> str:
    lines = difflib.unified_diff(text.splitlines(), made.splitlines(), path.name, path.name, lineterm="")
    return "\n".join(lines)


def _write(options: Options, verdict: str, text: str, made: str) -> str:
    if verdict == "undecided":
        return ""
    if options.output is not None:
        edit.write(options.output, made)
        return str(options.output)
    if options.write and made != text:
        if read(options.manifest) != text:
            message = f"{options.manifest} was changed while it was measured; nothing is written"
            raise FailedPreconditionError("MANIFEST_CHANGED", message)
        edit.write(options.manifest, made)
        return str(options.manifest)
    return ""


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two tuners would measure each other, and stop each other's servers."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FailedPreconditionError("TUNING_RUNS", f"another tune runs here ({folder})") from None
        yield


def arguments(words: Sequence[str] | None = None) -> tuple[Options, Path, bool]:
    """The command line: options, settings file, and whether JSON is wanted.

    Raises:
        InvalidArgumentError: names the option.
    """
    parser = argparse.ArgumentParser(prog="millrace tune", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="settings of the rollout controller")
    parser.add_argument("-f", "--filename", type=Path, required=True)
    parser.add_argument("--p99", required=True)
    parser.add_argument("--budget", default="5m")
    parser.add_argument("--max-concurrency", type=int, default=64)
    parser.add_argument("--max-instances", type=int, default=0)
    parser.add_argument("--max-trials", type=int, default=20)
    parser.add_argument("--min-batch-size", type=int, default=0)
    parser.add_argument("--requests", type=Path)
    parser.add_argument("--window", default="1s")
    parser.add_argument("--min-requests", type=int, default=100)
    parser.add_argument("--stability", type=float, default=10.0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    for option, least, most in (
        ("max_concurrency", 1, MAX_CONCURRENCY), ("max_instances", 0, MAX_INSTANCES), ("max_trials", 1, MAX_TRIALS),
        ("min_batch_size", 0, 4096), ("min_requests", 10, 100_000), ("stability", 1, 100),
    ):  # fmt: skip
        if not least <= getattr(given, option) <= most:
            raise InvalidArgumentError(f"--{option.replace('_', '-')}", f"must be {least} to {most}")
    if given.write and given.output is not None:
        raise InvalidArgumentError("--output", "and --write exclude each other")
    window_s = milliseconds(given.window, "--window") / 1000.0
    options = Options(
        given.filename, milliseconds(given.p99, "--p99"), seconds(given.budget, "--budget"), given.max_concurrency,
        given.max_instances, given.max_trials, given.min_batch_size, given.requests,
        Method(window_s, given.min_requests, share=given.stability / 100.0), given.write, given.output,
    )  # fmt: skip
    return options, given.config, given.json


def main() -> None:
    """Entry point."""
    try:
        options, config, as_json = arguments()
        settings = load_settings(RolloutSettings, config)
        made = asyncio.run(_interruptible(options, settings))
    except SettingsError as error:
        print(f"millrace: {error}", file=sys.stderr)
        raise SystemExit(USAGE) from None
    except MillraceError as error:
        print(f"millrace: {error.message} ({error.reason})", file=sys.stderr)
        is_usage = isinstance(error, InvalidArgumentError) and error.field.startswith("--")
        raise SystemExit(USAGE if is_usage else 1) from None
    except (ServerFailedError, TritonMissingError, OSError) as error:
        print(f"millrace: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except asyncio.CancelledError:
        print("stopped; nothing is written", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    print(json.dumps(made.json(), indent=2) if as_json else made.text())
    if made.decision.verdict == "undecided":
        print(f"millrace: undecided, nothing is written: {made.decision.message}", file=sys.stderr)
        raise SystemExit(1)
    if made.problem:
        print(f"millrace: nothing is written: {made.problem}", file=sys.stderr)
        raise SystemExit(1)
    if made.written:
        print(f"next: millrace apply -f {made.written}", file=sys.stderr)


async def _interruptible(options: Options, settings: RolloutSettings) -> report.Report:
    task = asyncio.create_task(tune(options, settings, SystemClock()))

    def stop() -> None:
        # Once: Ctrl-C comes from the terminal and again from `millrace tune`, and a second one would break off the stopping of the servers.
        if not task.cancelling():
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    return await task
