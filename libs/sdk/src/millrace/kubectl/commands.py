"""The commands of `kubectl millrace`. Exit codes: 0 ok, 1 failed, 2 usage, 3 timed out."""

import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from typing import Any

import click
import grpc
from millrace_kit.errors import MillraceError
from rich.live import Live

from millrace import linting
from millrace.kubectl import actions, lint, printing, schema, watching
from millrace.kubectl.cluster import API_VERSION, KIND, Cluster, ClusterError
from millrace.kubectl.objects import deployment, pods
from millrace.kubectl.printing import say
from millrace.tree import plain, rollout_tree
from millrace.view import COLUMNS, deployment_row, history_text, table

FAILED, TIMED_OUT = 1, 3
OUTPUT = click.Choice(["table", "wide", "json", "yaml", "name"])
ROLLOUT_TIMEOUT_S = 600.0
HELP = {"help_option_names": ["-h", "--help"]}


class _Root(click.Group):
    """Prints an error as one line, with the exit code that belongs to it."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except MillraceError as error:
            say(f"kubectl millrace: {error.message} ({error.reason})")
            if (
                isinstance(error, ClusterError)
                and error.status == 404
                and "could not find the requested resource" in error.message
            ):
                say(f"kubectl millrace: is the chart millrace-crds installed? ({KIND} of {API_VERSION} is not known)")
            sys.exit(TIMED_OUT if error.code is grpc.StatusCode.DEADLINE_EXCEEDED else FAILED)


@click.group(cls=_Root, context_settings=HELP)
@click.version_option(package_name="millrace", prog_name="kubectl millrace")
def root() -> None:
    """Roll model versions out on a cluster: watch them, hold them, take them back.

    Manifests are applied with kubectl apply; these commands only edit and watch the ModelDeployment.
    """


def _cluster_options(*, every: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options as kubectl has them; the command gets a connection as its first argument."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @click.option("-n", "--namespace", metavar="NAME", help="Namespace; the context's own when it is not given.")
        @click.option("--context", metavar="NAME", help="Context of the kubeconfig.")
        @click.option("--kubeconfig", type=click.Path(dir_okay=False), help="Path of the kubeconfig.")
        @wraps(command)
        def wrapped(
            namespace: str | None,
            context: str | None,
            kubeconfig: str | None,
            all_namespaces: bool = False,
            **others: Any,
        ) -> None:
            cluster = Cluster.connect(kubeconfig, context, "" if all_namespaces else namespace)
            try:
                command(cluster, **others)
            finally:
                cluster.close()

        if not every:
            return wrapped
        return click.option("-A", "--all-namespaces", is_flag=True, help="Look in all namespaces.")(wrapped)

    return decorate


@root.command("get")
@click.argument("name", required=False)
@click.option("-w", "--watch", is_flag=True, help="Stay and show every change, until Ctrl-C.")
@click.option("-o", "--output", type=OUTPUT, help="A tree when it is not given.")
@_cluster_options(every=True)
def get(cluster: Cluster, name: str | None, watch: bool, output: str | None) -> None:
    """Show a rollout as a tree: versions, servers, gates with their evidence, events."""
    if name is None:
        if watch:
            raise click.UsageError("-w needs a NAME")
        _list(cluster, output or "table")
        return
    if not cluster.namespace:
        raise click.UsageError("-A needs no NAME")
    if watch:
        _watch(cluster, name)
        return
    item = cluster.deployment(name)
    if output:
        click.echo(printing.documents([item], output, one=True))
        return
    tree = rollout_tree(deployment(item), pods(cluster.pods(name)), datetime.now(tz=UTC))
    console = printing.console()
    if console.is_terminal:
        console.print(printing.coloured(tree))
    else:
        click.echo(plain(tree))


@root.command("list")
@click.option("-o", "--output", type=OUTPUT, default="table", show_default=True)
@_cluster_options(every=True)
def list_(cluster: Cluster, output: str) -> None:
    """List ModelDeployments."""
    _list(cluster, output)


def _list(cluster: Cluster, output: str) -> None:
    items = cluster.deployments()["items"]
    items = [{"apiVersion": API_VERSION, "kind": KIND, **item} for item in items]
    if not items and output in {"table", "wide"}:
        say(f"No ModelDeployments found{f' in namespace {cluster.namespace}' if cluster.namespace else ''}.")
        return
    click.echo(printing.documents(items, output, one=False, namespaces=not cluster.namespace))


def _watch(cluster: Cluster, name: str) -> None:
    """A tree that moves on a terminal; elsewhere a line a change."""
    console = printing.console()
    try:
        if not console.is_terminal:
            _print_changes(cluster, name)
            return
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            for state in watching.states(cluster, name):
                if state is not None:
                    tree = rollout_tree(*state, datetime.now(tz=UTC))
                    live.update(printing.coloured(tree), refresh=True)
    except KeyboardInterrupt:
        return


def _print_changes(cluster: Cluster, name: str) -> None:
    last: tuple[str, ...] = ()
    for state in watching.states(cluster, name):
        if state is None:
            continue
        row = deployment_row(state[0], datetime.now(tz=UTC))
        shown = (*row, state[0].phase)
        lines = table((*COLUMNS, "PHASE"), [shown]).splitlines()
        if not last:
            click.echo(lines[0])
        if (*row[:-1], state[0].phase) != last:
            click.echo(lines[1])
        last = (*row[:-1], state[0].phase)


@root.command("status")
@click.argument("name")
@click.option("-w", "--watch", is_flag=True, help="Wait until the rollout is over.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), default=ROLLOUT_TIMEOUT_S, show_default=True,
    metavar="SECONDS", help="Longest wait with --watch.",
)  # fmt: skip
@_cluster_options()
def status(cluster: Cluster, name: str, watch: bool, timeout_s: float) -> None:
    """Say where a rollout stands: exits with 1 when it is Degraded or was rolled back, with 3 when --watch timed out."""
    last = ""
    deadline = time.monotonic() + timeout_s
    for state in watching.states(cluster, name, deadline):
        if state is None:
            say(f"kubectl millrace: {name} is still moving after {timeout_s:g} s")
            sys.exit(TIMED_OUT)
        found = watching.outcome(state[0])
        if found.text != last:
            click.echo(f"{name}: {found.text}")
        last = found.text
        if found.state == "failed":
            sys.exit(FAILED)
        if found.state == "done" or not watch:
            return


def _act(
    cluster: Cluster, name: str, verb: str, timeout_s: float, weight: float | None = None, *, to: str = ""
) -> None:
    item = actions.retry_conflicts(lambda: actions.act(cluster, name, verb, weight, to=to, timeout_s=timeout_s))
    words = f"{verb} {weight:g}" if weight is not None else verb
    click.echo(f"modeldeployment.millrace.dev/{name} {words}: {(item.get('status') or {}).get('phase', '')}")
    say(f"next: kubectl millrace get {name} -n {cluster.namespace} -w")


_timeout = click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), default=actions.ANSWER_TIMEOUT_S, show_default=True,
    metavar="SECONDS", help="Longest wait for the controller's answer.",
)  # fmt: skip


def _verb(verb: str, text: str) -> None:
    @root.command(verb, help=text)
    @click.argument("name")
    @_timeout
    @_cluster_options()
    def command(cluster: Cluster, name: str, timeout_s: float) -> None:
        _act(cluster, name, verb, timeout_s)


for _word, _text in {
    "promote": "Make the candidate stable now, without the remaining steps.",
    "pause": "Hold the rollout at its present weight.",
    "resume": "Go on with a paused rollout.",
    "abort": "Send all traffic back to the stable version.",
}.items():
    _verb(_word, _text)


@root.command("undo")
@click.argument("name")
@click.option(
    "--to", default="", metavar="VERSION|REVISION", help="What to go back to; the version before when it is not given."
)
@_timeout
@_cluster_options()
def undo(cluster: Cluster, name: str, to: str, timeout_s: float) -> None:
    """Go back to a version that was stable before, without steps; `history` lists them."""
    _act(cluster, name, "undo", timeout_s, to=to)


@root.command("history")
@click.argument("name")
@click.option("-o", "--output", type=click.Choice(["table", "wide", "json"]), default="table", show_default=True)
@_cluster_options()
def history(cluster: Cluster, name: str, output: str) -> None:
    """List the newest decisions about a deployment's versions; wide and json with the evidence of every gate."""
    decisions = deployment(cluster.deployment(name)).history
    if not decisions and output != "json":
        say(f"Nothing was decided about {name} yet.")
        return
    click.echo(history_text(decisions, output))


