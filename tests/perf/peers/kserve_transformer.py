"""KServe's side of `tests.perf.peers`, run in its own environment: a transformer that looks features up by Feast and asks a predictor.

`python kserve_transformer.py --model_name NAME --predictor_host HOST:PORT --predictor_protocol v2 --http_port N`, as KServe starts one. Feast's
SDK runs in the transformer's process, which costs less than the feature server that KServe's own example asks over HTTP.
"""

import argparse
import asyncio
import os

import numpy as np
from feast import FeatureStore
from kserve import InferInput, InferRequest, InferResponse, Model, ModelServer, logging, model_server


class Transformer(Model):
    """An entity's key -> features -> the predictor's answer."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._store = FeatureStore(repo_path=os.environ["PEER_FEAST"])
        self._service = self._store.get_feature_service("wide")
        self._names = os.environ["PEER_FEATURES"].split(",")
        self.ready = True

    async def preprocess(self, payload: InferRequest, headers: dict[str, str] | None = None) -> InferRequest:
        features = await asyncio.to_thread(self._look_up, payload.inputs[0].data[0])
        tensor = InferInput("features", list(features.shape), "FP32")
        tensor.set_data_from_numpy(features, binary_data=True)
        return InferRequest(model_name=self.name, infer_inputs=[tensor])

    def postprocess(self, result: InferResponse, headers: dict[str, str] | None = None) -> InferResponse:
        return result

    def _look_up(self, user: str) -> np.ndarray:
        found = self._store.get_online_features(features=self._service, entity_rows=[{"user": user}]).to_dict()
        return np.array([[found[name][0] for name in self._names]], np.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(parents=[model_server.parser])
    arguments, _ = parser.parse_known_args()
    logging.configure_logging(arguments.log_config_file)
    ModelServer(access_log_format=None).start([Transformer(arguments.model_name)])
