"""Joins beside a plain nested loop: random events, late arrivals, small steps, steps that are broken off and done again."""

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from millrace_ingestion.contracts import Column, ColumnType, Contract
from millrace_ingestion.joins.inputs import JoinInput
from millrace_ingestion.joins.matching import Keys, ranges
from millrace_ingestion.joins.outputs import Maker, generated, layout
from millrace_ingestion.joins.planning import Planner
from millrace_ingestion.joins.position import NEVER_US, Added, Position, taken, watermark
from millrace_ingestion.joins.rows import Joiner
from millrace_ingestion.joins.specs import ANY_AGE_US, JoinKey, JoinKind, JoinSpec
from millrace_ingestion.lake import LakeTable
from millrace_kit.clock import FakeClock

S = 1_000_000
BEFORE, AFTER, LATENESS = 5 * S, 20 * S, 10 * S
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def contract(name: str) -> Contract:
    columns = (
        Column("id", ColumnType.STRING),
        Column("at", ColumnType.TIMESTAMP),
        Column("user", ColumnType.STRING, nullable=True),
        Column("place", ColumnType.INT64),
        Column("value", ColumnType.DOUBLE, nullable=True),
    )
    return Contract(name, 1, columns, "id", "at", ("user",))


SCHEMA = contract("any").arrow_schema()


@dataclass(frozen=True)
class Event:
    id: str
    at: int
    user: str | None
    place: int

    def partner_of(self, left: "Event", before: int, after: int) -> bool:
        same = self.user is not None and (self.user, self.place) == (left.user, left.place)
        return same and left.at - before <= self.at <= left.at + after


def table(events: list[Event]) -> pa.Table:
    rows = [{"id": e.id, "at": e.at, "user": e.user, "place": e.place, "value": float(e.at)} for e in events]
    return pa.Table.from_pylist([{**row, "at": datetime.fromtimestamp(0, UTC)} for row in rows], SCHEMA).set_column(
        1, SCHEMA.field("at"), pa.array([e.at for e in events], pa.int64()).cast(SCHEMA.field("at").type)
    )


@dataclass
class Side:
    """One input: its events by arrival, and a real Delta table."""

    name: str
    folder: str
    events: list[Event]
    landed: list[Event] = field(default_factory=list)
    versions: dict[int, int] = field(default_factory=lambda: {0: 0})

    def __post_init__(self) -> None:
        write_deltalake(self.folder, SCHEMA.empty_table())

    def land(self, count: int) -> None:
        batch, self.events = self.events[:count], self.events[count:]
        if batch:
            write_deltalake(self.folder, table(batch), mode="append")
            self.landed.extend(batch)
            self.versions[max(self.versions) + 1] = len(self.landed)

    def compact(self) -> None:
        reader = LakeTable(self.folder, {}, compact_target_bytes=1 << 20)
        reader.look()
        before = reader.version
        reader.maintain()
        for version in range(before + 1, reader.version + 1):
            self.versions[version] = len(self.landed)

    def until(self, version: int) -> list[Event]:
        return self.landed[: self.versions[version]]


def events(chance: random.Random, name: str, count: int) -> list[Event]:
    """By arrival: mostly in the order of event time, some much later."""
    made = [
        Event(
            f"{name}{i}",
            1_000 * S + chance.randrange(400) * S,
            chance.choice(["a", "b", "c/d", None]),
            chance.randrange(2),
        )
        for i in range(count)
    ]
    return sorted(made, key=lambda e: e.at + (chance.randrange(60) * S if chance.random() < 0.3 else 0))


