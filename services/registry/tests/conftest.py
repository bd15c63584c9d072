"""Fixtures: a registry in process, and one as a process of its own."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from millrace_kit.settings import BusSettings
from millrace_registry.settings import RegistrySettings

from .harness import Client, Process, serving


@pytest.fixture
def settings(tmp_path: Path) -> RegistrySettings:
    bus = BusSettings(path=str(tmp_path / "bus.sqlite"))
    return RegistrySettings(state_dir=str(tmp_path / "registry"), bus=bus, drain_s=0)


@pytest.fixture
async def client(settings: RegistrySettings) -> AsyncIterator[Client]:
    async with serving(settings) as opened:
        await opened.create_model()
        yield opened


@pytest.fixture
async def process(settings: RegistrySettings, tmp_path: Path, unused_tcp_port: int) -> AsyncIterator[Process]:
    started = Process(settings, tmp_path, unused_tcp_port)
    await started.ready()
    yield started
    started.kill()
