"""`tune`: has the rollout controller's tuner look for the best batching of a version's servers, on this machine."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import yaml

from millrace.cli.local import INTERRUPTED, LOCK_NAME, Context, interrupt_on_sigterm
from millrace.endpoints import tls_from_environment
from millrace.local.processes import process_table

SERVICE = "rollout-controller"
MODULE = "millrace_rollout_controller"


def tuner_settings(context: Context) -> dict[str, object]:
    """The settings of the local run's rollout controller, with the services at the chosen endpoints."""
    table = process_table(context.state_path, context.port_base, Path(LOCK_NAME).resolve())
    found = next(process.settings for process in table if process.name == SERVICE)
    at = context.endpoints
    addresses = {"registry_address": at.registry, "gateway_addresses": [at.gateway_admin], "drift_address": at.drift}
    tls = tls_from_environment()
    return {**found, **addresses, **({"tls": tls.model_dump()} if tls is not None else {})}


@click.command()
@click.option(
    "-f", "--filename", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
    help="Manifest (YAML) of one ModelDeployment; its version is measured.",
)  # fmt: skip
@click.option("--p99", required=True, metavar="TIME", help="Bound on the 99th percentile of latency, like 20ms.")
@click.option("--budget", default="5m", show_default=True, metavar="DURATION", help="Time for all of it.")
@click.option(
    "--max-concurrency", type=click.IntRange(1, 1024), default=64, show_default=True, help="Most calls at once."
)
@click.option(
    "--max-instances",
    type=click.IntRange(1, 16),
    help="Most copies of the model; twice the cores when it is not given.",
)
@click.option("--max-trials", type=click.IntRange(1, 200), default=20, show_default=True, help="Most configurations.")
@click.option(
    "--min-batch-size", type=click.IntRange(1, 4096), metavar="ROWS",
    help="Least maxBatchSize: requests of more rows are refused. The manifest's own when it is not given.",
)  # fmt: skip
@click.option(
    "--requests", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Requests in perf_analyzer's JSON; else those that the gateway saw lately, else zeros.",
)  # fmt: skip
@click.option("--window", default="1s", show_default=True, metavar="TIME", help="Length of one measurement.")
@click.option("--min-requests", type=click.IntRange(10, 100_000), default=100, show_default=True, help="Least of one.")
@click.option(
    "--stability", type=click.FloatRange(1, 100), default=10.0, show_default=True, metavar="PERCENT",
    help="Most difference between three measurements in a row that are steady.",
)  # fmt: skip
@click.option("--write", is_flag=True, help="Write the result into the manifest; comments stay.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the manifest with it to this file."
)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON, with every point.")
@click.pass_obj
def tune(
    context: Context,
    /,
    *,
    filename: Path,
    requests: Path | None,
    output: Path | None,
    write: bool,
    as_json: bool,
    **values: str | float | None,
) -> None:
    """Find batch size, instances and queue delay with the most answers within a bound on latency.

    Starts model servers of its own on this machine and loads them; the registry has to run (`millrace up`). Exits with 1 when the result is
    undecided: then nothing is written.
    """
    if find_spec(MODULE) is None:
        raise click.UsageError("needs the services on this machine (make setup)")
    if write and output is not None:
        raise click.UsageError("--write and --output exclude each other")
    config = context.state_path / "config" / "tune.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(tuner_settings(context), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", f"{MODULE}.tuning", "--config", str(config), "-f", str(filename)]
    named = {**values, "requests": requests, "output": output}
    command += [f"--{name.replace('_', '-')}={value}" for name, value in named.items() if value is not None]
    command += ["--write"] * write + ["--json"] * as_json
    sys.exit(_run(command))


def _run(command: list[str]) -> int:
    """Run the tuner to its end; whatever ends this program lets it stop its servers."""
    interrupt_on_sigterm()
    tuner = subprocess.Popen(command)
    try:
        return tuner.wait()
    except KeyboardInterrupt:
        tuner.terminate()
        tuner.wait()
        return INTERRUPTED


COMMANDS = (tune,)
