"""The command `lint` of both command lines: what is wrong with a manifest, and whether its steps can decide its gates."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import yaml

from millrace import planning
from millrace.view import table

Command = Callable[..., None]
Live = Callable[[str], float]
"""Requests a second of a deployment by its name; 0 when it is not known."""


def options(command: Command) -> Command:
    """The options about files and plans."""
    for option in (
        click.option("--no-plan", is_flag=True, help="Check only; say nothing about how many requests the gates need."),
        click.option("--plan", "show", is_flag=True, help="Print what each gate needs at each step."),
        click.option("--rate", type=click.FloatRange(min=0, min_open=True), metavar="R", help="Requests a second of the model."),
        click.option("--live", is_flag=True, help="Take the rate from the deployment of that name as it is in use now."),
        click.option(
            "--outcome-share", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, metavar="PART",
            help="Part of the requests whose outcome becomes known.",
        ),
        click.option(
            "--baseline", "baselines", multiple=True, metavar="METRIC=MEAN",
            help="Stable's mean of a metric, for example outcome/accuracy=0.92, or of values MEAN:DEVIATION, "
            "for example business/revenue=12.5:30; can be repeated.",
        ),
        click.argument(
            "paths", nargs=-1, required=True, type=click.Path(dir_okay=False, allow_dash=True), metavar="FILE…"
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def read(path: str) -> str:
    """A file, or standard input for `-`.

    Raises:
        click.UsageError: it cannot be read.
    """
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise click.UsageError(f"{path}: {error}") from error


def traffic(rate: float | None, outcome_share: float, baselines: tuple[str, ...]) -> planning.Traffic:
    """The options as values.

    Raises:
        click.UsageError: a baseline is no metric with a mean between 0 and 1, or with a mean and a deviation.
    """
    means: dict[str, float] = {}
    deviations: dict[str, float] = {}
    for one in baselines:
        metric, _, value = one.partition("=")
        if metric.startswith("business/") or metric in planning.VALUES:
            try:
                means[metric], deviations[metric] = map(float, value.split(":"))
            except ValueError:
                raise click.UsageError(f"--baseline {one}: needs MEAN:DEVIATION") from None
            if not (math.isfinite(means[metric]) and 0 < deviations[metric] < math.inf):
                raise click.UsageError(f"--baseline {one}: needs a deviation that is more than 0")
            continue
        try:
            means[metric] = float(value)
        except ValueError:
            means[metric] = -1.0
        if metric not in planning.BASELINES or not 0 < means[metric] < 1:
            known = ", ".join(planning.BASELINES)
            raise click.UsageError(f"--baseline {one}: needs one of {known}, = and a mean between 0 and 1")
    return planning.Traffic(rate, outcome_share, means, deviations)


def plan(path: str, text: str, known: planning.Traffic, live: Live | None, *, show: bool) -> None:
    """Say what the gates of every ModelDeployment in a file need: warnings on stderr, with `show` a table on stdout."""
    for name, spec in _specs(text):
        used = known
        if live is not None:
            rate = live(name)
            if rate <= 0:
                click.echo(f"{path}: {name} is not in use, so times are not known", err=True)
            used = replace(known, rate=rate if rate > 0 else known.rate)
        found = planning.plan(spec, used)
        for warning in found.warnings:
            click.echo(f"{path}: warning: {warning}", err=True)
        if show and found.needs:
            at = f" at {used.rate:g} requests a second" if used.rate else ""
            click.echo(f"{name}: candidate requests until four of five rollouts have the verdict{at}")
            click.echo(table(planning.COLUMNS, planning.rows(found)))


def _specs(text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for document in yaml.safe_load_all(text):
        if isinstance(document, dict) and document.get("kind") == "ModelDeployment":
            yield document["metadata"]["name"], document["spec"]
