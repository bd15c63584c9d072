"""Who has which routes in force, and what may still be in use."""

import asyncio

from millrace_rollout_controller.hub import GatewaySeen, Hub, Table
from millrace_rollout_controller.state import Route, RouteArm


def route(version: str, model: str = "m") -> Route:
    arm = RouteArm(version=version, digest="", candidate=False, weight=100, endpoints=(f"{version}:1",))
    return Route(
        model=model, arms=(arm,), sticky_header="", rules=(), timeout_ms=1, feature_service="",
        feature_names=(), input_tensor="", output_tensor="",
    )  # fmt: skip


def hub(gateways: dict[str, GatewaySeen] | None = None, table: Table | None = None) -> Hub:
    return Hub(table or Table(), gateways or {}, forget_s=30, ack_s=60)


def publish(made: Hub, now: float, **routes: Route | None) -> int:
    table = made.next_table(dict(routes), now)
    assert table is not None
    made.publish(table, now)
    return table.generation


def test_nobody_listening_is_settled_and_the_same_routes_are_no_news() -> None:
    made = hub()
    publish(made, 1, m=route("1"))
    assert made.settled("m", 1)
    assert made.next_table({"m": route("1")}, 2) is None
    assert made.in_use(1) == {"1:1"}


def test_settled_when_every_gateway_has_acknowledged() -> None:
    made = hub()
    made.connected("a", 0, 1)
    made.connected("b", 0, 1)
    first = publish(made, 1, m=route("1"))
    made.acknowledged("a", first, 2)
    assert not made.settled("m", 2)
    made.acknowledged("b", first, 2)
    assert made.settled("m", 2)
    second = publish(made, 3, m=route("2"))
    assert second > first
    assert made.in_use(3) == {"1:1", "2:1"}
    made.acknowledged("a", second, 4)
    assert made.in_use(4) == {"1:1", "2:1"}
    made.acknowledged("b", second, 4)
    assert made.in_use(4) == {"2:1"}


def test_another_models_change_unsettles_nobody() -> None:
    made = hub()
    made.connected("a", 0, 1)
    made.acknowledged("a", publish(made, 1, m=route("1")), 1)
    publish(made, 2, other=route("1", "other"))
    assert made.settled("m", 2)
    assert not made.settled("other", 2)


def test_a_gateway_that_went_away_counts_for_a_while_and_one_that_hangs_too() -> None:
    made = hub()
    made.connected("a", 0, 1)
    made.acknowledged("a", publish(made, 1, m=route("1")), 1)
    made.disconnected("a", 10)
    publish(made, 11, m=route("2"))
    assert not made.settled("m", 39)
    assert made.settled("m", 41)
    assert made.in_use(41) == {"2:1"}
    made.connected("b", 0, 100)
    publish(made, 100, m=route("3"))
    assert not made.settled("m", 159)
    assert made.settled("m", 161)


def test_after_a_restart_an_unknown_table_may_use_anything() -> None:
    known = Table(5000, (route("2"),))
    made = hub({"a": GatewaySeen(4000, 10.0)}, known)
    assert made.in_use(11) is None
    made.connected("a", 4000, 12)
    assert made.in_use(12) is None
    made.acknowledged("a", 5000, 13)
    assert made.in_use(13) == {"2:1"}


async def test_waiting_for_news_and_the_end() -> None:
    made = hub()
    waiting = asyncio.create_task(made.newer(0))
    await asyncio.sleep(0)
    generation = publish(made, 1, m=route("1"))
    table = await asyncio.wait_for(waiting, 1)
    assert table is not None
    assert table.generation == generation
    waiting = asyncio.create_task(made.newer(generation))
    await asyncio.sleep(0)
    made.close()
    assert await asyncio.wait_for(waiting, 1) is None


def test_generations_rise_past_a_lost_database() -> None:
    assert publish(hub(), 1_700_000_000, m=route("1")) == 1_700_000_000_000
