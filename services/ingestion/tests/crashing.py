"""A real ingestion process that kills itself (SIGKILL) when it has done a step for the n-th time.

Run as `python crashing.py <config> <address file> <step> <n>`; an empty step never crashes.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

from millrace_ingestion.app import build
from millrace_ingestion.settings import IngestionSettings
from millrace_kit.server import running
from millrace_kit.settings import load_settings


async def main(config: str, address_file: str, step: str, times: int) -> None:
    """Serve until killed."""
    settings = load_settings(IngestionSettings, config)
    done = 0

    def crash_point(name: str) -> None:
        nonlocal done
        done += name == step
        if name == step and done == times:
            os.kill(os.getpid(), signal.SIGKILL)

    async with running(await build(settings, crash_point=crash_point), settings) as address:
        scratch = Path(f"{address_file}.new")
        scratch.write_text(address)
        scratch.replace(address_file)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
