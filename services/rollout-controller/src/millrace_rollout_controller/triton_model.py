"""Runs one ONNX model inside Triton's Python backend. Copied into the model repository; the service itself never imports it.

Tensors cross by DLPack. Triton 2.51's own `as_numpy` and `Tensor(name, array)` were built against numpy 1 and read numpy 2's item size as
0: inputs come out as garbage and outputs empty, without any error.
"""

import ctypes
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

CHUNK_BYTES = 1 << 20
FAILED_ANSWERS = "millrace_failed_answers"
"""Counter beside Triton's own, by model."""
_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.argtypes, _capsule_name.restype = [ctypes.py_object], ctypes.c_char_p
_set_capsule_name = ctypes.pythonapi.PyCapsule_SetName
_set_capsule_name.argtypes, _set_capsule_name.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_int
_FREE = b"dltensor"
_TAKEN = b"used_dltensor"


class _Lent:
    """An array as a DLPack producer that remembers the capsule it gave away."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.capsule: Any = None

    def __dlpack__(self, stream: object = None) -> Any:
        self.capsule = self._array.__dlpack__()
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def _tensor(name: str, array: Any) -> Any:
    lent = _Lent(np.require(array, requirements=["C", "W"]))
    tensor = pb_utils.Tensor.from_dlpack(name, lent)
    if lent.capsule is not None and _capsule_name(lent.capsule) != _FREE:
        # Triton marks a capsule it took in its own way; numpy expects the standard's, and prints an error for each request otherwise.
        _set_capsule_name(lent.capsule, _TAKEN)
    return tensor


class TritonPythonModel:
    """Triton's interface of a Python model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Check the files' digests and open the model from the very bytes that were checked."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        content = b""
        # A model of several versions has them beside each one's files.
        digests = parameters.get("artifacts") or (folder / "artifacts.json").read_text(encoding="utf-8")
        for path, digest in json.loads(digests).items():
            found = hashlib.sha256()
            kept = []
            with (folder / path).open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    found.update(chunk)
                    if path == "model.onnx":
                        kept.append(chunk)
            if found.hexdigest() != digest:
                raise pb_utils.TritonModelException(f"{path} has digest {found.hexdigest()}, not {digest}: not loaded")
            if path == "model.onnx":
                content = b"".join(kept)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters["threads"])
        options.inter_op_num_threads = 1
        # Tensors stored beside the graph are found by this folder.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._inputs = [spec["name"] for spec in config["input"]]
        self._outputs = [spec["name"] for spec in config["output"]]
        # The backend counts an answer that is an error as a success; who reads the statistics needs to know.
        # The family has to outlive its metric.
        self._family = pb_utils.MetricFamily(FAILED_ANSWERS, "Answers that are errors", pb_utils.MetricFamily.COUNTER)
        self._failed = self._family.Metric({"model": config["name"], "version": args["model_version"]})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a batch in one run; when that fails, each request alone, so that one bad request fails alone."""
        inputs = [self._arrays(request) for request in requests]
        if len(requests) == 1:
            return [self._alone(requests[0], inputs[0])]
        try:
            joined = {name: np.concatenate([one[name] for one in inputs]) for name in self._inputs}
            results = self._session.run(self._outputs, joined)
        except Exception:
            return [self._alone(request, one) for request, one in zip(requests, inputs, strict=True)]
        responses, at = [], 0
        for request, one in zip(requests, inputs, strict=True):
            rows = len(one[self._inputs[0]])
            responses.append(self._response(request, [result[at : at + rows] for result in results]))
            at += rows
        return responses

    def _arrays(self, request: Any) -> dict[str, Any]:
        return {name: np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)) for name in self._inputs}

    def _alone(self, request: Any, inputs: dict[str, Any]) -> Any:
        try:
            return self._response(request, self._session.run(self._outputs, inputs))
        except Exception as error:
            self._failed.increment(1)
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)[:1000]))

    def _response(self, request: Any, results: list[Any]) -> Any:
        wanted = set(request.requested_output_names())
        pairs = [(name, value) for name, value in zip(self._outputs, results, strict=True) if name in wanted]
        return pb_utils.InferenceResponse([_tensor(name, value) for name, value in pairs])
