"""Triton model repositories on disk: a version's files with their digests proved, and the configuration they run with.

A repository is written beside its place and renamed, so it is there whole or not at all. Before every start of a server it is read again;
one that was changed is thrown away and written anew.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal
from uuid import uuid4

from millrace_kit.content import sha256_file
from millrace_kit.errors import FailedPreconditionError

from millrace_rollout_controller import server_versions, triton_options
from millrace_rollout_controller.executor import ArtifactSource
from millrace_rollout_controller.server_block import Server
from millrace_rollout_controller.state import ArtifactRef, Tensor, VersionRef

MODEL_FILE = "model.onnx"
DIGESTS_FILE = "artifacts.json"
PLATFORM = "onnxruntime_onnx"
# V2 datatypes to those of the configuration; BYTES needs another way into the backend and is refused.
_TYPES = {name: f"TYPE_{name}" for name in ("BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "FP16", "FP32", "FP64")}
_RUNTIME = Path(__file__).with_name("triton_model.py")


@dataclass(frozen=True, slots=True)
class Flavour:
    """How a server runs an ONNX graph."""

    backend: Literal["pythonOnnx", "onnxruntime"] = "pythonOnnx"
    """Our model.py on Triton's Python backend, or Triton's own onnxruntime backend."""
    threads: int = 1
    """Threads of one onnxruntime session."""
    gpu: bool = False
    """Instances on the GPUs the server sees; only with `onnxruntime`."""
    warmup: int = 0
    """Requests of one row of zeros the server answers to itself before it is ready; 0 where somebody else warms it up."""


def key(ref: VersionRef, server: Server, flavour: Flavour) -> str:
    """Short name of everything that decides how a server behaves; equal keys can share a repository."""
    # Servers of several versions are the same whatever they hold.
    own = "" if is_shared(server) else ref.digest
    parts = (own, config(ref, server, flavour), sha256_file(_RUNTIME), *triton_options.arguments(server))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def needed(ref: VersionRef, max_bytes: int) -> list[ArtifactRef]:
    """The files a server needs: the graph and tensors stored beside it.

    Raises:
        FailedPreconditionError: the version cannot be served; the message says why.
    """
    if ref.platform != PLATFORM:
        message = f"platform {ref.platform!r} is not served; Triton here serves {PLATFORM}"
        raise FailedPreconditionError("PLATFORM_UNSUPPORTED", message, {"platform": ref.platform})
    for tensor in (*ref.inputs, *ref.outputs):
        if tensor.datatype not in _TYPES:
            message = f"tensor {tensor.name!r} has datatype {tensor.datatype}, which is not served"
            raise FailedPreconditionError("DATATYPE_UNSUPPORTED", message, {"tensor": tensor.name})
    files = [a for a in ref.artifacts if a.path == MODEL_FILE or a.path.endswith((".data", ".bin"))]
    if not ref.inputs or not ref.outputs or all(a.path != MODEL_FILE for a in files):
        message = f"version {ref.version} needs an artifact {MODEL_FILE} and a signature with inputs and outputs"
        raise FailedPreconditionError("MODEL_INCOMPLETE", message, {"version": ref.version})
    for artifact in files:
        path = PurePosixPath(artifact.path)
        if path.is_absolute() or ".." in path.parts or artifact.size_bytes > max_bytes:
            message = f"artifact {artifact.path!r} has a path outside the model or is larger than {max_bytes} bytes"
            raise FailedPreconditionError("ARTIFACT_REFUSED", message, {"path": artifact.path})
    return files


def config(ref: VersionRef, server: Server, flavour: Flavour) -> str:
    """The text of `config.pbtxt`."""
    lines = [
        f"name: {json.dumps(ref.model)}",
        f"backend: {json.dumps('python' if flavour.backend == 'pythonOnnx' else 'onnxruntime')}",
        f"max_batch_size: {server.max_batch_size}",
        *(_tensor("input", tensor) for tensor in ref.inputs),
        *(_tensor("output", tensor) for tensor in ref.outputs),
        triton_options.instances(server, gpu=flavour.gpu),
        triton_options.batching(server),
        *triton_options.caching(server),
        *(["version_policy: { all { } }"] if is_shared(server) else []),
    ]
    if flavour.backend == "pythonOnnx":
        # Of several versions each has its own beside its files: a changed configuration would load all of them anew.
        lines += [] if is_shared(server) else [_parameter("artifacts", _digests(ref))]
        lines += [_parameter("threads", str(flavour.threads))]
    else:
        lines += [
            f"default_model_filename: {json.dumps(MODEL_FILE)}",
            _parameter("intra_op_thread_count", str(flavour.threads)),
            _parameter("inter_op_thread_count", "1"),
        ]
    if server.model_warmup is not None:
        own = server.model_warmup
        lines.append(_warm_up(ref, own.count, own.batch_sizes if server.max_batch_size > 1 else (1,)))
    elif flavour.warmup:
        lines.append(_warm_up(ref, flavour.warmup, (1,)))
    return "\n".join(lines) + "\n"


def is_shared(server: Server) -> bool:
    """Whether its servers hold several versions."""
    return server.holds_several


def _digests(ref: VersionRef) -> str:
    digests = {a.path: a.sha256 for a in ref.artifacts if a.path == MODEL_FILE or a.path.endswith((".data", ".bin"))}
    return json.dumps(digests, sort_keys=True)


def _tensor(kind: str, tensor: Tensor) -> str:
    # The registry's shapes have no batch dimension, and neither have the configuration's.
    dims = ", ".join(str(size) for size in tensor.shape)
    data_type = _TYPES.get(tensor.datatype, "TYPE_INVALID")
    return f"{kind} [ {{ name: {json.dumps(tensor.name)} data_type: {data_type} dims: [ {dims} ] }} ]"


def _warm_up(ref: VersionRef, count: int, batch_sizes: Sequence[int]) -> str:
    inputs = "\n".join(
        f"    inputs {{ key: {json.dumps(tensor.name)} value {{ data_type: {_TYPES.get(tensor.datatype, 'TYPE_INVALID')}"
        f" dims: [ {', '.join(str(max(1, size)) for size in tensor.shape)} ] zero_data: true }} }}"
        for tensor in ref.inputs
    )
    kinds = (f'{{\n    name: "zeros {n}"\n    batch_size: {n}\n    count: {count}\n{inputs}\n}}' for n in batch_sizes)
    return f"model_warmup [ {', '.join(kinds)} ]"


def _parameter(name: str, value: str) -> str:
    return f"parameters {{ key: {json.dumps(name)} value {{ string_value: {json.dumps(value)} }} }}"


def intact(root: Path, ref: VersionRef, server: Server, flavour: Flavour, max_bytes: int) -> bool:
    """Whether the repository is there and every file is what it should be. Reads all of it: call it in a thread."""
    model = root / ref.model
    expected = {model / "1" / a.path: a.sha256 for a in needed(ref, max_bytes)}
    if flavour.backend == "pythonOnnx":
        expected[model / "1" / "model.py"] = sha256_file(_RUNTIME)
    expected[model / "config.pbtxt"] = hashlib.sha256(config(ref, server, flavour).encode()).hexdigest()
    # Byte code that a server wrote is no part of what was proved.
    for cache in list(root.rglob("__pycache__")):
        shutil.rmtree(cache, ignore_errors=True)
    found = {path for path in root.rglob("*") if path.is_file()}
    return found == set(expected) and all(sha256_file(path) == digest for path, digest in expected.items())


async def write(
    root: Path, ref: VersionRef, server: Server, flavour: Flavour, source: ArtifactSource, *, max_bytes: int
) -> None:
    """Write the repository to `root`, whole or not at all.

    Raises:
        DataLossError: an artifact has another digest than the version names; nothing is left behind.
        FailedPreconditionError: the version cannot be served.
        MillraceError: the registry does not answer now.
    """
    files = needed(ref, max_bytes)
    scratch = root.with_name(f".{root.name}.{uuid4().hex}")
    folder = scratch / ref.model / "1"
    folder.mkdir(parents=True)
    try:
        await _bring(folder, files, source)
        if flavour.backend == "pythonOnnx":
            shutil.copyfile(_RUNTIME, folder / "model.py")
        (scratch / ref.model / "config.pbtxt").write_text(config(ref, server, flavour), encoding="utf-8")
        if root.exists():
            shutil.rmtree(root)
        scratch.rename(root)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_shared(root: Path, ref: VersionRef, server: Server, flavour: Flavour) -> None:
    """Begin a repository of several versions, without any; what was there goes."""
    shutil.rmtree(root, ignore_errors=True)
    (root / ref.model).mkdir(parents=True)
    (root / ref.model / "config.pbtxt").write_text(config(ref, server, flavour), encoding="utf-8")


def open_model(root: Path, ref: VersionRef, server: Server, flavour: Flavour) -> None:
    """Make a model's place in a repository of many, where it has no version there yet; else it stays as its versions were loaded with it."""
    model = root / ref.model
    if any(model.glob("[0-9]*")):
        return
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.pbtxt").write_text(config(ref, server, flavour), encoding="utf-8")


