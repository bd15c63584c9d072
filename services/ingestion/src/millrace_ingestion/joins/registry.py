"""Which joins may be there, and what contracts owe to those that are."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from millrace_kit.errors import FailedPreconditionError, NotFoundError

from millrace_ingestion.contracts import Contract
from millrace_ingestion.joins.outputs import check_keys, generated, layout
from millrace_ingestion.joins.specs import JoinSpec
from millrace_ingestion.joins.store import JoinStore
from millrace_ingestion.sources.specs import Source


class Contracts(Protocol):
    """What is used of the ingestor."""

    def contract(self, name: str) -> Contract:
        """The newest version of a contract."""
        ...

    async def register(self, contract: Contract) -> tuple[Contract, bool]:
        """Register a contract."""
        ...


def joins_of(sources: Mapping[str, Source]) -> Iterator[tuple[str, JoinSpec, str]]:
    """Name, join and contract of every join."""
    for name, source in sources.items():
        if isinstance(source.spec, JoinSpec):
            yield name, source.spec, source.contract


def check_join(source: Source, sources: Mapping[str, Source], store: JoinStore) -> None:
    """Whether a join may be there beside the others; blocks.

    Args:
        source: the join.
        sources: every source that is registered.
        store: how far joins are.

    Raises:
        FailedPreconditionError: it would join what comes out of it, fill another join's contract, or change what cannot change.
    """
    spec = source.spec
    assert isinstance(spec, JoinSpec)
    others = [join for join in joins_of(sources) if join[0] != source.name]
    for name, _spec, contract in others:
        if contract == source.contract:
            raise _refused(source, "JOIN_CONTRACT_TAKEN", f"join {name!r} makes the records of {contract!r}")
    upstream, new = set[str](), {spec.left, spec.right}
    while new:
        upstream |= new
        new = {one for _name, other, contract in others if contract in new for one in (other.left, other.right)}
        new -= upstream
    if source.contract in upstream:
        raise _refused(source, "JOIN_CYCLE", f"{source.contract!r} would be made of itself")
    kept = store.find(source.name)
    if kept is not None and (kept.contract, kept.identity) != (source.contract, spec.identity):
        raise _refused(
            source,
            "JOIN_IDENTITY",
            f"it began as {kept.identity} into {kept.contract!r}; only lateness_s, idle_s and wait_s change: register another name",
        )


async def prepare_join(source: Source, contracts: Contracts) -> None:
    """Make the join's contract, or check the one that is there.

    Raises:
        NotFoundError: an input's contract is not there.
        FailedPreconditionError: the contracts do not fit; names the column.
    """
    spec = source.spec
    assert isinstance(spec, JoinSpec)
    left, right = contracts.contract(spec.left), contracts.contract(spec.right)
    check_keys(spec, left, right)
    try:
        layout(spec, left, right, contracts.contract(source.contract))
    except NotFoundError:
        await contracts.register(generated(source.contract, spec, left, right))


def check_contract(contract: Contract, sources: Mapping[str, Source], others: Callable[[str], Contract]) -> None:
    """Whether every join that reads or fills a contract still can with this new version.

    Raises:
        FailedPreconditionError: naming the join and the column.
    """
    for name, spec, filled in joins_of(sources):
        names = (spec.left, spec.right, filled)
        if contract.name not in names:
            continue
        left, right, out = (contract if one == contract.name else others(one) for one in names)
        try:
            layout(spec, left, right, out)
        except FailedPreconditionError as error:
            raise FailedPreconditionError(
                "NEEDED_BY_JOIN",
                f"join {name!r} needs contract {contract.name!r} as it is: {error.message}",
                {**error.metadata, "join": name},
            ) from None


def _refused(source: Source, reason: str, text: str) -> FailedPreconditionError:
    return FailedPreconditionError(reason, f"join {source.name!r}: {text}", {"source": source.name})
