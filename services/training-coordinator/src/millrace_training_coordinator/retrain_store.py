"""What became of drift findings, with the bus position and the runs they started, in one transaction per message."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from millrace_kit.bus import TopicPartition
from millrace_kit.errors import MillraceError, ResourceExhaustedError
from millrace_kit.sql import reading, writing
from sqlalchemy import Connection, func, insert, select, update

from millrace_training_coordinator.manifest import Retrain
from millrace_training_coordinator.retrain import Finding, History, Verdict, judge
from millrace_training_coordinator.runs import NewRun, PipelineVersion
from millrace_training_coordinator.schema import POSITION, RETRAIN, RUN
from millrace_training_coordinator.store import UNFINISHED, Store

MakeRun = Callable[[PipelineVersion, Finding], NewRun]


@dataclass(frozen=True, slots=True)
class Decided:
    """One finding's fate for one pipeline."""

    finding: Finding
    pipeline: str
    verdict: Verdict
    reason: str
    run_id: str = ""


class RetrainStore:
    """Decisions and positions beside the runs of `store`."""

    def __init__(self, store: Store, make_run: MakeRun, *, min_interval_s: float) -> None:
        self._store = store
        self._make_run = make_run
        self._min_interval_s = min_interval_s

    def positions(self, topic: str) -> Mapping[TopicPartition, int]:
        """Next offset to read, per partition."""
        with reading(self._store.engine) as connection:
            rows = connection.execute(select(POSITION).where(POSITION.c.topic == topic)).all()
        return {TopicPartition(row.topic, row.partition): row.next_offset for row in rows}

    def take(
        self, place: TopicPartition, next_offset: int, findings: Sequence[Finding], now: datetime
    ) -> Sequence[Decided]:
        """Decide on the findings of one message and pass it; a message or a finding seen before changes nothing."""
        listeners = [(v, v.manifest.retrain) for v in self._store.pipelines()]
        decided: list[Decided] = []
        with writing(self._store.engine) as connection:
            if not self._pass(connection, place, next_offset):
                return []
            for finding in findings:
                for version, policy in listeners:
                    if policy is not None and policy.model == finding.model:
                        decision = self._decide(connection, version, policy, finding, now)
                        decided.extend(decision)
        return decided

    def _pass(self, connection: Connection, place: TopicPartition, next_offset: int) -> bool:
        key = (POSITION.c.topic == place.topic) & (POSITION.c.partition == place.partition)
        row = connection.execute(select(POSITION.c.next_offset).where(key).with_for_update()).first()
        if row is None:
            values = {"topic": place.topic, "partition": place.partition, "next_offset": next_offset}
            connection.execute(insert(POSITION).values(**values))
            return True
        if row.next_offset >= next_offset:
            return False
        connection.execute(update(POSITION).where(key).values(next_offset=next_offset))
        return True

    def _decide(
        self, connection: Connection, version: PipelineVersion, policy: Retrain, finding: Finding, now: datetime
    ) -> Sequence[Decided]:
        same = (RETRAIN.c.finding_id == finding.id) & (RETRAIN.c.pipeline == version.name)
        if connection.execute(select(RETRAIN.c.id).where(same)).first() is not None:
            return []
        history = self._history(connection, version.name)
        verdict, reason = judge(policy, finding, history, now, self._min_interval_s)
        run_id = ""
        if verdict is Verdict.STARTED:
            try:
                run_id = self._store.insert(connection, self._make_run(version, finding)).id
            except ResourceExhaustedError as error:
                verdict, reason = Verdict.QUEUE_FULL, str(error)
            except MillraceError as error:
                verdict, reason = Verdict.UNUSABLE, str(error)
        kept = insert(RETRAIN).values(finding_id=finding.id, pipeline=version.name, verdict=verdict.value)
        connection.execute(kept.values(reason=reason, run_id=run_id, window_end=finding.window_end, decided_at=now))
        return [Decided(finding, version.name, verdict, reason, run_id)]

    def _history(self, connection: Connection, pipeline: str) -> History:
        started = (RETRAIN.c.pipeline == pipeline) & (RETRAIN.c.verdict == Verdict.STARTED.value)
        window_end, started_at = connection.execute(
            select(func.max(RETRAIN.c.window_end), func.max(RETRAIN.c.decided_at)).where(started)
        ).one()
        joined = RETRAIN.join(RUN, RUN.c.id == RETRAIN.c.run_id)
        active = select(RUN.c.id).select_from(joined).where(started & RUN.c.state.in_(UNFINISHED))
        row = connection.execute(active.limit(1)).first()
        return History(window_end, started_at, row.id if row else "")
