"""Fixtures of the ingestion service's tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from .harness import Client, serving


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with serving(tmp_path) as connected:
        await connected.register()
        yield connected
