"""Fixtures of the ingestion service's tests."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from .harness import PLACES, Client, serving


@pytest.fixture(params=["machine", pytest.param("cluster", marks=[pytest.mark.postgres, pytest.mark.s3])])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The test's folder; its lake and database are there, or on a real S3 and PostgreSQL server."""
    if request.param == "cluster":
        url = request.getfixturevalue("s3_url")
        PLACES[tmp_path] = {"lake_url": f"{url}/lake", "database_url": request.getfixturevalue("postgres_url")}
    yield tmp_path
    PLACES.pop(tmp_path, None)


@pytest.fixture
async def client(place: Path) -> AsyncIterator[Client]:
    async with serving(place) as connected:
        await connected.register()
        yield connected
