"""The warm gate: its rule, its place in a rollout, and replaying to servers that get fast only after a while."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from millrace_kit.clock import SystemClock
from millrace_rollout_controller.manifest import Warmup
from millrace_rollout_controller.plans import WarmSeen, WarmServers
from millrace_rollout_controller.probe import sample_request
from millrace_rollout_controller.warm_gate import Window, judge, p99_ms, steady
from millrace_rollout_controller.warming import METHOD, Warmer

from .support import until, version_ref
from .world import World, spec

BLOCK = Warmup(requests=10, windowSeconds=0, maxTrials=5, maxP99Ratio=2.0, timeoutSeconds=30)
REF = version_ref("1.1.0", b"x")
ROLLOUT = """
steps: [{weight: 5}, {weight: 100}]
warmup: {requests: 10, maxTrials: 5, required: REQUIRED}
"""


def window(mean_ms: float, seconds: float = 1.0, failures: int = 0, count: int = 10) -> Window:
    return Window((mean_ms,) * count, seconds, failures, "UNAVAILABLE gone" if failures else "")


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([window(10), window(10)], False),
        ([window(10), window(10), window(10.9)], True),
        ([window(10), window(10), window(11.2)], False),
        ([window(50), window(10), window(10), window(10)], True),
        # Equal latency, but the server answers less and less.
        ([window(10), window(10), window(10, seconds=1.2)], False),
        ([window(10), window(10, failures=1), window(10)], False),
        ([window(10), window(10), Window((), 1.0)], False),
    ],
)
def test_steady_is_three_windows_within_ten_percent(windows: list[Window], expected: bool) -> None:
    assert steady(windows) is expected


def test_p99_is_of_the_last_three_windows() -> None:
    assert p99_ms([window(900), window(1), window(2), window(3, count=80)]) == 3
    assert p99_ms([]) == 0


@pytest.mark.parametrize(
    ("mine", "theirs", "verdict", "words"),
    [
        ([window(10)] * 2, [window(10)] * 2, "undecided", "not steady after 2 of at most 5"),
        ([window(10)] * 3, [window(10)] * 3, "pass", "stable's 10.00 ms"),
        ([window(21)] * 3, [window(10)] * 3, "undecided", "at most 2 times"),
        ([window(21)] * 5, [window(10)] * 5, "fail", "at most 2 times"),
        # Tenfold, and still less than what a busy client adds.
        ([window(1.0)] * 3, [window(0.1)] * 3, "pass", "steady"),
        ([window(10)] * 3, [], "pass", "no server to compare with"),
        ([window(float(10 + 9 * (i % 2))) for i in range(5)], [window(10)] * 5, "undecided", "not steady"),
        # The machine's noise slows both alike.
        ([window(10), window(20), window(12)], [window(9), window(18), window(11)], "pass", "steady beside stable"),
        ([window(40), window(20), window(10)], [window(10)] * 3, "undecided", "stable's 10.00, 10.00, 10.00 ms"),
        ([window(10), window(10, failures=3)], [window(10)] * 2, "undecided", "3 of 13 replayed requests failed"),
        ([window(10, failures=3)] * 5, [window(10)] * 5, "fail", "UNAVAILABLE gone"),
    ],
)
def test_verdicts(mine: list[Window], theirs: list[Window], verdict: str, words: str) -> None:
    found, evidence = judge(mine, theirs, BLOCK)
    assert found == verdict, evidence
    assert words in evidence


def waiting(required: str = "Always") -> World:
    """1.1.0 has its servers and waits for the gate."""
    rollout = ROLLOUT.replace("REQUIRED", required)
    world = World(spec("1.0.0", rollout)).served()
    world.apply(spec("1.1.0", rollout))
    for _ in range(10):
        world.tick()
    assert world.status.phase == "Preparing"
    return world


def asked(world: World) -> list[WarmServers]:
    return [action for action in world.actions if isinstance(action, WarmServers)]


def test_no_weight_before_the_gate_has_passed() -> None:
    world = waiting()
    (action,) = asked(world)
    assert action.endpoints == ("1.1.0:0", "1.1.0:1")
    assert action.stable_endpoints == ("1.0.0:0", "1.0.0:1")
    assert world.published is not None
    assert world.published.weight("1.1.0") == 0
    world.warm = WarmSeen(world.status.trial, "undecided", "half way", 20)
    assert "half way" in world.tick().waiting
    # A verdict about the candidate before says nothing about this one.
    world.warm = WarmSeen(world.status.trial - 1, "pass", "old", 20)
    assert world.tick().phase == "Preparing"
    world.warm = WarmSeen(world.status.trial, "pass", "steady", 60)
    assert world.tick().phase == "Progressing"
    assert world.status.verdicts[0].gate == "warmup"
    assert world.status.verdicts[0].candidate_samples == 60
    world.warm = None
    assert world.until("Promoted").stable is not None
    assert not asked(world)


def test_a_candidate_that_does_not_get_warm_ends_its_trial() -> None:
    world = waiting()
    world.warm = WarmSeen(world.status.trial, "fail", "p99 900 ms", 60)
    world.tick()
    assert world.status.failed is not None
    assert world.status.failed.reason == "WarmupFailed"
    assert "p99 900 ms" in world.status.failed.message
    assert world.until("RolledBack").stable.ref.version == "1.0.0"


def test_one_that_is_not_required_is_only_said() -> None:
    world = waiting("Never")
    world.warm = WarmSeen(world.status.trial, "fail", "p99 900 ms", 60)
    assert world.tick().phase == "Progressing"
    assert "NotWarm" in [event.reason for event in world.status.events]


def test_what_is_not_steady_waits_for_a_person_or_is_only_said() -> None:
    world = waiting()
    world.warm = WarmSeen(world.status.trial, "undecided", "latency is not steady", 60, over=True)
    for _ in range(5):
        status = world.tick()
    assert (status.phase, status.failed, status.entered) == ("Paused", None, False)
    assert "resume goes on" in status.waiting
    assert world.act("resume") is None
    assert world.until("Progressing").warmup.verdict == "undecided"

    world = waiting("Never")
    world.warm = WarmSeen(world.status.trial, "undecided", "latency is not steady", 60, over=True)
    assert world.tick().phase == "Progressing"

    # While it is still measured nobody can skip it.
    world = waiting()
    world.warm = WarmSeen(world.status.trial, "undecided", "half way", 20)
    world.tick()
    assert world.act("resume") is None
    assert not world.tick().entered


def test_whoever_goes_back_does_not_wait() -> None:
    world = waiting()
    world.warm = WarmSeen(world.status.trial, "pass", "steady", 60)
    world.until("Promoted")
    for _ in range(10):
        world.tick()
    world.warm = None
    assert world.act("undo") is None
    assert world.until("Promoted").stable.ref.version == "1.0.0"


class Samples:
    def __init__(self, *bodies: bytes) -> None:
        self.bodies = list(bodies)

    async def samples(self, model: str, limit: int) -> list[bytes]:
        assert model == REF.model
        return self.bodies[:limit]


class Server:
    """Answers after `delay_s(number of requests so far)`; keeps what it was asked."""

    def __init__(self, delay_s: Callable[[int], float]) -> None:
        self.delay_s = delay_s
        self.seen: list[bytes] = []
        self.fail = False

    async def infer(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        self.seen.append(request)
        await asyncio.sleep(self.delay_s(len(self.seen)))
        if self.fail:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such input")
        return b""


@asynccontextmanager
async def serving(*servers: Server) -> AsyncIterator[list[str]]:
    started, addresses = [], []
    for one in servers:
        service, _, method = METHOD.removeprefix("/").partition("/")
        made = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(one.infer)
        made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        addresses.append(f"127.0.0.1:{made.add_insecure_port('127.0.0.1:0')}")
        await made.start()
        started.append(made)
    try:
        yield addresses
    finally:
        await asyncio.gather(*(made.stop(0) for made in started))


async def verdict(source: Samples, candidates: list[str], stable: list[str], block: Warmup) -> WarmSeen:
    warmer = Warmer(source, SystemClock())
    wanted = {"flights": WarmServers(REF, 3, tuple(candidates), tuple(stable), block)}
    try:

        def decided() -> WarmSeen | None:
            warmer.converge(wanted)
            seen = warmer.seen("flights")
            return seen if seen is not None and (seen.verdict != "undecided" or seen.over) else None

        found = await until(decided, what="a verdict")
        assert isinstance(found, WarmSeen)
        return found
    finally:
        warmer.close()
        assert warmer.seen("flights") is None


# 20 ms: what this machine adds is far less than a tenth of it.
STEADY_S = 0.02


async def test_servers_that_get_fast_pass_after_having_been_asked_what_stable_was_asked() -> None:
    # The first of them is twice as fast in each of its first windows: 160, 80, 40, 20 ms.
    cold = Server(lambda count: max(0.16 / 2 ** ((count - 1) // 10), STEADY_S))
    warm, stable = Server(lambda _: STEADY_S), Server(lambda _: STEADY_S)
    bodies = [sample_request(REF).SerializeToString(), b"\x0a\x01b"]
    block = Warmup(requests=10, windowSeconds=0, maxTrials=30, maxP99Ratio=3.0, timeoutSeconds=30)
    async with serving(cold, warm, stable) as (one, two, three):
        found = await verdict(Samples(*bodies), [one, two], [three], block)
    assert found.verdict == "pass", found.evidence
    assert "2 logged requests" in found.evidence
    assert len(cold.seen) >= 60
    assert len(warm.seen) >= 30
    assert found.requests == len(cold.seen) + len(warm.seen) == len(stable.seen)
    assert {*cold.seen} == {*stable.seen} == {*bodies}


async def test_windows_last_their_time_at_a_bounded_rate() -> None:
    slow, fast = Server(lambda _: 0.0), Server(lambda _: 0.0)
    block = Warmup(requests=10, windowSeconds=0.5, maxRate=40, maxTrials=3, maxP99Ratio=100, timeoutSeconds=30)
    began = asyncio.get_running_loop().time()
    async with serving(slow, fast) as (one, two):
        found = await verdict(Samples(), [one], [two], block)
    took = asyncio.get_running_loop().time() - began
    assert took >= 1.5
    assert len(slow.seen) == len(fast.seen) == found.requests
    assert 30 <= found.requests <= 40 * took + 3


async def test_a_version_far_slower_than_stable_fails() -> None:
    async with serving(Server(lambda _: 5 * STEADY_S), Server(lambda _: STEADY_S)) as (one, two):
        found = await verdict(Samples(), [one], [two], BLOCK)
    assert found.verdict == "fail"
    assert "at most 2 times" in found.evidence
    assert "zeros by the signature" in found.evidence


async def test_a_version_that_refuses_what_stable_answered_fails() -> None:
    broken = Server(lambda _: 0.0)
    broken.fail = True
    async with serving(broken, Server(lambda _: 0.0)) as (one, two):
        found = await verdict(Samples(b"x"), [one], [two], BLOCK)
    assert found.verdict == "fail"
    assert "10 of 10 replayed requests failed (INVALID_ARGUMENT no such input)" in found.evidence


async def test_time_is_limited() -> None:
    async with serving(Server(lambda _: 0.5)) as (one,):
        block = Warmup(requests=10, maxTrials=100, timeoutSeconds=1)
        found = await verdict(Samples(), [one], [], block)
    assert found.verdict == "fail"
    assert "not warm within 1 s" in found.evidence
