"""The loop: look, decide, write down, do. Stopping it anywhere and starting it again changes nothing but the time.

What is decided is stored before it is done, and everything done is safe to do again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from millrace_kit.clock import Clock
from millrace_kit.errors import ConflictError, UnavailableError

from millrace_rollout_controller import manifest, metrics
from millrace_rollout_controller.archive import Archive
from millrace_rollout_controller.evidence import Evidence, Poll, advance
from millrace_rollout_controller.executor import Executor, Wanted
from millrace_rollout_controller.goals import compared, tracked_values
from millrace_rollout_controller.hub import Hub
from millrace_rollout_controller.idleness import look, whole
from millrace_rollout_controller.peers import Figures, Registry
from millrace_rollout_controller.pool_look import Place, Pooled, PoolWatch, note
from millrace_rollout_controller.pooling import PoolOrders
from millrace_rollout_controller.prometheus import Prometheus
from millrace_rollout_controller.queries import queries
from millrace_rollout_controller.reconciler import (
    Action,
    ArmSeen,
    Forget,
    Item,
    Limits,
    Observed,
    Refusal,
    RunServers,
    SetRoute,
    WarmServers,
    reconcile,
)
from millrace_rollout_controller.server_figures import ServerFigures, counted_by_servers, sources
from millrace_rollout_controller.sleeping import idle_after
from millrace_rollout_controller.stages import split_in_force
from millrace_rollout_controller.state import Route, Status, VersionRef
from millrace_rollout_controller.store import Row, Store
from millrace_rollout_controller.warming import Warmer

log = logging.getLogger(__name__)
EVIDENCE_SAVE_S = 30.0
"""How often marks are stored while no candidate is on trial."""
UNAVAILABLE_PAUSE_S = 1.0
"""Wait before the next look while the storage does not answer."""


@dataclass
class _Known:
    """What this process remembers about one deployment between looks."""

    spec: manifest.Spec
    manifest_text: str
    evidence: Evidence
    actions: tuple[Action, ...] | None = None
    saved_at: float = 0.0
    at_rest: object = None
    """What the last look depended on, if it moved nothing and time alone moves nothing: the same again needs no look."""


@dataclass
class _Plan:
    """What one look at everything wants done."""

    routes: dict[str, Route | None] = field(default_factory=dict)
    wanted: list[Wanted] = field(default_factory=list)
    warm: dict[str, WarmServers] = field(default_factory=dict)
    forget: list[str] = field(default_factory=list)
    complete: bool = True
    """False when a deployment could not be looked at and it is not known what it wants; then nothing is stopped."""


class Controller:
    """Reconciles every deployment. `run` and `poll` are the service's background workers."""

    def __init__(
        self,
        *,
        store: Store,
        hub: Hub,
        executor: Executor,
        registry: Registry,
        figures: Figures,
        clock: Clock,
        limits: Limits,
        tick_s: float,
        poll_s: float,
        trial_save_s: float = 0.0,
        prometheus: Prometheus | None = None,
        namespace: str = "",
        warmer: Warmer | None = None,
        server_figures: ServerFigures | None = None,
    ) -> None:
        self._server_figures = server_figures
        self._servers: dict[str, dict[str, tuple[str, ...]]] = {}
        """Of models that their servers count: endpoints by version."""
        self._warmer = warmer
        self._trial_save_s = trial_save_s
        self._archive = Archive(registry.put, clock)
        self._store = store
        self._hub = hub
        self._executor = executor
        self._registry = registry
        self._figures = figures
        self._clock = clock
        self._limits = limits
        self._prometheus = prometheus
        self._namespace = namespace
        self._queries: dict[str, dict[int, str]] = {}
        self._answers: dict[str, float | None] = {}
        self._asking: asyncio.Task[None] | None = None
        self._tick_s = tick_s
        self._poll_s = poll_s
        self._known: dict[tuple[str, str], _Known] = {}
        self._models: list[str] = []
        self._polls: dict[str, Poll] = {}
        self._versions: dict[tuple[str, str], VersionRef | Refusal] = {}
        self._lookups: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._saved_gateways: object = None
        self._pools = PoolWatch()
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the service is stopping; watches end then."""
        return self._closed

    def place(self, name: str) -> Place | None:
        """Where a deployment is in its pool; None for one that is in none."""
        return self._pools.looked.places.get(name)

    def wake(self) -> None:
        """Look again soon: something was applied."""
        self._wake.set()

    async def news(self, timeout_s: float) -> None:
        """Wait until some status may have changed, at most `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), timeout_s)

    async def run(self, stop: asyncio.Event) -> None:
        """Look again and again until `stop`."""
        await self._executor.start()
        ended = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                self._wake.clear()
                began = self._clock.monotonic()
                changed = await self._try_tick()
                metrics.TICK_SECONDS.set(self._clock.monotonic() - began)
                # What moved may move on at once.
                pause = self._tick_s / 5 if changed else self._tick_s
                woken = asyncio.create_task(self._wake.wait())
                await asyncio.wait({ended, woken}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                woken.cancel()
        finally:
            ended.cancel()
            # Streams would hold the server's drain up to its very end.
            self._closed = True
            self._hub.close()
            self._news.set()
            for task in self._lookups.values():
                task.cancel()
            if self._asking is not None:
                self._asking.cancel()
            self._archive.close()
            if self._warmer is not None:
                self._warmer.close()

    async def _try_tick(self) -> bool:
        """One look; while the storage does not answer everything stays as it is, and gateways keep their routes."""
        try:
            return await self.tick()
        except (UnavailableError, ConflictError) as error:
            log.warning("nothing can be decided now: %s", error.message)
            await asyncio.sleep(UNAVAILABLE_PAUSE_S)
            return False

    async def poll(self, stop: asyncio.Event) -> None:
        """Ask for figures and outcomes until `stop`; the next look takes what came."""
        while not stop.is_set():
            # On its own: a slow Prometheus delays no other evidence.
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
            if self._models:
                self._polls = await self._counted(list(self._models))
                self._wake.set()
            next_at = self._clock.monotonic() + self._poll_s
            while not stop.is_set() and (models := await self._pools.pause(stop, next_at, self._clock)):
                self._polls |= await self._counted(models)
                self._wake.set()

    async def _counted(self, models: list[str]) -> dict[str, Poll]:
        if self._server_figures is None:
            return await self._figures.poll(models)
        polls, found = await asyncio.gather(self._figures.poll(models), self._server_figures.poll(dict(self._servers)))
        return {
            model: counted_by_servers(poll, found[model]) if model in found else poll for model, poll in polls.items()
        }

    def _note_servers(self, model: str, spec: manifest.Spec, status: Status) -> None:
        if spec.rollout.counted_by != "Servers":
            self._servers.pop(model, None)
            return
        arms = [arm for arm in (status.stable, status.candidate) if arm is not None]
        self._servers[model] = {arm.ref.version: arm.endpoints for arm in arms}

    def _warm_up_may_count(self, spec: manifest.Spec, status: Status, now: datetime) -> bool:
        """Servers count the requests that warmed them too: the marks have to pass those before the first weight's own count."""
        if spec.rollout.counted_by != "Servers" or status.step > 0:
            return False
        return status.step_since is None or now - status.step_since < timedelta(seconds=2 * self._poll_s)

    async def _ask(self) -> None:
        if self._prometheus is None:
            return
        wanted = {query for queries_ in self._queries.values() for query in queries_.values()}
        if found := await self._prometheus.answers(wanted):
            self._answers |= found
            self._wake.set()

    async def tick(self) -> bool:
        """Look at everything once; returns whether a status changed."""
        rows = await asyncio.to_thread(self._store.rows)
        self._models = [row.model for row in rows]
        self._servers = {model: servers for model, servers in self._servers.items() if model in self._models}
        polls, self._polls = self._polls, {}
        answers, self._answers = self._answers, {}
        seen = _by_deployment(self._executor.seen())
        published = {route.model: route for route in self._hub.table.routes}
        self._pools.look(self._pooled(rows, seen), self._executor.pools(), self._clock.now())
        plan, changed = _Plan(), False
        names = {(row.name, row.created_at.isoformat()) for row in rows}
        self._queries = {name: asked for name, asked in self._queries.items() if name in {row.name for row in rows}}
        self._known = {name: known for name, known in self._known.items() if name in names}
        for row in rows:
            known = self._remember(row)
            try:
                arms, route = seen.get(row.name, {}), published.get(row.model)
                observed = self._observe(row, known.spec, arms, route)
                if (
                    row.model not in polls
                    and known.at_rest is not None
                    and known.at_rest == _rest(row, known, observed)
                ):
                    continue
                changed |= await self._look(
                    row, known, replace(polls.get(row.model, Poll()), answers=answers), observed
                )
            except ConflictError:
                # Somebody changed it meanwhile: look again right away, and go on as before until then.
                changed = True
            except UnavailableError as error:
                log.warning("%s is not decided on now: %s", row.name, error.message)
            except Exception:
                metrics.TICK_FAILURES.labels(row.name).inc()
                log.exception("deployment %s", row.name)
            finally:
                self._add(plan, row, known)
        await self._do(plan, {row.model for row in rows})
        if changed:
            self._news.set()
            self._news = asyncio.Event()
        return changed

    def _pooled(self, rows: Sequence[Row], seen: Mapping[str, Mapping[str, ArmSeen]]) -> list[Pooled]:
        known = [(row, self._known_of(row)) for row in rows]
        return [
            Pooled(row.name, one.spec, row.status, one.evidence.quiet, seen.get(row.name, {}))
            for row, one in known
            if one.spec.server.pool is not None and not row.deleting
        ]

    def _remember(self, row: Row) -> _Known:
        known = self._known_of(row)
        self._figures.track(row.model, tracked_values(known.spec.rollout))
        return known

    def _known_of(self, row: Row) -> _Known:
        name = row.name, row.created_at.isoformat()
        known = self._known.get(name)
        if known is None:
            known = _Known(manifest.parse(row.manifest).spec, row.manifest, row.evidence)
            self._known[name] = known
        elif known.manifest_text != row.manifest:
            known.spec, known.manifest_text = manifest.parse(row.manifest).spec, row.manifest
        return known

    async def _look(self, row: Row, known: _Known, poll: Poll, observed: Observed) -> bool:
        now, status = self._clock.now(), row.status
        self._note_servers(row.model, known.spec, status)
        on_trial = status.candidate is not None and status.entered
        counts = on_trial and not self._warm_up_may_count(known.spec, status, now)
        asked = self._asked(row.model, known.spec, status) if on_trial else {}
        self._queries[row.name] = asked
        evidence = advance(
            known.evidence,
            poll,
            trial=status.trial,
            step=status.step,
            candidate=status.candidate.ref.version if status.candidate is not None and counts else "",
            stable=status.stable.ref.version if status.stable is not None else "",
            wanted=known.spec.rollout.gates,
            gateways=[*self._figures.addresses, *sources(self._servers.get(row.model, {}))],
            compared=compared(known.spec),
            answers={index: poll.answers[query] for index, query in asked.items() if query in poll.answers},
            now=now,
            split=split_in_force(known.spec, status),
        )
        item = Item(row.name, known.spec, row.generation, row.deleting)
        evidence, heard_all = self._quieter(known.spec, status, evidence, poll, now)
        after, actions = reconcile(item, status, observed, evidence, now, limits=self._limits, heard_all=heard_all)
        after.unsent = self._archive.left(after.unsent)
        monotonic = self._clock.monotonic()
        stale = monotonic - known.saved_at >= (self._trial_save_s if on_trial else EVIDENCE_SAVE_S)
        changed = after != status
        if changed or (stale and evidence != known.evidence):
            values = {name: getattr(row, name) for name in Row.__slots__} | {"status": after, "evidence": evidence}
            await asyncio.to_thread(self._store.update, Row(**values))
            known.saved_at = monotonic
        known.evidence, known.actions = evidence, actions
        known.at_rest = None if changed else _rest(row, known, observed)
        if changed:
            _show(row.name, status, after)
            note(known.spec, status, after, now)
        return changed

    def _quieter(
        self, spec: manifest.Spec, status: Status, evidence: Evidence, poll: Poll, now: datetime
    ) -> tuple[Evidence, bool]:
        """The evidence with how long versions have been quiet, and whether every gateway had its say in this poll."""
        if (idle_after(spec) is None and spec.server.pool is None) or not poll.activity:
            return evidence, False
        arms = [arm for arm in (status.stable, status.candidate) if arm is not None]
        gateways = self._figures.addresses
        quiet = look(evidence.quiet, poll.activity, gateways, [arm.ref.version for arm in arms], now)
        return evidence.model_copy(update={"quiet": quiet}), whole(poll.activity, gateways)

    def _asked(self, model: str, spec: manifest.Spec, status: Status) -> dict[int, str]:
        subject = {
            "model": model,
            "candidate": status.candidate.ref.version if status.candidate is not None else "",
            "stable": status.stable.ref.version if status.stable is not None else "",
            "namespace": self._namespace,
        }
        return queries(spec.rollout.gates, subject)

    def _observe(self, row: Row, spec: manifest.Spec, arms: Mapping[str, ArmSeen], published: Route | None) -> Observed:
        status = row.status
        wanted = {spec.version} if not row.deleting else set()
        wanted -= {arm.ref.version for arm in (status.stable, status.candidate) if arm is not None}
        if status.failed is not None and status.observed_generation == row.generation:
            wanted = set()
        versions: dict[str, VersionRef | Refusal] = {}
        for version in wanted:
            name = row.model, version
            if name in self._versions:
                versions[version] = self._versions.pop(name)
            elif name not in self._lookups:
                self._lookups[name] = asyncio.create_task(self._look_up(name))
        settled = published == status.route and self._hub.settled(row.model, self._clock.now().timestamp())
        warmup = self._warmer.seen(row.name) if self._warmer is not None else None
        orders = self._pools.looked.orders.get(row.name, PoolOrders())
        return Observed(versions, arms, settled, warmup, orders)

    async def _look_up(self, name: tuple[str, str]) -> None:
        try:
            found = await self._registry.version(*name)
            if found is not None:
                self._versions[name] = found
                self._wake.set()
            else:
                await asyncio.sleep(self._poll_s)
        finally:
            self._lookups.pop(name, None)

    def _add(self, plan: _Plan, row: Row, known: _Known) -> None:
        if known.actions is None:
            plan.complete = False
            return
        for action in known.actions:
            match action:
                case SetRoute(model=model, route=route):
                    plan.routes[model] = route
                case RunServers(ref=ref, replicas=replicas):
                    plan.wanted.append(Wanted(row.name, ref, replicas, known.spec.server))
                case WarmServers():
                    plan.warm[row.name] = action
                case Forget(name=name):
                    plan.forget.append(name)

    async def _do(self, plan: _Plan, models: set[str]) -> None:
        now = self._clock.now().timestamp()
        if plan.complete:
            plan.routes |= {route.model: None for route in self._hub.table.routes if route.model not in models}
        table = self._hub.next_table(plan.routes, now)
        if table is not None:
            await asyncio.to_thread(self._store.save_routes, table)
            self._hub.publish(table, now)
            metrics.GENERATION.set(table.generation)
            log.info("routes %d: %s", table.generation, _words(table.routes))
        gateways = {name: (seen.applied, seen.streams) for name, seen in self._hub.gateways.items()}
        if gateways != self._saved_gateways:
            await asyncio.to_thread(self._store.save_gateways, dict(self._hub.gateways))
            self._saved_gateways = gateways
        metrics.GATEWAYS.set(self._hub.alive(now))
        if plan.complete:
            await self._executor.converge(plan.wanted, self._hub.in_use(now))
        if self._warmer is not None and plan.complete:
            self._warmer.converge(plan.warm)
        for name in plan.forget:
            await asyncio.to_thread(self._store.delete, name)
            log.info("deployment %s is gone", name)


def _by_deployment(seen: Mapping[tuple[str, str], ArmSeen]) -> dict[str, dict[str, ArmSeen]]:
    found: dict[str, dict[str, ArmSeen]] = {}
    for (deployment, version), arm in seen.items():
        found.setdefault(deployment, {})[version] = arm
    return found


def _rest(row: Row, known: _Known, observed: Observed) -> object:
    """What a look at a deployment at rest depends on; None where time alone may move it."""
    status = row.status
    moves = (
        status.candidate is not None
        or status.retiring
        or status.unready_since is not None
        or row.deleting
        or status.unsent
        or (status.stable is not None and status.stable.sleep is not None and not status.stable.sleep.stopped)
    )
    return None if moves or known.actions is None else (row.generation, known.manifest_text, status, observed)


def _words(routes: tuple[Route, ...]) -> str:
    parts = [
        f"{route.model} " + ", ".join(f"{arm.version} {arm.weight:g} % on {len(arm.endpoints)}" for arm in route.arms)
        for route in routes
    ]
    return "; ".join(parts) or "none"


def _woken(before: Status, after: Status) -> float | None:
    """Seconds that the stable version's wake took, if it just ended."""
    if before.stable is None or after.stable is None or before.stable.sleep is None or after.stable.sleep is not None:
        return None
    began, awake = before.stable.sleep.waking_since, after.stable.awake_since
    return (awake - began).total_seconds() if began is not None and awake is not None else None


def _show(name: str, before: Status, after: Status) -> None:
    """Metrics and log lines of a change."""
    for event in after.events:
        if event not in before.events:
            level = logging.INFO if event.type == "Normal" else logging.WARNING
            log.log(level, "%s: %s: %s", name, event.reason, event.message)
    was = {view.gate: view.verdict for view in before.gates}
    for view in after.gates:
        if was.get(view.gate) != view.verdict:
            metrics.VERDICTS.labels(name, view.gate, view.verdict).inc()
    for one in (after.stable, after.candidate):
        if one is not None and (one.sleep is not None or one.awake_since is not None):
            metrics.ASLEEP.labels(name, one.ref.version).set(one.sleep is not None and one.sleep.stopped)
    if (waking := _woken(before, after)) is not None:
        metrics.WAKE_SECONDS.labels(name).observe(waking)
    metrics.PHASE.labels(name, before.phase).set(0)
    metrics.PHASE.labels(name, after.phase).set(1)
    for route, weights in ((before.route, False), (after.route, True)):
        for arm in route.arms if route else ():
            metrics.WEIGHT.labels(name, arm.version).set(arm.weight if weights else 0.0)
            metrics.SERVERS_READY.labels(name, arm.version).set(len(arm.endpoints) if weights else 0)
