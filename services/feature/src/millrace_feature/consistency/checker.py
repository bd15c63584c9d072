"""The two background tasks: samples go from memory into SQL, and once they have settled they are compared with the lake."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from millrace_kit.clock import Clock
from millrace_kit.errors import FailedPreconditionError, NotFoundError, UnavailableError

from millrace_feature.consistency.comparison import KINDS, compare, in_windows
from millrace_feature.consistency.log import ConsistencyLog, Finding, Logged, Rates
from millrace_feature.consistency.metrics import CHECK_LAG, ERROR, PAIRS, SAMPLES, VALUES, WAITING
from millrace_feature.consistency.samples import Sampler
from millrace_feature.lake import NO_TABLE, Lake
from millrace_feature.plan import Definitions, LatestView, ServicePlan, ValueType
from millrace_feature.settings import ConsistencySettings
from millrace_feature.tiles import Floats
from millrace_feature.training import carried_names, features_at
from millrace_feature.vector_fields import element_names
from millrace_feature.worker import to_us

log = logging.getLogger(__name__)

LOG_EVERY_S = 1.0
LOG_ROWS = 2_000
"""Samples of one insert."""
LEASE_US = 600_000_000
"""How long a replica has for one check before another one may do it."""
FORGET_EVERY_US = 3_600_000_000

ARROW: Mapping[ValueType, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "double": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", "UTC"),
}


class Checker:
    """Compares what was served with what the lake says.

    Args:
        sampler: where answers come from.
        kept: where they wait and what comes of them.
        lake: the truth.
        definitions_of: definitions by their hash; raises NotFoundError.
        settings: rates, limits, waits.
        clock: wall clock.
    """

    def __init__(
        self,
        *,
        sampler: Sampler,
        kept: ConsistencyLog,
        lake: Lake,
        definitions_of: Callable[[str], Definitions],
        settings: ConsistencySettings,
        clock: Clock,
    ) -> None:
        self._sampler = sampler
        self._kept = kept
        self._lake = lake
        self._definitions_of = definitions_of
        self._settings = settings
        self._clock = clock
        self._next_forget_us = 0

    async def log_samples(self, stop: asyncio.Event) -> None:
        """Move samples out of memory until `stop` is set, and then what is left."""
        while not stop.is_set():
            await asyncio.to_thread(self.log_waiting)
            await _pause(stop, LOG_EVERY_S)
        await asyncio.to_thread(self.log_waiting)

    def log_waiting(self) -> None:
        """Move what waits in memory."""
        while samples := self._sampler.waiting(LOG_ROWS):
            added = self._kept.add(samples, max_waiting=self._settings.max_waiting)
            self._sampler.forget(len(samples))
            SAMPLES.labels("logged").inc(added)
            SAMPLES.labels("dropped").inc(len(samples) - added)

    async def check_settled(self, stop: asyncio.Event) -> None:
        """Check what has settled, every `check_every_s`, until `stop` is set."""
        while not stop.is_set():
            while await asyncio.to_thread(self.check) and not stop.is_set():
                pass
            await _pause(stop, self._settings.check_every_s)

    def check(self) -> bool:
        """Check the oldest samples that have settled; returns whether more may wait.

        Raises:
            UnavailableError: the lake or the database does not answer; the samples are checked later.
        """
        now_us = to_us(self._clock.now())
        before_us = now_us - round(self._settings.settle_s * 1_000_000)
        limit = self._settings.max_check_rows
        claimed = self._kept.claim(before_us=before_us, now_us=now_us, lease_us=LEASE_US, limit=limit)
        groups: dict[tuple[str, str], list[Logged]] = {}
        for one in claimed:
            groups.setdefault((one.sample.digest, one.sample.feature_service), []).append(one)
        for (digest, name), rows in groups.items():
            self._check(digest, name, rows)
        waiting, oldest_us = self._kept.waiting()
        WAITING.set(waiting)
        CHECK_LAG.set(0.0 if oldest_us is None else max(0, before_us - oldest_us) / 1e6)
        if now_us >= self._next_forget_us:
            self._next_forget_us = now_us + FORGET_EVERY_US
            self._kept.forget(now_us - self._settings.keep_s * 1_000_000)
        return len(claimed) == limit

    def _check(self, digest: str, name: str, rows: Sequence[Logged]) -> None:
        ids = [row.id for row in rows]
        try:
            rates, findings = self._compare(digest, name, rows)
        except UnavailableError:
            raise
        except Exception as error:
            # Definitions, a table or a column may be gone, and a user's transform may raise anything: reads must go on.
            log.warning("%d answers of %s cannot be checked: %r", len(rows), name, error)
            if self._kept.finish(ids, (), (), max_findings=0):
                SAMPLES.labels("unchecked").inc(len(rows))
            return
        if self._kept.finish(ids, rates, findings, max_findings=self._settings.max_findings):
            SAMPLES.labels("checked").inc(len(rows))
            _export(rates)

    def _compare(self, digest: str, name: str, rows: Sequence[Logged]) -> tuple[list[Rates], list[Finding]]:
        definitions = self._definitions_of(digest)
        plan = definitions.service(name)
        if plan is None:
            raise NotFoundError("feature service", name)
        versions = self._versions(plan, definitions)
        expected = features_at(self._lake, plan, definitions, _entities(plan, definitions, rows), versions)
        return self._compared(plan, columns_by_feature(plan, definitions), rows, expected, versions)

    def _versions(self, plan: ServicePlan, definitions: Definitions) -> dict[str, int]:
        contracts = sorted({definitions.view(use.view).contract for use in plan.uses})
        versions = {contract: self._lake.newest_version(contract) for contract in contracts}
        for contract, version in versions.items():
            if version == NO_TABLE:
                raise FailedPreconditionError(
                    "TABLE_MISSING", f"table {contract!r} does not exist yet", {"table": contract}
                )
        return versions

    def _compared(
        self,
        plan: ServicePlan,
        features: Mapping[str, Sequence[int]],
        rows: Sequence[Logged],
        expected: Mapping[str, Floats],
        versions: Mapping[str, int],
    ) -> tuple[list[Rates], list[Finding]]:
        served = np.array([row.sample.values for row in rows], np.float64)
        carried = carried_names(plan)
        width_us = self._settings.window_s * 1_000_000
        rates: list[Rates] = []
        findings: list[Finding] = []
        for window_us, places in in_windows([row.sample.served_us for row in rows], width_us):
            for feature, columns in features.items():
                mine = served[places][:, list(columns)].ravel()
                theirs = np.stack([expected[plan.features[column]][places] for column in columns], axis=1).ravel()
                tally = compare(mine, theirs, tolerance=self._settings.tolerance)
                digest = rows[0].sample.digest
                rates.append(Rates(window_us, width_us, digest, plan.name, feature, tally))
                for kind in KINDS:
                    for i in tally.places[kind][: self._settings.max_findings]:
                        sample = rows[int(places[i // len(columns)])].sample
                        findings.append(
                            Finding(
                                window_us=window_us,
                                digest=digest,
                                feature_service=plan.name,
                                feature=plan.features[columns[i % len(columns)]],
                                kind=kind,
                                entity=dict(zip(carried, sample.entity, strict=True)),
                                asked_us=sample.asked_us,
                                served_us=sample.served_us,
                                expected=_known(theirs[i]),
                                served=_known(mine[i]),
                                versions=versions,
                            )
                        )
        return rates, findings


def columns_by_feature(plan: ServicePlan, definitions: Definitions) -> dict[str, list[int]]:
    """Columns of the vector by what rates are kept for: a feature, or an embedding with all its numbers."""
    whole: dict[str, str] = {}
    for use in plan.uses:
        view = definitions.view(use.view)
        for field in view.vectors if isinstance(view, LatestView) else ():
            name = f"{use.alias}__{field.feature}"
            whole.update(dict.fromkeys(element_names(name, field), name))
    found: dict[str, list[int]] = {}
    for column, feature in enumerate(plan.features):
        found.setdefault(whole.get(feature, feature), []).append(column)
    return found


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _entities(plan: ServicePlan, definitions: Definitions, rows: Sequence[Logged]) -> pa.Table:
    """The samples as `features_at` takes them."""
    kinds: dict[str, ValueType] = {**dict(plan.request_fields), **dict(definitions.key_types)}
    columns = {"at_us": pa.array([row.sample.asked_us for row in rows], pa.int64())}
    for i, name in enumerate(carried_names(plan)):
        values = [row.sample.entity[i] for row in rows]
        columns[f"in{i}"] = pa.array(values, ARROW[kinds[name]])
    return pa.table(columns)


def _export(rates: Sequence[Rates]) -> None:
    for one in rates:
        labels, tally = (one.feature_service, one.feature), one.tally
        wrong = tally.mismatched + tally.missing + tally.extra
        VALUES.labels(*labels, "equal").inc(tally.compared - wrong)
        VALUES.labels(*labels, "mismatch").inc(tally.mismatched)
        VALUES.labels(*labels, "missing").inc(tally.missing)
        VALUES.labels(*labels, "extra").inc(tally.extra)
        PAIRS.labels(*labels).inc(tally.pairs)
        ERROR.labels(*labels).inc(tally.error)


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()
