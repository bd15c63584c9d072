"""Drift findings start exactly one run, and the rest say why not."""

from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1.common_pb2 import TimeRange
from millrace_api.drift.v1 import drift_pb2
from millrace_api.events.v1.events_pb2 import DriftFound, RunChanged
from millrace_api.training.v1 import training_pb2 as pb
from millrace_kit.bus import DRIFT, TRAINING, Outgoing, TopicPartition, open_bus
from millrace_training_coordinator.manifest import Retrain
from millrace_training_coordinator.retrain import Finding, History, Verdict, judge, parameters
from millrace_training_coordinator.schema import POSITION, RETRAIN
from sqlalchemy import create_engine, select

from .conftest import Client, coordinator, manifest, stage, until

START = datetime(2013, 8, 1, tzinfo=UTC)
DAY = timedelta(days=1)
POLICY = Retrain(
    model="flight-delay",
    kinds=("PERFORMANCE", "COVARIATE"),
    cooldown_s=7 * 86_400,
    parameters={"train_end": "{window_end}", "from": "{window_start} or so"},
)
PIPELINE = manifest(
    parameters={"train_end": "2013-07-01T00:00:00Z", "other": "1"},
    stages=[stage("s", "pass")],
    retrain={
        "model": "flight-delay",
        "kinds": ["PERFORMANCE", "COVARIATE"],
        "cooldown_s": 7 * 86_400,
        "parameters": {"train_end": "{window_end}"},
    },
)


def stamp(at: datetime) -> Timestamp:
    made = Timestamp()
    made.FromDatetime(at)
    return made


def found(finding_id: str, day: int, kind=drift_pb2.DRIFT_KIND_COVARIATE, model: str = "flight-delay") -> DriftFound:
    end = START + day * DAY
    window = TimeRange(start=stamp(end - DAY), end=stamp(end))
    finding = drift_pb2.Finding(id=finding_id, model=model, kind=kind, summary="arr_delay shifted", window=window)
    return DriftFound(model=model, version="1.1.0", findings=[finding])


def message(event: DriftFound) -> Outgoing:
    return Outgoing(DRIFT, event.model, event.SerializeToString())


def fact(finding_id: str = "f", kind: str = "COVARIATE", end: datetime | None = START) -> Finding:
    return Finding(finding_id, "flight-delay", kind, "s", START - DAY if end else None, end)


@pytest.mark.parametrize(
    ("finding", "history", "verdict"),
    [
        (fact(), History(), Verdict.STARTED),
        (fact(kind="LABEL"), History(), Verdict.OTHER_KIND),
        (fact(end=None), History(), Verdict.NO_WINDOW),
        (fact(""), History(), Verdict.NO_WINDOW),
        (fact(), History(active_run_id="r"), Verdict.ACTIVE),
        (fact(), History(START - 7 * DAY + timedelta(seconds=1)), Verdict.COOLDOWN),
        (fact(), History(START + 30 * DAY), Verdict.COOLDOWN),
        (fact(), History(START - 7 * DAY, START), Verdict.STARTED),
        (fact(), History(None, datetime(2026, 1, 1, tzinfo=UTC)), Verdict.INTERVAL),
    ],
)
def test_verdicts(finding: Finding, history: History, verdict: Verdict) -> None:
    decided, reason = judge(POLICY, finding, history, datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC), 60)
    assert decided is verdict
    assert reason


def test_the_window_goes_into_the_parameters() -> None:
    assert parameters(POLICY, fact()) == {
        "train_end": "2013-08-01T00:00:00Z", "from": "2013-07-31T00:00:00Z or so",
    }  # fmt: skip


def decisions(settings) -> list[tuple[str, str]]:
    with create_engine(settings.database_url).connect() as connection:
        query = select(RETRAIN.c.finding_id, RETRAIN.c.verdict).order_by(RETRAIN.c.id)
        return [tuple(row) for row in connection.execute(query)]


async def passed(settings, offset: int) -> None:
    def done() -> bool:
        with create_engine(settings.database_url).connect() as connection:
            return connection.execute(select(POSITION.c.next_offset)).scalar() == offset

    await until(done, "the findings to be read")


async def runs(client: Client) -> list[pb.Run]:
    return list((await client.stub.ListRuns(pb.ListRunsRequest())).runs)


async def test_drift_starts_exactly_one_run_within_the_cooldown(settings) -> None:
    bus = await open_bus(settings.bus)
    async with coordinator(settings) as client:
        await client.register(PIPELINE)
        await client.register(manifest("other", stages=[stage("s", "pass")]))
        await bus.publish([message(found("f1", 0))])
        await passed(settings, 1)
        [run] = await runs(client)
        assert run.cause == "drift finding f1: arr_delay shifted"
        assert run.parameters == {"train_end": "2013-08-01T00:00:00Z", "other": "1"}
        await client.ended(run.id)
        await bus.publish([
            message(found("f1", 0)),  # delivered again
            message(found("f2", 1)),
            message(found("f3", 1, drift_pb2.DRIFT_KIND_LABEL)),
            message(found("f4", 20, model="somebody-else")),
            Outgoing(DRIFT, "k", b"\xff\xffno message"),
            message(found("", 9)),
        ])  # fmt: skip
        await passed(settings, 7)
        assert len(await runs(client)) == 1
        assert decisions(settings) == [
            ("f1", "started"), ("f2", "cooldown"), ("f3", "other_kind"), ("", "no_window"),
        ]  # fmt: skip
    # The cooldown is kept by the store, not by the process.
    async with coordinator(settings) as client:
        await bus.publish([message(found("f5", 6)), message(found("f6", 7)), message(found("f7", 30))])
        await passed(settings, 10)
        assert len(await runs(client)) == 2
        assert decisions(settings)[4:6] == [("f5", "cooldown"), ("f6", "started")]
        assert decisions(settings)[6][1] in {"active", "started"}
    await bus.close()


async def test_changes_of_runs_are_published_in_order(settings) -> None:
    bus = await open_bus(settings.bus)
    async with coordinator(settings) as client:
        await client.register(manifest(stages=[stage("s", "pass")]))
        run = await client.ended((await client.start()).id)
        subscription = await bus.subscribe([TRAINING], group="test", at={TopicPartition(TRAINING): 0})
        seen: list[tuple[bytes, pb.Run]] = []

        async def all_there() -> bool:
            for got in await subscription.fetch(timeout_s=0.1):
                assert got.key == "demo"
                seen.append((got.headers["event-id"], RunChanged.FromString(got.value).run))
            return bool(seen) and seen[-1][1].state == pb.RUN_STATE_SUCCEEDED

        await until(all_there, "the run's end on the bus")
        await subscription.close()
    states = [state.state for _id, state in seen]
    assert states == sorted(states)
    assert states[0] == pb.RUN_STATE_PENDING
    assert pb.RUN_STATE_RUNNING in states
    assert seen[-1][1] == run
    assert [event_id for event_id, _run in seen] == [f"{run.id}:{n}".encode() for n in range(1, len(seen) + 1)]
    await bus.close()
