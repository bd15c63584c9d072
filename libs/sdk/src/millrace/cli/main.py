"""The root command: endpoints and errors are settled here, once."""

import sys

import click
import grpc
from millrace_kit.errors import MillraceError

from millrace.cli import contracts, features, ingest, inspect, local, predictions, quality, rollouts, tuning
from millrace.endpoints import PORT_BASE, Endpoints

TIMED_OUT = 3


class _Root(click.Group):
    """Prints a service's error as one line and the exit code that belongs to it."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except MillraceError as error:
            click.echo(f"millrace: {error.message} ({error.reason})", err=True)
            if error.reason == "RPC_UNAVAILABLE":
                click.echo("millrace: is it running? `millrace status` tells, `millrace up` starts it", err=True)
            code = TIMED_OUT if error.code is grpc.StatusCode.DEADLINE_EXCEEDED else 1
            sys.exit(code)


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--port-base", type=click.IntRange(1024, 65000), default=PORT_BASE, show_default=True, envvar="MILLRACE_PORT_BASE",
    help="First port of the local run.",
)  # fmt: skip
@click.option(
    "--state-dir", type=click.Path(file_okay=False), default=".millrace", show_default=True, envvar="MILLRACE_STATE_DIR",
    help="Folder of the local run.",
)  # fmt: skip
@click.version_option(package_name="millrace")
@click.pass_context
def main(ctx: click.Context, port_base: int, state_dir: str) -> None:
    """Machine learning in production, as one loop.

    Services are found at MILLRACE_<SERVICE>_ADDRESS, else at the ports of a local run.
    """
    import os

    environment = {**os.environ, "MILLRACE_PORT_BASE": str(port_base)}
    ctx.obj = local.Context(Endpoints.from_environment(environment), port_base, state_dir)


for command in (
    *contracts.COMMANDS,
    *quality.COMMANDS,
    *local.COMMANDS,
    *rollouts.COMMANDS,
    *tuning.COMMANDS,
    *inspect.COMMANDS,
    *predictions.COMMANDS,
    *features.COMMANDS,
    *ingest.COMMANDS,
):
    main.add_command(command)
