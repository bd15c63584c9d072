"""What a tuner says: a table for people, JSON for programs. Every figure comes with what it was measured on."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from millrace_rollout_controller.state import VersionRef
from millrace_rollout_controller.tuning.configuration import Configuration
from millrace_rollout_controller.tuning.decision import Decision, Rounds
from millrace_rollout_controller.tuning.points import Point, Trial
from millrace_rollout_controller.tuning.search import Finalist

GENERATOR_LIMIT = 0.9
"""Cores of the one thread that sends the load; from here on it may be what was measured."""
COLUMNS = ("INSTANCES", "MAXBATCH", "DELAY", "PREFERRED", "CALLS", "PER S", "P50 MS", "P99 MS", "CPU", "MIB", "STATE")


@dataclass(frozen=True, slots=True)
class Machine:
    """What it was measured on."""

    cpu: str
    cores: int
    memory_gib: float
    load: float
    """Mean length of the run queue in the minute before, without the tuner's own."""
    gpu: str
    system: str
    triton: str


def this_machine(triton: str) -> Machine:
    """As it is now; call it before anything is measured."""
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / (1 << 30), 1),
        load=round(os.getloadavg()[0], 2),
        # The servers of one machine are Triton's Python backend with onnxruntime on the CPU.
        gpu="not used",
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        triton=triton,
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@dataclass(frozen=True, slots=True)
class Report:
    """All of one run."""

    ref: VersionRef
    bound_ms: float
    machine: Machine
    requests: str
    trials: Sequence[Trial]
    decision: Decision
    notes: Sequence[str]
    patch: str
    """Unified diff of the manifest; empty when nothing is to change."""
    written: str
    """File that got it; empty for none."""
    problem: str = ""
    """Why it could not be written."""

    def json(self) -> dict[str, Any]:
        """For programs."""
        decision = self.decision
        return {
            "model": self.ref.model,
            "version": self.ref.version,
            "digest": self.ref.digest,
            "p99BoundMs": self.bound_ms,
            "machine": asdict(self.machine),
            "requests": self.requests,
            "trials": [
                {
                    "configuration": _configuration(trial.configuration),
                    "points": [_point(point) for point in trial.points],
                    "problem": trial.problem,
                }
                for trial in self.trials
            ],
            "verdict": decision.verdict,
            "message": decision.message,
            "chosen": _finalist(decision.chosen) if decision.verdict != "undecided" else None,
            "closest": _finalist(decision.chosen) if decision.verdict == "undecided" else None,
            "rounds": _rounds(decision.rounds),
            "notes": list(self.notes),
            "patch": self.patch,
            "written": self.written,
            "problem": self.problem,
        }

    def text(self) -> str:
        """For people: the table, and what to know about it."""
        m = self.machine
        rows = [_row(trial, self.bound_ms, number) for number, trial in enumerate(self.trials)]
        lines = [_columns([COLUMNS, *rows]), ""]
        lines.append(
            f"model     {self.ref.model} {self.ref.version} ({self.ref.digest[:12]}), p99 at most {self.bound_ms:g} ms"
        )
        lines.append(
            f"machine   {m.cpu}, {m.cores} cores, {m.memory_gib:g} GiB, load {m.load:g} before; GPU {m.gpu}; Triton {m.triton}; {m.system}"
        )
        lines.append(f"requests  {self.requests}")
        lines += [f"rounds    {words}" for words in _rounds_words(self.decision.rounds)]
        lines += [f"note      {note}" for note in self.notes]
        lines.append(f"verdict   {self.decision.verdict}: {self.decision.message}")
        if self.written:
            lines.append(f"written   {self.written}")
        elif self.patch:
            lines += ["", self.patch.rstrip()]
        return "\n".join(lines)


