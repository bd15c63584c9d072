"""What a run was made of, and what differs between two runs: the reproducibility record."""

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from millrace_training_coordinator.results import Output, StageResult

# Libraries whose version can change bits of a model or of its data.
LIBRARIES = ("torch", "numpy", "scikit-learn", "onnx", "onnxruntime", "optuna", "pandas", "pyarrow", "duckdb")
# Instruction sets by which numeric libraries choose their kernels.
INSTRUCTION_SETS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")


@dataclass(frozen=True, slots=True)
class Record:
    """Everything needed to run again and compare."""

    training_set_digest: str = ""
    definitions_hash: str = ""
    table_versions: Mapping[str, int] = field(default_factory=dict)
    outputs: tuple[Output, ...] = ()
    model: str = ""
    model_version: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One output of two runs; an empty digest means that the run did not make it."""

    path: str
    original: str
    reproduction: str

    @property
    def equal(self) -> bool:
        """Whether both have the same bytes."""
        return self.original == self.reproduction != ""


def collect(results: Sequence[StageResult], outputs: Sequence[Output]) -> Record:
    """One record of the results of a run's stages, given in the plan's order; where two name the same thing the later counts."""
    tables: dict[str, int] = {}
    for result in results:
        tables.update(result.table_versions)

    def last(name: str) -> str:
        return next((value for result in reversed(results) if (value := getattr(result, name))), "")

    return Record(
        last("training_set_digest"),
        last("definitions_hash"),
        dict(sorted(tables.items())),
        tuple(sorted(outputs, key=lambda output: output.path)),
        last("model"),
        last("model_version"),
    )


def compare_outputs(
    original: Sequence[Output], reproduction: Sequence[Output], stages: frozenset[str]
) -> tuple[Comparison, ...]:
    """The outputs of `stages` (those the reproduction ran) side by side, by path."""
    first = {o.path: o.sha256 for o in original if o.path.partition("/")[0] in stages}
    second = {o.path: o.sha256 for o in reproduction}
    return tuple(Comparison(p, first.get(p, ""), second.get(p, "")) for p in sorted(first | second))


def differences(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """What differs, by key: "first -> second"."""
    keys = sorted(set(first) | set(second))
    return {
        key: f"{first.get(key, '(none)')} -> {second.get(key, '(none)')}"
        for key in keys
        if first.get(key) != second.get(key)
    }


def environment_facts(lock_hash: str, hardware: Mapping[str, str], record: Record) -> dict[str, str]:
    """All that should be equal between a run and its reproduction, besides code, parameters and seed."""
    return {
        **hardware,
        "lock_hash": lock_hash,
        "training_set_digest": record.training_set_digest,
        "definitions_hash": record.definitions_hash,
        **{f"table_version.{table}": str(version) for table, version in record.table_versions.items()},
    }


def hash_lock_file(path: str) -> str:
    """SHA-256 of the lock file; empty when none is configured.

    Raises:
        OSError: it cannot be read.
    """
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def hardware() -> dict[str, str]:
    """CPU model, CPU count, instruction sets, GPU, system and library versions of this machine."""
    facts = {
        "machine": platform.machine(),
        "system": platform.system(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "cpu_count": str(os.cpu_count() or 0),
        **_cpu_facts(),
    }
    for library in LIBRARIES:
        try:
            facts[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    for number, path in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                facts[f"gpu_{number}"] = line.partition(":")[2].strip()
    return facts


def _cpu_facts() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {"cpu_model": platform.processor()}
    fields = dict(reversed([_field(line) for line in text.splitlines() if ":" in line]))
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    sets = [name for name in INSTRUCTION_SETS if name in flags]
    return {
        "cpu_model": fields.get("model name", platform.processor()),
        "cpu_family_model_stepping": "/".join(fields.get(k, "?") for k in ("cpu family", "model", "stepping")),
        "cpu_instruction_sets": " ".join(sets),
    }


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()
