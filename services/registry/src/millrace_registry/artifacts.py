"""Files of versions: what is accepted has the digest and the length it was announced with, and is read back before it is believed."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import ParamSpec, TypeVar

from millrace_kit.content import CHUNK_BYTES, ContentStore
from millrace_kit.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)

from millrace_registry.models import Artifact

P = ParamSpec("P")
T = TypeVar("T")


class Artifacts:
    """The artifact store behind the upload and download calls; its blocking work runs in threads.

    Args:
        store: where the files are.
        max_bytes: largest single file.
    """

    def __init__(self, store: ContentStore, *, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes

    async def put(self, sha256: str, size_bytes: int, chunks: AsyncIterator[bytes]) -> bool:
        """Store an uploaded file; returns whether it was there, intact, before.

        A file that is there but no longer has its digest is replaced, so uploading again repairs it.

        Raises:
            InvalidArgumentError: too large, a chunk above 1 MiB, or the content has another length or digest; nothing is stored.
        """
        if not 0 <= size_bytes <= self._max_bytes:
            raise InvalidArgumentError("header.size_bytes", f"must be 0 to {self._max_bytes}")
        with await _in_thread(self._store.write) as writer:
            async for chunk in chunks:
                if len(chunk) > CHUNK_BYTES:
                    raise InvalidArgumentError("chunk", f"is longer than {CHUNK_BYTES} bytes")
                if writer.size_bytes + len(chunk) > size_bytes:
                    raise InvalidArgumentError("chunk", f"the content is longer than the {size_bytes} bytes announced")
                await _in_thread(writer.add, chunk)
            if writer.size_bytes != size_bytes:
                problem = f"the content has {writer.size_bytes} bytes, {size_bytes} were announced"
                raise InvalidArgumentError("header.size_bytes", problem)
            if writer.sha256 != sha256:
                raise InvalidArgumentError("header.sha256", f"the content has digest {writer.sha256}")
            if await _in_thread(self._intact, sha256):
                return True
            await _in_thread(writer.keep, sha256)
            return False

    async def read(self, sha256: str) -> AsyncIterator[bytes]:
        """The content in chunks; the last one only comes once the digest of all is proved.

        Raises:
            NotFoundError: no such file.
            DataLossError: the file was changed after it was stored.
        """
        chunks = self._store.chunks(sha256)

        def following() -> bytes | None:
            return next(chunks, None)

        while (chunk := await _in_thread(following)) is not None:
            yield chunk

    async def check(self, artifacts: Sequence[Artifact]) -> None:
        """Read every file of a version to be registered.

        Raises:
            FailedPreconditionError: a file was not uploaded.
            InvalidArgumentError: a file has another length than stated.
            DataLossError: a stored file was changed.
        """
        for index, artifact in enumerate(artifacts):
            await self.check_one(artifact, f"version.artifacts[{index}].size_bytes")

    async def check_one(self, artifact: Artifact, size_field: str) -> None:
        """The same for one file; `size_field` is the field to name when its length is not as stated."""
        try:
            size = await _in_thread(self._store.size, artifact.sha256)
        except NotFoundError:
            message = f"{artifact.path} ({artifact.sha256}) was not uploaded; call PutArtifact first"
            metadata = {"path": artifact.path, "sha256": artifact.sha256}
            raise FailedPreconditionError("ARTIFACT_MISSING", message, metadata) from None
        await _in_thread(self._store.verify, artifact.sha256)
        if size != artifact.size_bytes:
            raise InvalidArgumentError(size_field, f"{artifact.path} has {size} bytes, not {artifact.size_bytes}")

    def _intact(self, sha256: str) -> bool:
        try:
            self._store.verify(sha256)
        except (NotFoundError, DataLossError):
            return False
        return True


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except OSError as error:
        raise UnavailableError("ARTIFACT_STORE_UNAVAILABLE", "the artifact store did not answer") from error