class Run:
    """A join over two growing tables, whose process may die at any place."""

    def __init__(self, folder, chance: random.Random, spec: JoinSpec) -> None:
        self.chance, self.spec = chance, spec
        self.left = Side("left", f"{folder}/left", events(chance, "l", 100))
        self.right = Side("right", f"{folder}/right", events(chance, "r", 100))
        self.clock = FakeClock(NOW)
        self.out: dict[str, dict] = {}
        self.position: Position | None = None
        self.plan: Position | None = None
        self.steps: list[tuple[Position, Position]] = []
        self.late = 0
        self.kills = 0.2
        self.start()

    def start(self) -> None:
        left, right = contract("left"), contract("right")
        how = layout(self.spec, left, right, generated("joined", self.spec, left, right))
        sides = [
            JoinInput(one, LakeTable(side.folder, {}, compact_target_bytes=1 << 20), batch_rows=7)
            for one, side in ((left, self.left), (right, self.right))
        ]
        self.planner = Planner(how, *sides, self.clock, 11)
        self.joiner = Joiner(how, *sides, Maker(how, 5, 1 << 20), 9)

    def drain(self) -> None:
        while True:
            if self.position is None:
                self.position = self.planner.begin()
            if self.plan is not None:
                step = self.planner.again(self.position, self.plan)
            else:
                step, _look = self.planner.next(self.position)
            if step is None:
                return
            if self.chance.random() < self.kills:
                # Killed with some of the step's records landed.
                self.plan = step.after
                for _ in range(self.chance.randrange(3)):
                    self.put(next(self.joiner.records(step), None))
                self.start()
                continue
            for records in self.joiner.records(step):
                self.put(records)
            self.late += step.counts.late
            self.steps.append((step.before, step.after))
            self.position, self.plan = step.after, None

    def put(self, records: pa.Table | None) -> None:
        for row in records.to_pylist() if records is not None else ():
            assert self.out.setdefault(row["join_id"], row) == row, "the same id with other values"

    def live(self) -> None:
        """Records come, the join follows."""
        while self.left.events or self.right.events:
            for side in (self.left, self.right):
                for _ in range(self.chance.randrange(3)):
                    side.land(self.chance.randrange(1, 12))
                if self.chance.random() < 0.15:
                    side.compact()
            if self.chance.random() < 0.7:
                self.drain()
        self.drain()


def spec(kind: JoinKind, **changes) -> JoinSpec:
    given = {"before_us": BEFORE, "after_us": AFTER, **changes}
    return JoinSpec(kind, "left", "right", (JoinKey("user", "user"), JoinKey("place", "place")), **given)


def got(run: Run) -> set[tuple[str, str | None]]:
    found = [(row["id"], row["right_id"]) for row in run.out.values()]
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize("seed", range(3))
def test_inner_is_the_nested_loop_whatever_comes_when(tmp_path, seed: int) -> None:
    run = Run(tmp_path, random.Random(seed), spec(JoinKind.INNER))
    run.live()
    wanted = {
        (left.id, right.id)
        for left in run.left.landed
        for right in run.right.landed
        if right.partner_of(left, BEFORE, AFTER)
    }
    assert len(wanted) > 20
    assert got(run) == wanted
    times = {event.id: event.at for event in (*run.left.landed, *run.right.landed)}
    for row in run.out.values():
        at = max(times[row["id"]], times[row["right_id"]])
        assert int(row["joined_at"].timestamp() * S) == at
        assert (row["value"], row["right_value"]) == (times[row["id"]], times[row["right_id"]])


@pytest.mark.parametrize("seed", range(5))
def test_left_settles_each_record_once_and_leaves_out_what_is_late(tmp_path, seed: int) -> None:
    chance = random.Random(seed)
    run = Run(tmp_path, chance, spec(JoinKind.LEFT, lateness_us=LATENESS))
    run.live()
    wanted: set[tuple[str, str | None]] = set()
    late = 0
    for left in run.left.landed:
        # The step after which nothing more is joined to it: where its time was over, or where it came when that was over already.
        over = [
            index
            for index, (_before, after) in enumerate(run.steps)
            if left.at <= after.settled_us and _arrived(run.left, left, after) and after.base_row is None
        ]
        until = run.steps[over[0]][1].right_version if over else run.position.right_version
        there = run.right.until(until)
        partners = {(left.id, right.id) for right in there if right.partner_of(left, BEFORE, AFTER)}
        wanted |= partners or ({(left.id, None)} if over else set())
        late += sum(right.partner_of(left, BEFORE, AFTER) for right in run.right.landed[len(there) :])
    assert got(run) == wanted
    assert run.late == late
    alone = [row for row in run.out.values() if row["right_id"] is None]
    assert alone
    for row in alone:
        assert row["matched"] == 0
        assert int(row["joined_at"].timestamp() * S) == int(row["value"]) + AFTER
    high = min(max(event.at for event in side.landed) for side in (run.left, run.right))
    assert run.position.settled_us <= high - AFTER - LATENESS
    assert not [e for e in run.left.landed if run.position.settled_us < e.at <= high - AFTER - LATENESS]


def _arrived(side: Side, event: Event, at: Position) -> bool:
    return event in side.until(at.left_version)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("max_age", [30 * S, ANY_AGE_US])
