"""The registry as it runs in a cluster: PostgreSQL and artifacts on S3, two replicas."""

import os
from pathlib import Path

import grpc
import pytest
from millrace_api.common.v1 import common_pb2
from millrace_kit.content import CHUNK_BYTES, open_files
from millrace_kit.errors import MillraceError
from millrace_kit.settings import BusSettings
from millrace_registry.settings import RegistrySettings
from parts import s3

from .harness import serving, sha


@pytest.mark.postgres
@pytest.mark.s3
async def test_two_replicas_over_postgresql_and_s3(tmp_path: Path, postgres_url: str, s3_url: str) -> None:
    settings = RegistrySettings(
        database_url=postgres_url,
        artifacts_url=f"{s3_url}/artifacts",
        bus=BusSettings(path=str(tmp_path / "bus.sqlite")),
        drain_s=0,
    )
    content = os.urandom(2 * CHUNK_BYTES + 11)
    async with serving(settings) as first, serving(settings) as second:
        await first.create_model()
        assert not (await first.put(content)).existed
        assert (await second.put(content)).existed
        with pytest.raises(MillraceError) as refused:
            await second.put(content, sha256=sha(b"other"))
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
        files = [common_pb2.Artifact(path="model.onnx", sha256=sha(content), size_bytes=len(content))]
        registered = await second.register("1.0.0", artifacts=files)
        assert await first.get(sha(content)) == content
        assert (await first.register("1.0.0", artifacts=files)).version.digest == registered.version.digest
        fs, root = open_files(settings.artifacts())
        found = [path for path in fs.find(root) if "/sha256/" not in path]
        assert found == [], "a refused upload leaves nothing"
        with fs.open(f"{root}/sha256/{sha(content)[:2]}/{sha(content)}", "wb") as file:
            file.write(content[:-1] + b"x")
        with pytest.raises(MillraceError) as changed:
            await first.get(sha(content))
        assert changed.value.code is grpc.StatusCode.DATA_LOSS


@pytest.mark.s3
async def test_an_artifact_store_that_goes_away(tmp_path: Path) -> None:
    server = s3.start_s3(tmp_path / "s3")
    try:
        with s3.in_environment(server.address):
            bus = BusSettings(path=str(tmp_path / "bus.sqlite"))
            state = str(tmp_path / "registry")
            settings = RegistrySettings(
                state_dir=state, artifacts_url=f"s3://{s3.BUCKET}/artifacts", bus=bus, drain_s=0, default_deadline_s=60
            )
            async with serving(settings) as client:
                await client.put(b"a" * 100)
                server.kill()
                for call in (client.put(b"b"), client.get(sha(b"a" * 100))):
                    with pytest.raises(MillraceError) as caught:
                        await call
                    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
            # Without its store the registry still starts and knows its models.
            async with serving(settings) as client:
                await client.create_model("n")
                server = s3.start_s3(tmp_path / "s3", port=int(server.address.rpartition(":")[2]))
                assert await client.get(sha(b"a" * 100)) == b"a" * 100
    finally:
        server.stop()
