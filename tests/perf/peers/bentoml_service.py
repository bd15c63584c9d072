"""BentoML's side of `tests.perf.peers`, run by `bentoml serve` in its own environment: the ONNX model, one worker, no batching."""

import os

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(workers=1, metrics={"enabled": False})
class Onnx:
    """features -> probability."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["PEER_MODEL"], options)

    @bentoml.api
    def predict(self, features: list[list[float]]) -> list[list[float]]:
        (found,) = self._session.run(None, {"features": np.array(features, np.float32)})
        return found.tolist()
