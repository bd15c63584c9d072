"""`contracts list|show|diff|check|register`: data contracts from YAML files."""

import json
import sys
from pathlib import Path
from typing import Any

import click
import yaml
from millrace_api.ingestion.v1 import ingestion_pb2 as pb

from millrace.cli.local import Context
from millrace.contracts import contract_document, load_contract
from millrace.transport import call
from millrace.view import table

FILE = click.option(
    "-f", "--filename", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
    help="The contract (YAML).",
)  # fmt: skip


@click.group()
def contracts() -> None:
    """Look at data contracts, and change them."""


@contracts.command("list")
@click.option("-o", "--output", type=click.Choice(["table", "json", "name"]), default="table", show_default=True)
@click.pass_obj
def list_(context: Context, output: str) -> None:
    """List the newest version of every contract."""
    with context.client() as client:
        found = call(client.ingestion.stub.ListContracts, pb.ListContractsRequest()).contracts
    if output == "json":
        click.echo(json.dumps([{"version": c.version, **contract_document(c)} for c in found], indent=2))
    elif output == "name":
        click.echo("\n".join(f"contract/{c.name}" for c in found))
    else:
        rows = [
            (
                c.name,
                str(c.version),
                _mode(c.compatibility),
                str(len(c.columns)),
                str(len(c.comparisons) + len(c.expectations)),
            )
            for c in found
        ]
        click.echo(table(("NAME", "VERSION", "COMPATIBILITY", "COLUMNS", "RULES"), rows))


def _mode(value: int) -> str:
    name = pb.Compatibility.Name(value)  # type: ignore[arg-type]
    return name.removeprefix("COMPATIBILITY_").lower() if value else "backward, no removals"


@contracts.command()
@click.argument("name")
@click.option("--version", "number", type=click.IntRange(0), default=0, help="The newest without.")
@click.option("-o", "--output", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
@click.pass_obj
def show(context: Context, name: str, number: int, output: str) -> None:
    """Print a contract as the file that registers it."""
    with context.client() as client:
        request = pb.GetContractRequest(name=name, version=number)
        contract = call(client.ingestion.stub.GetContract, request).contract
    click.echo(f"version {contract.version}", err=True)
    document = contract_document(contract)
    text = json.dumps(document, indent=2) if output == "json" else yaml.safe_dump(document, sort_keys=False)
    click.echo(text.rstrip("\n"))


def _ask(context: Context, filename: Path) -> tuple[pb.DataContract, pb.CheckContractResponse]:
    contract = load_contract(filename)
    with context.client() as client:
        answer = call(client.ingestion.stub.CheckContract, pb.CheckContractRequest(contract=contract))
    return contract, answer


@contracts.command()
@FILE
@click.pass_obj
def diff(context: Context, filename: Path) -> None:
    """Show what a file would change, and for whom it is compatible."""
    contract, answer = _ask(context, filename)
    if not answer.newest_version:
        click.echo(f"contract/{contract.name} is new")
        return
    if not answer.changes:
        click.echo(f"contract/{contract.name} is equal to version {answer.newest_version}")
        return
    rows = [
        (c.subject or "-", c.change, _yes(c.backward and c.possible), _yes(c.forward and c.possible), _yes(c.possible))
        for c in answer.changes
    ]
    click.echo(table(("COLUMN", "CHANGE", "BACKWARD", "FORWARD", "POSSIBLE"), rows))


def _yes(value: Any) -> str:
    return "yes" if value else "no"


@contracts.command()
@FILE
@click.pass_obj
def check(context: Context, filename: Path) -> None:
    """Say whether a file could be registered now; exits with 1 when not."""
    contract, answer = _ask(context, filename)
    if not answer.compatible:
        click.echo(f"contract/{contract.name} is refused: {answer.problem}")
        sys.exit(1)
    what = f"{len(answer.changes)} changes to version {answer.newest_version}" if answer.newest_version else "new"
    click.echo(f"contract/{contract.name} is compatible ({what})")
    click.echo(f"next: millrace contracts register -f {filename}", err=True)


@contracts.command()
@FILE
@click.pass_obj
def register(context: Context, filename: Path) -> None:
    """Register a file as the contract's next version; an equal one is found again."""
    contract = load_contract(filename)
    with context.client() as client:
        answer = call(client.ingestion.stub.RegisterContract, pb.RegisterContractRequest(contract=contract))
    what = "registered" if answer.created else "unchanged"
    click.echo(f"contract/{answer.contract.name} version {answer.contract.version} {what}")


COMMANDS = (contracts,)
