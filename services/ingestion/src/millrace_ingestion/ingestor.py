"""What the service does, without gRPC: contracts, writes, dead letters, tables."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pyarrow as pa
from millrace_kit.clock import Clock
from millrace_kit.errors import (
    ConflictError,
    FailedPreconditionError,
    MillraceError,
    NotFoundError,
    ResourceExhaustedError,
)

from millrace_ingestion.checks import Arrival
from millrace_ingestion.compatibility import Change, changes, check_evolution
from millrace_ingestion.contracts import Contract
from millrace_ingestion.held_store import HeldStore
from millrace_ingestion.intake import Budget, decode, decode_held, decode_letters
from millrace_ingestion.landing import Landing
from millrace_ingestion.lane import Lane
from millrace_ingestion.letter_store import Choice, LetterStore
from millrace_ingestion.models import HeldBatch, Incoming, Letter, LetterCount, Outcome, Released, TableState
from millrace_ingestion.quality_monitor import Bucket, QualityMonitor
from millrace_ingestion.store import Store

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class IntakeLimits:
    """Sizes of what is taken in; see the settings of the same names."""

    max_contracts: int
    max_batch_rows: int
    max_batch_bytes: int
    max_dead_letters: int
    replay_rows: int


@dataclass(frozen=True)
class Comparison:
    """A contract beside the newest version of its name."""

    newest: Contract | None
    changes: Sequence[Change]
    problem: MillraceError | None
    """Why it would be refused."""


class Ingestor:
    """The domain of the service.

    Args:
        store: contracts.
        letter_store: dead letters.
        held: quarantined batches.
        quality: figures of what landed.
        contracts: newest version of each contract, at the start.
        make_lane: makes the lane of a contract.
        serialize: a contract's stored form.
        deserialize: a contract from its version and stored form.
        budget: what may wait at once.
        limits: sizes.
        letters: dead letters kept already.
        clock: when batches arrive.
        guard: whether what needs a contract can live with a new version of it, given the other contracts; blocks, and raises when not.
    """

    def __init__(
        self,
        *,
        store: Store,
        letter_store: LetterStore,
        held: HeldStore,
        quality: QualityMonitor,
        contracts: Sequence[Contract],
        make_lane: Callable[[Contract], Lane],
        serialize: Callable[[Contract], bytes],
        deserialize: Callable[[int, bytes], Contract],
        budget: Budget,
        limits: IntakeLimits,
        letters: int,
        clock: Clock,
        guard: Callable[[Contract, Callable[[str], Contract]], None],
    ) -> None:
        self._guard = guard
        self._clock = clock
        self._store = store
        self._letter_store = letter_store
        self._held = held
        self._quality = quality
        self._contracts = {contract.name: contract for contract in contracts}
        self._make_lane = make_lane
        self._lanes = {contract.name: make_lane(contract) for contract in contracts}
        self._serialize = serialize
        self._deserialize = deserialize
        self._budget = budget
        self._limits = limits
        self._letters = letters
        self._registering = asyncio.Lock()
        self._replaying = asyncio.Lock()
        self._new_lanes: asyncio.Queue[Lane] = asyncio.Queue()
        self._stopping = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Run every lane until `stop` is set."""
        async with asyncio.TaskGroup() as lanes:
            for lane in self._lanes.values():
                lanes.create_task(lane.run(stop), name=f"lane-{lane.name}")
            adding = lanes.create_task(self._run_new(lanes, stop))
            await stop.wait()
            self._stopping.set()
            adding.cancel()

    async def stopped(self) -> None:
        """Wait until the service stops; streams end then."""
        await self._stopping.wait()

    async def _run_new(self, lanes: asyncio.TaskGroup, stop: asyncio.Event) -> None:
        while True:
            lane = await self._new_lanes.get()
            lanes.create_task(lane.run(stop), name=f"lane-{lane.name}")

    async def register(self, contract: Contract) -> tuple[Contract, bool]:
        """Register a validated contract; returns it with its version, and whether that is new.

        Raises:
            FailedPreconditionError: it may not follow the newest version; names the column.
            ResourceExhaustedError: `max_contracts` are there.
            UnavailableError: the lake does not answer; the version is kept, register again.
        """
        async with self._registering:
            current = self._contracts.get(contract.name)
            if current is not None and replace(contract, version=current.version) == current:
                await self._lanes[contract.name].ready()
                return current, False
            if current is None and len(self._contracts) >= self._limits.max_contracts:
                raise ResourceExhaustedError("max_contracts", f"{len(self._contracts)} contracts are registered")
            if current is not None:
                check_evolution(await self.versions(contract.name), contract)
                await asyncio.to_thread(self._guard, contract, self.contract)
            numbered = replace(contract, version=current.version + 1 if current is not None else 1)
            body = self._serialize(numbered)
            try:
                await asyncio.to_thread(self._store.add_contract, numbered.name, numbered.version, body)
            except ConflictError:
                await self._learn()  # so that trying again sees what was registered
                raise
            await self._take_in(numbered)
            await self._lanes[numbered.name].ready()
            return numbered, True

    async def _take_in(self, contract: Contract) -> None:
        """Land by this version of a contract from now on."""
        if contract.name not in self._lanes:
            self._lanes[contract.name] = self._make_lane(contract)
            self._new_lanes.put_nowait(self._lanes[contract.name])
        else:
            await self._lanes[contract.name].follow(contract)
        self._contracts[contract.name] = contract

    async def _learn(self) -> None:
        """Take in what another process has registered: two run for a moment while one takes over from the other."""
        for version, body in await asyncio.to_thread(self._store.contracts):
            contract = self._deserialize(version, body)
            known = self._contracts.get(contract.name)
            if known is None or known.version < version:
                await self._take_in(contract)

    def contract(self, name: str) -> Contract:
        """The newest version of a contract.

        Raises:
            NotFoundError: there is none of that name.
        """
        if name not in self._contracts:
            raise NotFoundError("contract", name)
        return self._contracts[name]

    async def versions(self, name: str) -> list[Contract]:
        """Every version of a contract, oldest first.

        Raises:
            NotFoundError: there is none of that name.
        """
        self.contract(name)
        return [self._deserialize(*row) for row in await asyncio.to_thread(self._store.versions, name)]

    async def compare(self, contract: Contract) -> Comparison:
        """What registering a validated contract would change, and whether it would be taken."""
        current = self._contracts.get(contract.name)
        if current is None:
            return Comparison(None, (), None)
        found = tuple(changes(current, contract))
        try:
            check_evolution(await self.versions(contract.name), contract)
            await asyncio.to_thread(self._guard, contract, self.contract)
        except FailedPreconditionError as error:
            return Comparison(current, found, error)
        return Comparison(current, found, None)

    def contracts(self) -> list[Contract]:
        """The newest version of every contract, by name."""
        return [self._contracts[name] for name in sorted(self._contracts)]

    def epoch(self, name: str) -> int:
        """The epoch of a contract's lane; see `lane`."""
        self.contract(name)
        return self._lanes[name].epoch

    def landed_version(self, name: str) -> int:
        """The newest version of a contract's table that a commit of this process made; -1 before the first."""
        self.contract(name)
        return self._lanes[name].table_version

    async def position(self, contract: str, source: str) -> int:
        """Offset of the source's last batch that landed; 0 for none.

        Raises:
            NotFoundError: no such contract.
            UnavailableError: the lake or the database does not answer.
        """
        self.contract(contract)
        return await self._lanes[contract].use(lambda landing: landing.last_offset(source))

    async def accept(self, incoming: Incoming, *, epoch: int | None = None) -> asyncio.Future[Outcome]:
        """Check and queue a batch; the future has its outcome once it is durable.

        Args:
            incoming: the batch.
            epoch: for a batch of a stream, the lane's epoch when the stream began; it waits for room. Without, no room is an error.

        Raises:
            NotFoundError: no such contract.
            InvalidArgumentError: the payload cannot be read.
            ResourceExhaustedError: a limit is reached.
            UnavailableError: the service stops, or an earlier batch of the stream failed.
        """
        if incoming.contract not in self._contracts:
            async with self._registering:
                await self._learn()
        contract = self.contract(incoming.contract)
        size = incoming.payload_bytes
        if size > self._limits.max_batch_bytes:
            limit = self._limits.max_batch_bytes >> 20
            raise ResourceExhaustedError("max_batch_mib", f"the batch is larger than {limit} MiB; send smaller ones")
        if epoch is None:
            self._budget.take_now(size)
        else:
            await self._budget.take(size)
        try:
            pending = await asyncio.to_thread(
                decode,
                contract,
                incoming,
                max_rows=self._limits.max_batch_rows,
                max_bytes=self._limits.max_batch_bytes,
                arrival=Arrival((self._clock.now() - _EPOCH) // _MICROSECOND),
            )
            extra = max(0, pending.checked.size - size)
            self._budget.grow(extra)
            size += extra
            self._count_letters(len(pending.checked.rejects))
            answer = self._lanes[contract.name].submit(pending, epoch)
        except BaseException:
            self._budget.give(size)
            raise
        answer.add_done_callback(lambda _answer: self._budget.give(size))
        return answer

    def _count_letters(self, added: int) -> None:
        if added and self._letters + added > self._limits.max_dead_letters:
            raise ResourceExhaustedError("max_dead_letters", f"{self._letters} dead letters are kept already")
        self._letters += added

    async def write(self, incoming: Incoming) -> Outcome:
        """Land one batch."""
        # Shielded: when the caller gives up, the batch lands all the same and its answer is kept for the next attempt.
        return await asyncio.shield(await self.accept(incoming))

    async def letters(self, choice: Choice, *, after: int, limit: int) -> list[Letter]:
        """Dead letters of a contract, by id."""
        self.contract(choice.contract)
        return await asyncio.to_thread(self._letter_store.letters, choice, after=after, limit=limit)

    async def counts(self, contract: str) -> list[LetterCount]:
        """Dead letters by contract and reason."""
        if contract:
            self.contract(contract)
        return await asyncio.to_thread(self._letter_store.counts, contract)

    async def replay(self, choice: Choice, *, limit: int | None = None, dry_run: bool = False) -> tuple[int, int]:
        """Send dead letters through the present contract; returns how many landed and how many are refused still.

        Args:
            choice: which.
            limit: at most so many, the oldest; None is all.
            dry_run: only check them.
        """
        replayed = refused = after = seen = 0
        async with self._replaying:
            while limit is None or seen < limit:
                current = self.contract(choice.contract)
                most = self._limits.replay_rows if limit is None else min(self._limits.replay_rows, limit - seen)
                letters = await asyncio.to_thread(
                    self._letter_store.letters, choice, after=after, limit=most, only_open=True
                )
                if not letters:
                    break
                after = letters[-1].id
                seen += len(letters)
                pending = await asyncio.to_thread(decode_letters, current, letters)
                if dry_run:
                    replayed += pending.checked.table.num_rows
                    refused += len(pending.checked.rejects)
                    continue
                outcome = await asyncio.shield(self._lanes[choice.contract].submit(pending))
                replayed += outcome.accepted + outcome.duplicates
                refused += outcome.rejected
        return replayed, refused

    async def discard_letters(self, choice: Choice, *, limit: int | None = None) -> int:
        """Remove dead letters, the oldest first; returns how many."""
        self.contract(choice.contract)
        async with self._replaying:
            removed = await asyncio.to_thread(self._letter_store.discard, choice, limit)
        self.forget_letters(removed)
        return removed

    def forget_letters(self, removed: int) -> None:
        """Make room for as many dead letters as were removed."""
        self._letters = max(0, self._letters - removed)

    async def quality(
        self, contract: str, *, since_us: int | None, until_us: int | None, version: int | None, limit: int
    ) -> list[Bucket]:
        """The newest quality buckets of a contract, oldest first; see `QualityMonitor.buckets`."""
        self.contract(contract)
        await self._lanes[contract].settled()
        return await asyncio.to_thread(
            self._quality.buckets, contract, since_us=since_us, until_us=until_us, version=version, limit=limit
        )

    async def held(self, contract: str, *, after: int, limit: int, settled: bool) -> list[HeldBatch]:
        """Quarantined batches of a contract, by id; without `settled` only those that are still held."""
        self.contract(contract)
        return await asyncio.to_thread(self._held.batches, contract, after=after, limit=limit, settled=settled)

    async def release(self, contract: str, ids: Sequence[int]) -> Released:
        """Land quarantined batches, each as one batch of the reserved source; without `ids` every one that is held."""
        done = Released(0, 0, 0, 0)
        after = 0
        async with self._replaying:
            while True:
                current = self.contract(contract)
                found = await asyncio.to_thread(self._held.batches, contract, after=after, limit=1, ids=ids)
                if not found:
                    return done
                (batch,) = found
                after = batch.id
                lane = self._lanes[contract]
                records = await lane.use(partial(_records_of, batch))
                pending = await asyncio.to_thread(
                    decode_held, current, batch, records, max_bytes=self._limits.max_batch_bytes
                )
                outcome = await asyncio.shield(lane.submit(pending))
                done = Released(
                    done.batches + 1,
                    done.accepted + outcome.accepted,
                    done.duplicates + outcome.duplicates,
                    done.rejected + outcome.rejected,
                )

    async def discard_held(self, contract: str, ids: Sequence[int]) -> int:
        """Give up quarantined batches; returns how many were held."""
        self.contract(contract)
        async with self._replaying:
            return await asyncio.to_thread(self._held.discard, contract, ids)

    def lane(self, contract: str) -> Lane:
        """The lane of a contract.

        Raises:
            NotFoundError: there is no such contract.
        """
        self.contract(contract)
        return self._lanes[contract]

    async def table(self, contract: str, *, version: int | None = None, instant: datetime | None = None) -> TableState:
        """A contract's table as it was at a version or an instant; without either its newest version.

        Raises:
            NotFoundError: no such version, or it cannot be read any more.
            UnavailableError: the lake does not answer.
        """

        def look(landing: Landing) -> TableState:
            table = landing.table
            if version is None and instant is None:
                return TableState(contract, table.version, table.url, table.rows())
            found = table.at(version=version, instant=instant)
            if found.lost:
                raise NotFoundError("table version", f"{contract}@{found.version}")
            return TableState(contract, found.version, table.url, found.rows)

        return await self.lane(contract).use(look)


def _records_of(batch: HeldBatch, landing: Landing) -> pa.Table:
    return landing.held_records(batch.source, batch.offset)
