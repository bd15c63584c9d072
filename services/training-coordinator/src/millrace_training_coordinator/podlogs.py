"""Logs of an attempt's pods, followed through the Kubernetes API into one file of the coordinator's.

A position is written beside the file: how long the file was, and the time of the last line of each pod in it. After a restart the file is
cut to that length and every pod is read on from there, so that no line is missing and none stands twice. Past its limit the rest is
dropped. The API knows times of lines to the nanosecond but starts at whole seconds; lines that were seen are skipped.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace_training_coordinator.jobs import CONTAINER
from millrace_training_coordinator.kubeapi import KubeApi, KubernetesError, KubernetesUnavailableError
from millrace_training_coordinator.podstates import has_started, is_over
from millrace_training_coordinator.supervisor import write_json

log = logging.getLogger(__name__)

LOG, POSITION = "log", "log.position.json"
RETRY_S = 1.0
# A connection that says nothing for so long is opened again: a node may have gone without a word.
IDLE_S = 60.0
MARK_EVERY_S = 1.0
MAX_LINE_BYTES = 1 << 20


def cut_logs(runs: Path) -> None:
    """Cut every log to the length it had when its position was written; before anybody reads them again."""
    for path in runs.glob(f"*/*/*/{POSITION}"):
        try:
            size = int(json.loads(path.read_text(encoding="utf-8"))["size"])
            file = path.with_name(LOG)
            if file.stat().st_size > size:
                os.truncate(file, size)
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s: lines may stand twice: %s", path, error)


class AttemptLog:
    """The log file of one attempt.

    Args:
        folder: where it lies.
        limit_mib: its largest size.
    """

    def __init__(self, folder: Path, limit_mib: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._limit = limit_mib << 20
        self._limit_mib = limit_mib
        position = self._position()
        self.seen: dict[str, str] = position["seen"]
        """Time of each pod's last line, as the API wrote it."""
        self._file = (folder / LOG).open("ab", buffering=0)
        self._size = min(self._file.tell(), int(position["size"]))
        self._file.truncate(self._size)
        self._full = self._size >= self._limit
        self._marked_at = 0.0

    def _position(self) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads((self._folder / POSITION).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"size": 0, "seen": {}}
        return value

    def note(self, text: str) -> None:
        """Add a line of the coordinator's own."""
        self._write(f"[kubernetes] {text}\n".encode())
        self.mark()

    def add(self, pod: str, stamp: str, line: bytes) -> None:
        """Add a line of a pod."""
        self._write(line)
        self.seen[pod] = stamp
        if time.monotonic() - self._marked_at > MARK_EVERY_S:
            self.mark()

    def _write(self, content: bytes) -> None:
        if self._full:
            return
        if self._size + len(content) > self._limit:
            self._full = True
            content = content[: self._limit - self._size]
            content += f"\n[log limit of {self._limit_mib} MiB reached, the rest is dropped]\n".encode()
        try:
            self._size += self._file.write(content) or 0
        except OSError as error:  # a full disk must not stop the attempt
            self._full = True
            log.warning("the log in %s ends here: %s", self._folder, error)

    def mark(self) -> None:
        """Write down how far the file got."""
        self._marked_at = time.monotonic()
        write_json(self._folder / POSITION, {"size": self._size, "seen": self.seen})

    def close(self) -> None:
        """Nothing more comes."""
        self.mark()
        self._file.close()


class PodLogs:
    """Follows the pods of one attempt.

    Args:
        api: the API server.
        namespace: of the pods.
        log: where lines go.
        slots: bounds how many pods of all attempts are followed at once.
    """

    def __init__(self, api: KubeApi, namespace: str, attempt_log: AttemptLog, slots: asyncio.Semaphore) -> None:
        self._api = api
        self._namespace = namespace
        self._log = attempt_log
        self._slots = slots
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._over: set[str] = set()

    def look(self, pods: Sequence[Mapping[str, Any]]) -> None:
        """Follow every pod that has started and is not followed yet; pods that are not given have gone."""
        names = {pod["metadata"]["name"] for pod in pods}
        self._over |= {name for name in self._tasks if name not in names}
        for pod in pods:
            name = pod["metadata"]["name"]
            if is_over(pod):
                self._over.add(name)
            if has_started(pod) and name not in self._tasks:
                self._tasks[name] = asyncio.create_task(self._follow(name), name=f"log of {name}")

    async def finish(self, timeout_s: float) -> None:
        """Read to the ends of all logs, at most so long; nothing is followed after that."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=timeout_s)
        await self.cancel()

    async def cancel(self) -> None:
        """Follow no more."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _follow(self, pod: str) -> None:
        async with self._slots:
            while True:
                over = pod in self._over
                try:
                    await self._read(pod)
                except KubernetesError as error:
                    log.info("the log of pod %s ends: %s", pod, error)
                    return
                except KubernetesUnavailableError as error:
                    log.debug("the log of pod %s is broken off: %s", pod, error)
                else:
                    # It was over before the log was read to its end: nothing can follow.
                    if over:
                        return
                await asyncio.sleep(0 if pod in self._over and not over else RETRY_S)

    async def _read(self, pod: str) -> None:
        """Read on until the stream ends."""
        params = {"container": CONTAINER, "follow": "true", "timestamps": "true"}
        after = self._log.seen.get(pod, "")
        if after:
            params["sinceTime"] = after
        path = f"/api/v1/namespaces/{self._namespace}/pods/{pod}/log"
        async with self._api.stream(path, params, IDLE_S) as stream:
            rest = b""
            try:
                async for chunk in stream.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        self._line(pod, line + b"\n", after)
                    if len(rest) > MAX_LINE_BYTES:
                        raise KubernetesUnavailableError(f"a line of pod {pod} is longer than {MAX_LINE_BYTES} bytes")
            except (OSError, TimeoutError) as error:
                raise KubernetesUnavailableError(repr(error)) from error
            if rest:
                self._line(pod, rest, after)

    def _line(self, pod: str, line: bytes, after: str) -> None:
        stamp, space, text = line.partition(b" ")
        if not space:
            return
        moment = stamp.decode("ascii", "replace")
        if not after or _key(moment) > _key(after):
            self._log.add(pod, moment, text)


def _key(stamp: str) -> tuple[str, str]:
    """Order of RFC 3339 times in UTC, whose fractions drop trailing zeros."""
    seconds, _, fraction = stamp.removesuffix("Z").partition(".")
    return seconds, fraction.ljust(9, "0")
