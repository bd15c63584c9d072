"""What a pod brings before its command starts and stores after it ended."""

from pathlib import Path

from millrace_kit.content import sha256_tree
from millrace_kit.errors import DataLossError

from millrace_training_coordinator.codetrees import unpack
from millrace_training_coordinator.executor import Place
from millrace_training_coordinator.results import MAX_RESULT_BYTES, RESULT_FILE
from millrace_training_coordinator.stagespec import StageSpec
from millrace_training_coordinator.workstore import Leaving, WorkStore, regular_files


def fetch_code(store: WorkStore, spec: StageSpec, target: Path) -> Path:
    """Unpack the stage's code and prove it.

    Raises:
        MillraceError: it is missing or damaged.
        OSError: the store cannot be read.
    """
    unpack(store.content.read(spec.archive_digest), target, spec.code_limit_bytes)
    found = sha256_tree(target)
    if found != spec.code_hash:
        raise DataLossError("DIGEST_MISMATCH", f"the code is {found}, not {spec.code_hash}", {"found": found})
    return target


def fetch_inputs(store: WorkStore, spec: StageSpec, folder: Path) -> dict[str, Path]:
    """Bring what the stages before this one left, each into a folder of its own.

    Raises:
        MillraceError: something is missing or damaged.
        OSError: the store cannot be read.
    """
    inputs = {}
    for name, attempt in spec.inputs.items():
        leaving = store.leaving(Place(spec.run_id, name, attempt))
        if leaving is None or not leaving.complete:
            raise DataLossError(
                "INPUT_MISSING", f"the outputs of stage {name} are not in the work store", {"stage": name}
            )
        inputs[name] = folder / name
        store.fetch_folder(leaving.files, store.of_run(spec.run_id), inputs[name])
    return inputs


def store_outputs(store: WorkStore, spec: StageSpec, index: int, folder: Path, *, succeeded: bool) -> None:
    """Store the output folder, or only `result.json` when the command failed; the list of it comes last.

    Raises:
        OSError: the store cannot be written.
    """
    if succeeded:
        names, others = regular_files(folder)
    else:
        result = folder / RESULT_FILE
        usable = result.is_file() and not result.is_symlink() and result.stat().st_size <= MAX_RESULT_BYTES
        names, others = ([RESULT_FILE] if usable else []), []
    kept = frozenset(spec.outputs) if succeeded else frozenset()
    files = store.store_folder(folder, names, store.of_run(spec.run_id), kept)
    store.write_leaving(spec.place, index, Leaving(spec.pods, succeeded, files, tuple(others)))
