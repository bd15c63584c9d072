"""What came by HTTP is the message a gRPC client would have sent: held against Triton's own two clients."""

import gzip
import json
import struct

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_inference_gateway.v2_bodies import HttpForm, request_message, response_message
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype

TYPES = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8"]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_both_clients_say_the_same(data: st.DataObject) -> None:
    inputs = []
    for number in range(data.draw(st.integers(1, 3))):
        dtype = np.dtype(data.draw(st.sampled_from(TYPES)))
        shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        values = np.array(data.draw(st.lists(st.integers(0, 1 if dtype == "?" else 100), min_size=27, max_size=27)))
        inputs.append((f"in{number}", values[: int(np.prod(shape))].reshape(shape).astype(dtype)))
    if data.draw(st.booleans()):
        inputs.append(("text", np.array([["a", "schön"]], np.object_)))
    binary = data.draw(st.booleans())
    by_http, wanted = [], service_pb2.ModelInferRequest(model_name="m")
    for name, values in inputs:
        kind = np_to_triton_dtype(values.dtype)
        tensor = http_client.InferInput(name, list(values.shape), kind)
        tensor.set_data_from_numpy(values, binary_data=binary)
        by_http.append(tensor)
        same = grpc_client.InferInput(name, list(values.shape), kind)
        same.set_data_from_numpy(values)
        wanted.inputs.append(same._get_tensor())
        wanted.raw_input_contents.append(same._get_content())
    wanted.outputs.add(name="out")
    outputs = [http_client.InferRequestedOutput("out", binary_data=binary)]
    body, size = http_client.InferenceServerClient.generate_request_body(by_http, outputs=outputs)
    body = body.encode() if isinstance(body, str) else bytes(body)
    packed = data.draw(st.booleans())
    form = HttpForm(size or 0, "gzip" if packed else "")
    assert request_message(gzip.compress(body) if packed else body, "m", form) == wanted


def test_parameters_go_along_and_those_of_the_transport_do_not() -> None:
    document = {
        "parameters": {"priority": 3, "binary_data_output": True, "flag": True, "text": "x", "half": 0.5},
        "inputs": [{"name": "a", "shape": [1], "datatype": "FP32", "data": [1], "parameters": {"p": 1}}],
        "outputs": [{"name": "o", "parameters": {"classification": 2, "binary_data": False}}],
    }
    found = request_message(json.dumps(document).encode(), "m", HttpForm())
    assert found is not None
    assert {name: value.WhichOneof("parameter_choice") for name, value in found.parameters.items()} == {
        "priority": "int64_param", "flag": "bool_param", "text": "string_param", "half": "double_param",
    }  # fmt: skip
    assert found.inputs[0].parameters["p"].int64_param == 1
    assert dict(found.outputs[0].parameters).keys() == {"classification"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"inputs": [{"name": "a", "shape": [1], "datatype": "FP99", "data": [1]}]}',
        b'{"inputs": [{"name": "a", "shape": [1], "datatype": "UINT8", "data": [300]}]}',
        b'{"inputs": [{"name": "a", "shape": [1], "datatype": "FP32", "data": [[1], [2, 3]]}]}',
        b'{"inputs": [{"name": "a", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}]}abc',
        b"[" * 100_000,
    ],
)
def test_what_is_no_v2_is_nothing(body: bytes) -> None:
    assert request_message(body, "m", HttpForm(max(0, len(body) - 3) if body.endswith(b"abc") else 0)) is None


def test_a_compressed_frame_is_a_message_too() -> None:
    message = service_pb2.ModelInferResponse(model_name="m")
    packed = gzip.compress(message.SerializeToString())
    assert response_message(struct.pack(">BI", 1, len(packed)) + packed) == message
    assert response_message(struct.pack(">BI", 1, 3) + b"abc") is None
