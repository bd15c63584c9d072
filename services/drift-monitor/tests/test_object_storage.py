"""References from training sets on object storage."""

from pathlib import Path

import grpc
import grpc.aio
import pytest
from millrace_kit.content import ContentStore
from millrace_kit.errors import MillraceError
from parts import s3


@pytest.mark.s3
async def test_a_reference_is_made_from_a_training_set_on_s3(world, stub, s3_url) -> None:
    request = world.training_set(rows=2000)
    store = ContentStore(f"{s3_url}/sets")
    assert store.put_file(world.folder / "set1.parquet") == request.data.sha256
    request.store_url = store.url
    answer = await stub.SetReference(request)
    assert answer.rows == 2000


@pytest.mark.s3
async def test_a_store_that_does_not_answer_is_unavailable(world, stub, tmp_path: Path) -> None:
    server = s3.start_s3(tmp_path / "s3")
    try:
        with s3.in_environment(server.address):
            request = world.training_set(rows=2000)
            request.store_url = f"s3://{s3.BUCKET}/sets"
            server.kill()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.SetReference(request)
            assert MillraceError.from_rpc(caught.value).code is grpc.StatusCode.UNAVAILABLE
    finally:
        server.stop()