def notes(trials: Sequence[Trial], decision: Decision, bound_ms: float, max_concurrency: int) -> list[str]:
    """What a reader of the figures has to know."""
    found = []
    chosen = decision.chosen
    points = [point for trial in trials for point in trial.points]
    if any(point.usage.generator_cpu >= GENERATOR_LIMIT for point in points):
        found.append("at some points the generator used its whole core: the servers may answer more than it could ask")
    if chosen is not None and chosen.point.concurrency == max_concurrency and chosen.point.within(bound_ms):
        found.append(f"the bound was not reached with {max_concurrency} calls at once (--max-concurrency)")
    if decision.verdict == "better" and chosen is not None:
        rows = chosen.configuration.max_batch_size
        if rows < trials[0].configuration.max_batch_size:
            found.append(f"maxBatchSize gets smaller: requests of more than {rows} rows are refused then")
    rounds, first = decision.rounds, trials[0].closest(bound_ms) if trials else None
    again = rounds.present or rounds.best.point if rounds is not None else None
    if rounds is not None and first is not None and again is not None and first.per_s > 0:
        change = again.per_s / first.per_s - 1.0
        found.append(
            f"the manifest as it is answered {first.per_s:.0f} a second at the beginning and {again.per_s:.0f} at the end ({change:+.0%})"
        )
    return found


def _row(trial: Trial, bound_ms: float, number: int) -> tuple[str, ...]:
    one = trial.configuration
    name = (
        str(one.instances), str(one.max_batch_size), f"{one.queue_delay_us} us",
        ",".join(map(str, one.preferred_sizes)) or "-",
    )  # fmt: skip
    point = trial.closest(bound_ms)
    suffix = " (manifest)" if number == 0 else ""
    if point is None:
        return (*name, *("-",) * 6, (trial.problem or "no answers")[:60] + suffix)
    state = (
        "failed" if point.failures else "over" if not point.within(bound_ms) else "ok" if point.steady else "unsteady"
    )
    usage = point.usage
    return (
        *name, str(point.concurrency), f"{point.per_s:.0f}", f"{point.p50_ms:.2f}", f"{point.p99_ms:.2f}",
        f"{usage.cpu:.2f}", f"{usage.memory_mib:.0f}", state + suffix,
    )  # fmt: skip


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _rounds_words(rounds: Rounds | None) -> list[str]:
    if rounds is None:
        return []
    best = rounds.best
    words = [
        f"{{{best.configuration.words}}}, {best.point.concurrency} calls: {best.point.per_s:.0f}/s, p99 {best.point.p99_ms:.2f} ms"
    ]
    if rounds.present is not None:
        present = rounds.present
        words.append(f"manifest, {present.concurrency} calls: {present.per_s:.0f}/s, p99 {present.p99_ms:.2f} ms")
    words.append(f"noise: the same configuration differed by {rounds.noise:.0%} between rounds")
    return words


def _configuration(one: Configuration) -> dict[str, Any]:
    return {
        "instances": one.instances,
        "maxBatchSize": one.max_batch_size,
        "queueDelayUs": one.queue_delay_us,
        "preferredSizes": list(one.preferred_sizes),
    }


def _point(point: Point) -> dict[str, Any]:
    return {
        "concurrency": point.concurrency,
        "perSecond": round(point.per_s, 2),
        "p50Ms": round(point.p50_ms, 3),
        "p99Ms": round(point.p99_ms, 3),
        "steady": point.steady,
        "windows": point.windows,
        "failures": point.failures,
        "problem": point.problem,
        "cpuCores": round(point.usage.cpu, 3),
        "generatorCpuCores": round(point.usage.generator_cpu, 3),
        "memoryMib": round(point.usage.memory_mib, 1),
    }


def _finalist(one: Finalist | None) -> dict[str, Any] | None:
    return None if one is None else {"configuration": _configuration(one.configuration), "point": _point(one.point)}


def _rounds(rounds: Rounds | None) -> dict[str, Any] | None:
    if rounds is None:
        return None
    return {
        "best": _finalist(rounds.best),
        "manifest": _point(rounds.present) if rounds.present is not None else None,
        "ratios": [round(ratio, 4) for ratio in rounds.ratios],
        "gain": round(rounds.gain, 4),
        "noise": round(rounds.noise, 4),
    }