def test_as_of_takes_the_newest_that_had_come(tmp_path, seed: int, max_age: int) -> None:
    run = Run(tmp_path, random.Random(seed), spec(JoinKind.AS_OF, before_us=max_age, after_us=0))
    run.live()
    wanted: dict[str, str | None] = {}
    seen = 0
    for before, after in run.steps:
        if before.base_row is not None:
            first, last = before.base_row, after.base_row
            assert run.left.versions[before.left_version] >= (last or 0) >= first or last is None
            continue
        new = run.left.landed[run.left.versions[before.left_version] : run.left.versions[after.left_version]]
        for left in new:
            wanted[left.id] = _newest(left, run.right.until(after.right_version), max_age)
        seen += len(new)
    found = {row["id"]: row["right_id"] for row in run.out.values()}
    base = run.left.until(run.steps[0][0].left_version)
    for left in base:
        wanted[left.id] = _newest(left, run.right.until(run.steps[0][0].right_version), max_age)
    assert found == wanted
    assert len(found) == 100
    assert {row["matched"] for row in run.out.values()} == {0, 1}
    assert all(row["join_id"] == row["id"] for row in run.out.values())


def _newest(left: Event, there: list[Event], max_age: int) -> str | None:
    fit = [right for right in there if right.partner_of(left, max_age, 0)]
    return max(fit, key=lambda right: (right.at, right.id)).id if fit else None


def test_as_of_waits_for_what_is_on_its_way(tmp_path) -> None:
    run = Run(tmp_path, random.Random(1), spec(JoinKind.AS_OF, after_us=0, wait_s=3600.0))
    run.drain()
    run.clock = FakeClock(datetime.now(UTC))
    run.start()
    run.left.land(5)
    run.drain()
    assert not run.out
    run.right.land(20)
    run.clock.advance(3700)
    run.drain()
    assert len(run.out) == 5


def test_a_silent_input_holds_the_other_until_it_counts_as_idle(tmp_path) -> None:
    run = Run(tmp_path, random.Random(1), spec(JoinKind.LEFT, idle_s=60.0))
    run.kills = 0.0
    run.left.land(50)
    run.drain()
    assert not run.out
    run.clock.advance(61)
    run.drain()
    assert len(run.out) == 50
    assert not run.position.right_high_us > NEVER_US


def test_many_keys_and_nulls_find_their_partners() -> None:
    chance = np.random.default_rng(3)
    left, right = (
        [
            pa.chunked_array([pa.array([None if v == 0 else f"k{v}" for v in chance.integers(0, 9, 300)])]),
            pa.chunked_array([pa.array(chance.integers(0, 4, 300))]),
            pa.chunked_array([pa.array(chance.integers(0, 2, 300).astype(bool))]),
        ]
        for _ in range(2)
    )
    times = [np.sort(chance.integers(0, 50, 300)) for _ in range(2)]
    keys = Keys(left)
    found = ranges((keys.codes, times[0]), (keys.of(right), times[1]), before_us=3, after_us=4)
    rows = [list(zip(*(column.to_pylist() for column in side), strict=True)) for side in (left, right)]
    pairs = {(int(one), int(two)) for part in found.pairs(7) for one, two in zip(part.left, part.right, strict=True)}
    wanted = {
        (one, two)
        for one in range(300)
        for two in range(300)
        if rows[0][one] == rows[1][two] and rows[0][one][0] is not None and -3 <= times[1][two] - times[0][one] <= 4
    }
    assert pairs == wanted
    assert len(wanted) > 50


def test_steps_are_bounded_but_take_at_least_one_commit() -> None:
    commits = [Added(version, rows, float(version), ()) for version, rows in enumerate([50, 5, 5, 5, 0, 2])]
    assert len(taken(commits, 10)) == 1
    assert len(taken(commits[1:], 10)) == 2
    assert len(taken(commits, 1_000)) == 6
    assert len(taken(commits, 1_000, until_s=2.5)) == 3
    assert not taken(commits, 1_000, until_s=-1.0)


def test_the_watermark_is_that_of_the_slower_input() -> None:
    at = Position(0, 0, None, left_high_us=100, right_high_us=40)
    assert watermark(at, now_us=10_000, idle_us=10, silent=(False, False)) == 40
    assert watermark(at, now_us=10_000, idle_us=10, silent=(False, True)) == 100
    assert watermark(at, now_us=10_000, idle_us=10, silent=(True, True)) == 9_990
    assert watermark(Position(0, 0, None, left_high_us=100), now_us=1, idle_us=0, silent=(False, False)) == NEVER_US
