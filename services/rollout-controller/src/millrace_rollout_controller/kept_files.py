"""Files of versions that come and go, kept on disk by digest: bringing back what was here before needs no registry."""

import asyncio
import shutil
from collections.abc import Collection
from pathlib import Path
from uuid import uuid4

from millrace_kit.content import sha256_file

from millrace_rollout_controller.executor import ArtifactSource
from millrace_rollout_controller.state import ArtifactRef


class KeptFiles:
    """An `ArtifactSource` that asks another one only for what it does not have.

    Args:
        folder: where files are kept, named by their digests; on the file system of the repository a file is there once, by two names.
        source: where they come from.
    """

    def __init__(self, folder: Path, source: ArtifactSource) -> None:
        self._folder = folder
        self._source = source

    async def fetch(self, artifact: ArtifactRef, target: Path) -> None:
        """See `ArtifactSource.fetch`; the digest of a kept file is proved each time."""
        kept = self._folder / artifact.sha256
        if await asyncio.to_thread(_take, kept, artifact.sha256, target):
            return
        await self._source.fetch(artifact, target)
        await asyncio.to_thread(_keep, target, kept)

    def forget_all_but(self, digests: Collection[str]) -> None:
        """Remove the files nobody needs any more."""
        for path in self._folder.glob("*"):
            # One that is being kept right now has a dot.
            if path.name not in digests and not path.name.startswith("."):
                path.unlink(missing_ok=True)


def _take(kept: Path, digest: str, target: Path) -> bool:
    if not kept.exists():
        return False
    _link(kept, target)
    if sha256_file(target) == digest:
        return True
    # What was changed on disk is fetched anew.
    kept.unlink(missing_ok=True)
    target.unlink()
    return False


def _keep(target: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_name(f".{kept.name}.{uuid4().hex}")
    _link(target, scratch)
    scratch.replace(kept)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
