"""`up`, `down`, `status`, `demo`: the single machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import psutil

from millrace.client import Client
from millrace.endpoints import Endpoints
from millrace.local.health import is_healthy
from millrace.local.processes import Process, process_table
from millrace.local.supervisor import LocalRunError, Supervisor, same_process
from millrace.view import table

STOP_WAIT_S = 90.0
LOCK_NAME = "requirements.lock"
# As a shell reports a program that Ctrl-C ended.
INTERRUPTED = 130


@dataclass(frozen=True)
class Context:
    """What every command gets."""

    endpoints: Endpoints
    port_base: int
    state_dir: str

    def client(self) -> Client:
        """A client of the chosen endpoints."""
        return Client(self.endpoints)

    @property
    def state_path(self) -> Path:
        """Absolute folder of the local run."""
        return Path(self.state_dir).resolve()


def supervisor(context: Context) -> Supervisor:
    """A supervisor of the local process table that reports on stderr."""
    processes = process_table(context.state_path, context.port_base, Path(LOCK_NAME).resolve())
    return Supervisor(processes, context.state_path, lambda name, what: click.echo(f"  {name:<21} {what}", err=True))


def need_checkout() -> None:
    """Refuse to start anything elsewhere: training makes its environments from the lock.

    Raises:
        click.ClickException: this folder is no checkout.
    """
    if not Path(LOCK_NAME).is_file():
        raise click.ClickException(f"{LOCK_NAME} is not in {Path.cwd()}: start Millrace in the folder of its checkout")


def interrupt_on_sigterm() -> None:
    """Make SIGTERM end what runs as Ctrl-C does, so that `millrace down` stops a run at any moment in order."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def wait_for_signal() -> None:
    """Block until SIGINT or SIGTERM."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


def start_or_exit(running: Supervisor) -> None:
    """Start a local run; a reason not to ends the program with 1."""
    interrupt_on_sigterm()
    started = time.monotonic()
    click.echo("starting Millrace on this machine", err=True)
    try:
        running.start()
    except LocalRunError as error:
        click.echo(f"millrace: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        sys.exit(INTERRUPTED)
    click.echo(f"up after {time.monotonic() - started:.1f} s", err=True)


def stop_quietly(running: Supervisor) -> None:
    """Stop a run, with later Ctrl-Cs ignored so that the order is kept."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    click.echo("stopping", err=True)
    running.stop()
    click.echo("stopped", err=True)


@click.command()
@click.pass_obj
def up(context: Context) -> None:
    """Start every service on this machine and stay up until Ctrl-C."""
    running = supervisor(context)
    need_checkout()
    start_or_exit(running)
    click.echo(
        f"console: http://127.0.0.1:{context.port_base + 80}/   predictions: {context.endpoints.gateway}", err=True
    )
    try:
        wait_for_signal()
    finally:
        stop_quietly(running)


@click.command()
@click.pass_obj
def down(context: Context) -> None:
    """Stop the local run, from another terminal."""
    try:
        content = json.loads((context.state_path / "up.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        click.echo("nothing is running", err=True)
        return
    pid, created = content["supervisor"]["pid"], content["supervisor"]["created"]
    if not same_process(pid, created):
        click.echo("the supervisor is gone; the next `millrace up` ends what it left", err=True)
        sys.exit(1)
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_WAIT_S
    while (context.state_path / "up.json").exists():
        if time.monotonic() > deadline:
            click.echo(f"millrace: process {pid} did not stop within {STOP_WAIT_S:.0f} s", err=True)
            sys.exit(3)
        time.sleep(0.1)
    click.echo("stopped", err=True)


@click.command()
@click.pass_obj
def status(context: Context) -> None:
    """Say which processes of the local run answer; exits with 1 when one does not."""
    try:
        content = json.loads((context.state_path / "up.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        click.echo("nothing is running; `millrace up` starts it", err=True)
        sys.exit(1)
    rows, good = [], True
    for row in content["processes"]:
        process = Process(row["name"], [], {}, row["health"], row["address"], health_path=row["health_path"])
        alive = same_process(row["pid"], row["created"])
        word = "ready" if alive and is_healthy(process) else "not ready" if alive else "down"
        good = good and word == "ready"
        memory = f"{psutil.Process(row['pid']).memory_info().rss >> 20} MiB" if alive else "-"
        rows.append((row["name"], word, row["address"], str(row["pid"]), memory, str(row["restarts"])))
    click.echo(table(("NAME", "STATE", "ADDRESS", "PID", "MEMORY", "RESTARTS"), rows))
    if not good:
        sys.exit(1)


@click.command()
@click.option("--exit", "exit_after", is_flag=True, help="End after the last step, non-zero if one failed.")
@click.option(
    "--sample", type=click.Path(exists=True, file_okay=False), default="deploy/samples/flights", show_default=True,
    help="Folder of the sample; its demo.py drives the loop.",
)  # fmt: skip
@click.pass_obj
def demo(context: Context, exit_after: bool, sample: str) -> None:
    """Start everything and turn the loop once on the sample's data."""
    running = supervisor(context)
    need_checkout()
    start_or_exit(running)
    environment = {
        **os.environ,
        "MILLRACE_PORT_BASE": str(context.port_base),
        "MILLRACE_STATE_DIR": str(context.state_path),
    }
    code = 1
    try:
        driver = subprocess.Popen([sys.executable, str(Path(sample) / "demo.py")], env=environment)
        try:
            code = driver.wait()
        except KeyboardInterrupt:
            driver.terminate()
            driver.wait()
            code, exit_after = INTERRUPTED, True
        if not exit_after:
            click.echo("\nMillrace stays up; Ctrl-C stops everything.", err=True)
            wait_for_signal()
    finally:
        stop_quietly(running)
    sys.exit(code)


COMMANDS = (up, down, status, demo)
