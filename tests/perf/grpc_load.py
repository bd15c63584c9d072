"""A closed-loop gRPC load in a process of its own, so that its processor time is nobody else's.

`python -m tests.perf.grpc_load` reads one JSON object from standard input (`target`, `method`, `body_hex`, `metadata`, `concurrency`,
`channels`, `duration_s`) and writes one: `requests`, `errors`, `seconds`, `latencies_ms`.
"""

import asyncio
import json
import sys
import time
from typing import Any

import grpc
import grpc.aio

WARMUP_REQUESTS = 200


async def load(plan: dict[str, Any]) -> dict[str, Any]:
    """Run the plan."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]
    channels = [grpc.aio.insecure_channel(plan["target"], options=options) for _ in range(plan["channels"])]
    calls = [channel.unary_unary(plan["method"]) for channel in channels]
    body = bytes.fromhex(plan["body_hex"])
    metadata = [tuple(pair) for pair in plan["metadata"]]
    latencies: list[float] = []
    errors: list[str] = []

    async def client(number: int, until: float) -> None:
        call = calls[number % len(calls)]
        while (started := time.perf_counter()) < until:
            try:
                await call(body, metadata=metadata, timeout=30)
            except grpc.aio.AioRpcError as error:
                errors.append(f"{error.code().name}: {error.details()}")
                continue
            latencies.append((time.perf_counter() - started) * 1000)

    for number in range(WARMUP_REQUESTS):
        await calls[number % len(calls)](body, metadata=metadata, timeout=30)
    started = time.perf_counter()
    await asyncio.gather(*(client(n, started + plan["duration_s"]) for n in range(plan["concurrency"])))
    seconds = time.perf_counter() - started
    for channel in channels:
        await channel.close()
    return {"requests": len(latencies), "errors": errors[:5], "seconds": seconds, "latencies_ms": latencies}


if __name__ == "__main__":
    json.dump(asyncio.run(load(json.load(sys.stdin))), sys.stdout)
