"""A process that publishes numbered messages one by one and prints each number once it is acknowledged.

Usage: publisher.py SETTINGS_JSON TOPIC NAME COUNT
"""

import asyncio
import sys

from millrace_kit.bus import Outgoing, open_bus
from millrace_kit.settings import BusSettings


async def main() -> None:
    settings = BusSettings.model_validate_json(sys.argv[1])
    topic, name, count = sys.argv[2], sys.argv[3], int(sys.argv[4])
    bus = await open_bus(settings)
    for number in range(count):
        await bus.publish([Outgoing(topic, name, f"{name}:{number}".encode())])
        print(number, flush=True)
    await bus.close()


asyncio.run(main())
