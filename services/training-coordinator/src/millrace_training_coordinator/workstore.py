"""The work store: what a cluster's stages and the coordinator hand each other, below one fsspec URL.

```
content/                                    archives and declared outputs by digest, kept for good
runs/<run>/content/                         other outputs by digest
runs/<run>/<stage>/<attempt>/spec.json      what a pod has to do
                             outputs-<i>.json      what pod i left; written last, so outputs are complete or not there
                             end-<i>.json          how pod i ended
                             checkpoint-<i>.json   newest checkpoint of pod i, its files below checkpoint/<i>
                             log                   the attempt's log, once it is over
```
Every attempt writes below its own prefix only: one that was given up but still runs somewhere can harm none that follows. Files are
proved by digest at every read.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
from millrace_kit.content import ContentStore
from millrace_kit.errors import DataLossError

from millrace_training_coordinator.executor import Place

MAX_FILES = 10_000


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of an output or checkpoint folder."""

    sha256: str
    size_bytes: int
    kept: bool = False
    """Whether it lies in the content that outlives the run."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """What one pod left."""

    pods: int
    """Pods of the attempt."""
    complete: bool
    """Whether the command succeeded; otherwise only its `result.json` is here."""
    files: Mapping[str, StoredFile]
    skipped: tuple[str, ...] = ()
    """Entries that are no regular files."""


class WorkStore:
    """Paths, small JSON objects and content below `url`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # Listings are never cached: other processes write here.
        self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        self.content = ContentStore(f"{self.url}/content")

    def of_run(self, run_id: str) -> ContentStore:
        """Content that goes when the run is forgotten."""
        return ContentStore(f"{self.url}/runs/{run_id}/content")

    def of_checkpoint(self, place: Place, index: int) -> ContentStore:
        """Files of the checkpoints of one pod."""
        return ContentStore(f"{self.url}/{attempt_path(place)}/checkpoint/{index}")

    def write(self, path: str, content: bytes) -> None:
        """Write a small object, whole or not at all."""
        target = f"{self._root}/{path}"
        scratch = f"{target}.{uuid4().hex}"
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(scratch, content)
        self._fs.mv(scratch, target)

    def read(self, path: str) -> bytes | None:
        """A small object, or None when there is none."""
        try:
            return bytes(self._fs.cat_file(f"{self._root}/{path}"))
        except FileNotFoundError:
            return None

    def read_json(self, path: str) -> dict[str, Any] | None:
        """A small JSON object, or None when there is none."""
        content = self.read(path)
        if content is None:
            return None
        value: dict[str, Any] = json.loads(content)
        return value

    def write_json(self, path: str, value: Mapping[str, Any]) -> str:
        """Write a JSON object; returns its SHA-256."""
        content = json.dumps(value, sort_keys=True).encode()
        self.write(path, content)
        return hashlib.sha256(content).hexdigest()

    def read_proved(self, path: str, sha256: str) -> dict[str, Any]:
        """A JSON object that must have this digest.

        Raises:
            DataLossError: it is missing or was changed.
        """
        content = self.read(path)
        found = hashlib.sha256(content).hexdigest() if content is not None else "nothing"
        if content is None or found != sha256:
            raise DataLossError("DIGEST_MISMATCH", f"{path} has digest {found}, not {sha256}", {"path": path})
        value: dict[str, Any] = json.loads(content)
        return value

    def store_folder(
        self, folder: Path, names: Iterable[str], store: ContentStore, kept: frozenset[str] = frozenset()
    ) -> dict[str, StoredFile]:
        """Store files of `folder`, those in `kept` for good."""
        stored = {}
        for name in names:
            path = folder / name
            digest = (self.content if name in kept else store).put_file(path)
            stored[name] = StoredFile(digest, path.stat().st_size, name in kept)
        return stored

    def fetch_folder(self, files: Mapping[str, StoredFile], store: ContentStore, folder: Path) -> None:
        """Bring files into `folder`, each proved.

        Raises:
            NotFoundError, DataLossError: one is gone or damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            target = folder / name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise DataLossError("PATH_OUTSIDE", f"{name!r} points outside its folder", {"path": name})
            (self.content if file.kept else store).fetch(file.sha256, target)

    def write_leaving(self, place: Place, index: int, leaving: Leaving) -> None:
        """Say what pod `index` left; everything it names must be stored before."""
        self.write_json(f"{attempt_path(place)}/outputs-{index}.json", asdict(leaving))

    def leaving(self, place: Place) -> Leaving | None:
        """What all pods of an attempt left, as one folder (the lowest pod's file counts); None until all have said it."""
        first = self._leaving(place, 0)
        if first is None:
            return None
        others = [self._leaving(place, index) for index in range(1, first.pods)]
        present = [one for one in others if one is not None]
        if len(present) < len(others):
            return None
        files: dict[str, StoredFile] = {}
        for one in (*reversed(present), first):
            files.update(one.files)
        skipped = {name for one in (first, *present) for name in one.skipped} - set(files)
        return Leaving(first.pods, all(one.complete for one in (first, *present)), files, tuple(sorted(skipped)))

    def _leaving(self, place: Place, index: int) -> Leaving | None:
        raw = self.read_json(f"{attempt_path(place)}/outputs-{index}.json")
        if raw is None:
            return None
        return Leaving(raw["pods"], raw["complete"], stored_files(raw["files"]), tuple(raw["skipped"]))

    def remove_run(self, run_id: str) -> None:
        """Remove everything of a run but what is kept for good."""
        path = f"{self._root}/runs/{run_id}"
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)


def attempt_path(place: Place) -> str:
    """Prefix of an attempt below the store's URL."""
    return f"runs/{place.run_id}/{place.stage}/{place.attempt}"


def stored_files(raw: Mapping[str, Any]) -> dict[str, StoredFile]:
    """Files from their JSON."""
    return {name: StoredFile(**file) for name, file in raw.items()}


def regular_files(folder: Path) -> tuple[list[str], list[str]]:
    """Paths of the regular files below `folder`, sorted, and of entries that are neither file nor folder."""
    files, others = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            others.append(name)
        elif path.is_file():
            files.append(name)
    if len(files) > MAX_FILES:
        raise OSError(f"{folder.name} holds {len(files)} files, at most {MAX_FILES} can be stored")
    return files, others
