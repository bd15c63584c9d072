"""`predict`: ask a model."""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import TextIO

import click
from google.protobuf.json_format import MessageToDict
from millrace_api.prediction.v1.prediction_pb2 import PredictResponse

from millrace.areas.serving import Answer
from millrace.cli.local import Context
from millrace.values import Scalar
from millrace.view import table


@click.command()
@click.argument("model")
@click.option("-i", "--input", "inputs", multiple=True, metavar="NAME=VALUE", help="Join key or request field.")
@click.option(
    "--rows", type=click.File("r", encoding="utf-8"), help="JSON lines, an object of inputs in each; - is stdin."
)
@click.option("--subject", default="", help="Business key an outcome will carry.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.pass_obj
def predict(
    context: Context, *, model: str, inputs: tuple[str, ...], rows: TextIO | None, subject: str, output: str
) -> None:
    """Ask MODEL for a prediction, or for one a line of --rows; exits with 1 when any failed.

    A VALUE is a number or true and false where it reads as one, else a text; '"7"' in double quotes is a text.
    """
    if (rows is None) == (not inputs):
        raise click.UsageError("give inputs by -i NAME=VALUE, or --rows FILE")
    failed = False
    with context.client() as client:
        if rows is None:
            answers: Iterator[tuple[int, Answer]] = iter(
                [(0, client.predictions.predict(model, dict(map(_input, inputs)), subject=subject))]
            )
        else:
            answers = client.predictions.stream(model, _read(rows))
        shown = []
        for index, answer in answers:
            failed |= not isinstance(answer, PredictResponse)
            if output == "json":
                click.echo(json.dumps({"row": index, **_fields(answer)}))
            else:
                shown.append((str(index), *_cells(answer)))
    if output == "table":
        header = ("ROW", "OUTPUT", "VERSION", "PREDICTION", "NOTES")
        click.echo(table(header, sorted(shown, key=lambda row: int(row[0]))))
    if failed:
        sys.exit(1)


def _input(text: str) -> tuple[str, Scalar]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.UsageError(f"-i {text}: is not NAME=VALUE")
    try:
        found = json.loads(value)
    except ValueError:
        return name, value
    return name, found if isinstance(found, str | int | float | bool) else value


def _read(lines: TextIO) -> Iterator[Mapping[str, Scalar | None]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found = json.loads(line)
            except ValueError as error:
                raise click.ClickException(f"line {number}: {error}") from None
            if not isinstance(found, dict):
                raise click.ClickException(f"line {number}: is no JSON object")
            yield found


def _fields(answer: Answer) -> dict[str, object]:
    if isinstance(answer, PredictResponse):
        return MessageToDict(answer)
    return {"error": {"code": answer.code.name, "reason": answer.reason, "message": answer.message}}


def _cells(answer: Answer) -> tuple[str, str, str, str]:
    if not isinstance(answer, PredictResponse):
        return "-", "-", "-", f"{answer.code.name}: {answer.message}"
    shown = answer.labels or [f"{value:.6g}" for value in answer.outputs]
    notes = [f"{name} had no value" for name in answer.missing_features if name not in answer.defaulted_features]
    notes += [f"{name} has its default" for name in answer.defaulted_features]
    notes += [f"answered before, {answer.cache_age_ms} ms ago"] if answer.cached else []
    notes += [f"with {part.model} {part.version}" for part in answer.parts]
    notes += [f"without {model}, which did not answer" for model in answer.left_out_models]
    return ", ".join(shown), answer.version, answer.prediction_id, "; ".join(notes)


COMMANDS = (predict,)