async def add_version(root: Path, ref: VersionRef, flavour: Flavour, source: ArtifactSource, *, max_bytes: int) -> None:
    """Add a version to a repository of several, whole or not at all; nothing of the others is touched.

    Raises:
        DataLossError: an artifact has another digest than the version names; nothing is left behind.
        FailedPreconditionError: the version cannot be served.
        MillraceError: the registry does not answer now.
    """
    scratch = root / f".{uuid4().hex}"
    scratch.mkdir()
    try:
        await _bring(scratch, needed(ref, max_bytes), source)
        if flavour.backend == "pythonOnnx":
            shutil.copyfile(_RUNTIME, scratch / "model.py")
            (scratch / DIGESTS_FILE).write_text(_digests(ref), encoding="utf-8")
            # Byte code written later would look like a change, and a changed version is loaded anew.
            (scratch / "__pycache__").touch()
        target = root / ref.model / server_versions.number(ref.version)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_version(root: Path, ref: VersionRef) -> None:
    """Take a version out of a repository of several."""
    shutil.rmtree(root / ref.model / server_versions.number(ref.version), ignore_errors=True)


async def _bring(folder: Path, files: Sequence[ArtifactRef], source: ArtifactSource) -> None:
    for artifact in files:
        target = folder / artifact.path
        target.parent.mkdir(parents=True, exist_ok=True)
        await source.fetch(artifact, target)


def keep_versions(root: Path, model: str, versions: Sequence[str]) -> bool:
    """Take all but these versions out of a repository of several; whether there was any."""
    kept = {server_versions.number(version) for version in versions}
    others = [path for path in (root / model).glob("[0-9]*") if path.name not in kept]
    for path in others:
        shutil.rmtree(path, ignore_errors=True)
    return bool(others)
