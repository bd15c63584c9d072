"""Two monitors over one Kafka and one PostgreSQL: they share the partitions, and a rebalance neither loses nor counts twice."""

import asyncio
from contextlib import AsyncExitStack

import numpy as np
import pytest
from kafka.admin import KafkaAdminClient
from millrace_api.drift.v1 import drift_pb2
from millrace_api.events.v1 import events_pb2
from millrace_drift_monitor.monitor import GROUP
from millrace_kit.bus import PREDICTIONS, Outgoing, open_bus
from millrace_kit.settings import BusSettings

BATCHES, ROWS = 60, 20


def has_two_members(address: str) -> bool:
    """Whether both monitors are in the group and have partitions."""
    admin = KafkaAdminClient(bootstrap_servers=[address])
    try:
        members = admin.describe_groups([GROUP])[GROUP]["members"]
        owned = [m["member_assignment"]["assigned_partitions"] for m in members if m["member_assignment"]]
        return len([partitions for partitions in owned if partitions]) == 2
    finally:
        admin.close()


@pytest.mark.slow
@pytest.mark.kafka
@pytest.mark.postgres
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
async def test_replicas_come_and_go_under_load(world, helpers, kafka_address) -> None:
    settings = BusSettings(kind="kafka", bootstrap_servers=(kafka_address,), partitions=3)
    x = helpers.draw(np.random.default_rng(1), BATCHES * ROWS)
    made = helpers.predictions(x, helpers.july)
    async with AsyncExitStack() as stack:
        bus = await open_bus(settings)
        stack.push_async_callback(bus.close)
        first = await stack.enter_async_context(world.monitor(bus=settings))

        async def predicted(stub) -> int:
            answer = await stub.GetOutcomes(drift_pb2.GetOutcomesRequest(model="flight-delay"))
            return sum(v.predictions for v in answer.versions)

        async def publish(number: int) -> None:
            batch = events_pb2.PredictionsMade(
                gateway_id=f"g{number % 5}",
                journal_offset=number + 1,
                predictions=made[number * ROWS : (number + 1) * ROWS],
            )
            # Keys spread over the partitions, and some batches come twice.
            message = Outgoing(PREDICTIONS, f"k{number}", batch.SerializeToString())
            await bus.publish([message] * (1 + (number % 7 == 0)))

        async def publish_some(numbers: range) -> None:
            for number in numbers:
                await publish(number)
                await asyncio.sleep(0.02)

        await publish_some(range(15))
        async with world.monitor(bus=settings):
            await helpers.until(lambda: asyncio.to_thread(has_two_members, kafka_address), deadline_s=60)
            await publish_some(range(15, 40))

            async def shared():
                return True if await predicted(first) == 40 * ROWS else None

            await helpers.until(shared, deadline_s=60)
            await publish_some(range(40, 50))
        await publish_some(range(50, BATCHES))

        async def complete():
            return True if await predicted(first) >= BATCHES * ROWS else None

        await helpers.until(complete, deadline_s=60)
        assert await predicted(first) == BATCHES * ROWS
