"""MLServer's side of `tests.perf.peers`, run by MLServer in its own environment: the ONNX model, and the same after a look-up at Feast."""

import asyncio
import os

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


def session() -> onnxruntime.InferenceSession:
    """The model with one thread, as Triton's."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(os.environ["PEER_MODEL"], options)


class Onnx(MLModel):
    """features -> probability."""

    async def load(self) -> bool:
        self._session = session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        features = NumpyCodec.decode_input(payload.inputs[0])
        (found,) = self._session.run(None, {"features": features})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("probability", found)])


class Looked(MLModel):
    """An entity's key -> its features from Redis by Feast's SDK in this process -> probability."""

    async def load(self) -> bool:
        from feast import FeatureStore

        self._session = session()
        self._store = FeatureStore(repo_path=os.environ["PEER_FEAST"])
        self._service = self._store.get_feature_service("wide")
        self._names = os.environ["PEER_FEATURES"].split(",")
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        user = payload.inputs[0].data[0]
        features = await asyncio.to_thread(self._look_up, user.decode() if isinstance(user, bytes) else user)
        (found,) = self._session.run(None, {"features": features})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("probability", found)])

    def _look_up(self, user: str) -> np.ndarray:
        found = self._store.get_online_features(features=self._service, entity_rows=[{"user": user}]).to_dict()
        return np.array([[found[name][0] for name in self._names]], np.float32)
