"""A pod's checkpoint folder and its copy in the work store.

A stage writes checkpoints into `MILLRACE_CHECKPOINT_DIR`, each file under another name first and then renamed (names that end in `.tmp`
are not copied). The newest copy comes back before the next attempt's command starts: for every pod the files of all pods.
"""

import contextlib
import logging
import threading
from dataclasses import asdict
from pathlib import Path

from millrace_kit.content import ContentStore
from millrace_kit.errors import MillraceError

from millrace_training_coordinator.executor import Place
from millrace_training_coordinator.workstore import StoredFile, WorkStore, attempt_path, regular_files, stored_files

log = logging.getLogger(__name__)

UNFINISHED_SUFFIX = ".tmp"
SNAPSHOT_TRIES = 3
_Look = dict[str, tuple[int, int, int]]


class Checkpoints:
    """Copies one pod's folder to the store when it changed.

    Args:
        store: the work store.
        place: the attempt.
        index: the pod.
        folder: what `MILLRACE_CHECKPOINT_DIR` names.
    """

    def __init__(self, store: WorkStore, place: Place, index: int, folder: Path) -> None:
        self._store = store
        self._place = place
        self._index = index
        self._folder = folder
        self._content = store.of_checkpoint(place, index)
        self._seen: _Look = {}
        # Files that came back from other pods' checkpoints: theirs to store, unless this pod changes them.
        self._foreign: _Look = {}
        self._stored: dict[str, StoredFile] = {}
        self._lock = threading.Lock()

    def restore(self, pods: int) -> int:
        """Bring back the newest checkpoint of every pod; returns the newest attempt that had one, 0 when none had."""
        newest = 0
        for index in [*(other for other in reversed(range(pods)) if other != self._index), self._index]:
            for attempt in range(self._place.attempt - 1, 0, -1):
                earlier = Place(self._place.run_id, self._place.stage, attempt)
                try:
                    names = self._restore(earlier, index)
                except (MillraceError, OSError, ValueError, KeyError, TypeError) as error:
                    log.warning("the checkpoint of attempt %d, pod %d cannot be used: %s", attempt, index, error)
                    continue
                if names is not None:
                    newest = max(newest, attempt)
                    foreign = index != self._index
                    self._foreign = {n: v for n, v in self._every().items() if foreign or n not in names}
                    break
        return newest

    def _restore(self, earlier: Place, index: int) -> set[str] | None:
        raw = self._store.read_json(f"{attempt_path(earlier)}/checkpoint-{index}.json")
        if raw is None:
            return None
        files = stored_files(raw["files"])
        self._store.fetch_folder(files, self._store.of_checkpoint(earlier, index), self._folder)
        return set(files)

    def sync(self) -> bool:
        """Copy the folder if it changed; returns whether it did.

        Raises:
            OSError: the store cannot be written; what it had stays.
        """
        with self._lock:
            return self._sync()

    def _sync(self) -> bool:
        for _try in range(SNAPSHOT_TRIES):
            look = self._look()
            if look == self._seen:
                return False
            with contextlib.suppress(FileNotFoundError):  # it was replaced while it was read
                stored = self._store.store_folder(self._folder, look, self._content)
                if self._look() == look:
                    self._publish(stored)
                    self._seen = look
                    return True
        return False

    def _publish(self, stored: dict[str, StoredFile]) -> None:
        path = f"{attempt_path(self._place)}/checkpoint-{self._index}.json"
        self._store.write_json(path, {"files": {name: asdict(file) for name, file in stored.items()}})
        needed = {file.sha256 for file in stored.values()}
        _remove(self._content, {file.sha256 for file in self._stored.values()} - needed)
        self._stored = stored

    def _look(self) -> _Look:
        return {name: stat for name, stat in self._every().items() if self._foreign.get(name) != stat}

    def _every(self) -> _Look:
        files, _others = regular_files(self._folder)
        look: _Look = {}
        for name in files:
            if not name.endswith(UNFINISHED_SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    stat = (self._folder / name).stat()
                    look[name] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        return look


def _remove(content: ContentStore, digests: set[str]) -> None:
    """Remove what a newer checkpoint replaced."""
    for digest in digests:
        try:
            content.remove(digest)
        except OSError as error:
            log.warning("an old checkpoint file stays in the store: %s", error)