@root.command("set-weight")
@click.argument("name")
@click.argument("weight", type=click.FloatRange(0, 100), metavar="PERCENT")
@_timeout
@_cluster_options()
def set_weight(cluster: Cluster, name: str, weight: float, timeout_s: float) -> None:
    """Hold the candidate at a share of the traffic until resume."""
    _act(cluster, name, "set-weight", timeout_s, weight)


@root.command("lint")
@linting.options
@click.option("--server", is_flag=True, help="Ask the API server too (a dry run); without it no cluster is needed.")
@click.option("-n", "--namespace", metavar="NAME", help="With --server and --live: namespace.")
@click.option("--context", metavar="NAME", help="With --server and --live: context of the kubeconfig.")
@click.option("--kubeconfig", type=click.Path(dir_okay=False), help="With --server and --live: path of the kubeconfig.")
def lint_(
    *,
    paths: tuple[str, ...],
    server: bool,
    namespace: str | None,
    context: str | None,
    kubeconfig: str | None,
    no_plan: bool,
    show: bool,
    rate: float | None,
    live: bool,
    outcome_share: float,
    baselines: tuple[str, ...],
) -> None:
    """Check manifests by the rules of the ModelDeployment resource, and whether their steps can decide their gates.

    Names the field of everything that is wrong, and warns of steps whose minRequests are fewer than their gates need.
    """
    cluster = Cluster.connect(kubeconfig, context, namespace) if server or live else None
    known = linting.traffic(rate, outcome_share, baselines)
    definition, wrong = schema.crd(), 0
    for path in paths:
        text = linting.read(path)
        found = list(lint.lint(text, definition))
        if cluster is not None and server and not found:
            found = list(lint.on_server(text, cluster))
        for finding in found:
            click.echo(f"{path}: {finding}")
        wrong += len(found)
        if not found and not no_plan:
            linting.plan(path, text, known, _rates(cluster) if cluster is not None and live else None, show=show)
    if wrong:
        sys.exit(FAILED)
    say(f"{len(paths)} file{'s' if len(paths) > 1 else ''} ok")


def _rates(cluster: Cluster) -> linting.Live:
    def rate(name: str) -> float:
        try:
            return float((cluster.deployment(name).get("status") or {}).get("requestsPerSecond", 0.0))
        except ClusterError as error:
            if error.status != 404:
                raise
            return 0.0

    return rate
