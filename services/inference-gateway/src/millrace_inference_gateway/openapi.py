"""The OpenAPI page of what the public port speaks over HTTP, and how Predict becomes REST.

Schemas of Predict are made from the protobuf descriptors, comments included, so that they cannot drift from the contract.
"""

from importlib import resources
from typing import Any

from google.api import annotations_pb2
from google.protobuf import descriptor_pb2, timestamp_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.rpc import error_details_pb2, status_pb2
from millrace_api.prediction.v1 import prediction_pb2

PREDICTION_SERVICE = "millrace_api.prediction.v1.PredictionService"
PREDICT_PATH = "/v1/models/{model}:predict"
_PREDICTION_FILE = "millrace_api/prediction/v1/prediction.proto"
_KINDS = {
    FieldDescriptor.TYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.TYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.TYPE_INT64: {"type": "string", "format": "int64"},
    FieldDescriptor.TYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "format": "byte"},
}
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"type": "string", "example": "FP32"},
        "data": {"type": "array", "items": {}, "description": "Values; left out with the binary tensor extension."},
        "parameters": {"type": "object", "description": "`binary_data_size` with the binary tensor extension."},
    },
}
_V2_ERROR = {
    "description": "What is wrong.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}


def transcoding_descriptors() -> bytes:
    """A `FileDescriptorSet` of the prediction API, with Predict's REST path and the messages errors are made of."""
    content = resources.files("millrace_api").joinpath("descriptors.binpb").read_bytes()
    found = descriptor_pb2.FileDescriptorSet.FromString(content)
    for file in found.file:
        file.ClearField("source_code_info")
        if file.name == _PREDICTION_FILE:
            method = next(m for service in file.service for m in service.method if m.name == "Predict")
            rule = method.options.Extensions[annotations_pb2.http]
            rule.post, rule.body = PREDICT_PATH, "*"
    names = {file.name for file in found.file}
    for module in (timestamp_pb2, status_pb2, error_details_pb2):
        _add(found, names, module.DESCRIPTOR)
    return found.SerializeToString()


def openapi_page(version: str) -> dict[str, Any]:
    """OpenAPI 3.1: V2 by its own definition, Predict by its messages."""
    schemas: dict[str, Any] = {
        "Error": {"type": "object", "properties": {"error": {"type": "string"}}},
        "Tensor": _TENSOR,
        "InferRequest": _object(
            id={"type": "string"}, inputs=_tensors(), outputs=_tensors(), parameters={"type": "object"}
        ),
        "InferResponse": _object(
            id={"type": "string"}, model_name={"type": "string"}, model_version={"type": "string"}, outputs=_tensors()
        ),
    }
    for message in (prediction_pb2.PredictRequest, prediction_pb2.PredictResponse):
        _schema(message.DESCRIPTOR, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Millrace inference gateway", "version": version},
        "paths": {**_v2_paths(), PREDICT_PATH: {"post": _predict()}},
        "components": {"schemas": schemas},
    }


def _v2_paths() -> dict[str, Any]:
    model = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    of_version = [*model, {"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}]
    paths: dict[str, Any] = {
        "/v2": {"get": _operation("The gateway's name, version and extensions")},
        "/v2/health/live": {"get": _operation("Whether the gateway lives")},
        "/v2/health/ready": {"get": _operation("Whether the gateway is ready")},
        "/v2/repository/index": {"post": _operation("Models and their versions")},
    }
    for base, parameters in (("/v2/models/{model}", model), ("/v2/models/{model}/versions/{version}", of_version)):
        paths[base] = {"parameters": parameters, "get": _operation("Inputs and outputs of the model")}
        paths[f"{base}/ready"] = {"parameters": parameters, "get": _operation("Whether the model is ready")}
        paths[f"{base}/config"] = {"parameters": parameters, "get": _operation("The model's configuration")}
        paths[f"{base}/stats"] = {"parameters": parameters, "get": _operation("The model server's statistics")}
        infer = _operation("Infer", request="InferRequest", response="InferResponse")
        paths[f"{base}/infer"] = {"parameters": parameters, "post": infer}
    return paths


def _predict() -> dict[str, Any]:
    found = _operation("Predict with feature look-up", request="PredictRequest", response="PredictResponse")
    found["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    found["responses"]["default"] = {"description": "google.rpc.Status as JSON."}
    return found


def _operation(summary: str, request: str = "", response: str = "") -> dict[str, Any]:
    good: dict[str, Any] = {"description": "OK"}
    if response:
        good["content"] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{response}"}}}
    found: dict[str, Any] = {"summary": summary, "responses": {"200": good, "default": _V2_ERROR}}
    if request:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{request}"}}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def _tensors() -> dict[str, Any]:
    return {"type": "array", "items": {"$ref": "#/components/schemas/Tensor"}}


def _schema(message: Descriptor, schemas: dict[str, Any]) -> dict[str, Any]:
    if message.full_name == "google.protobuf.Timestamp":
        return {"type": "string", "format": "date-time"}
    if message.name not in schemas:
        found = schemas[message.name] = {"type": "object", "properties": {}}
        for field in message.fields:
            found["properties"][field.name] = _field(field, schemas)
    return {"$ref": f"#/components/schemas/{message.name}"}


def _field(field: FieldDescriptor, schemas: dict[str, Any]) -> dict[str, Any]:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return {"type": "object", "additionalProperties": _field(kind.fields_by_name["value"], schemas)}
    if kind is not None:
        found = _schema(kind, schemas)
    elif field.enum_type is not None:
        found = {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    else:
        found = dict(_KINDS.get(field.type, {}))
    return {"type": "array", "items": found} if field.is_repeated else found


def _add(found: descriptor_pb2.FileDescriptorSet, names: set[str], file: Any) -> None:
    for needed in file.dependencies:
        _add(found, names, needed)
    if file.name not in names:
        names.add(file.name)
        file.CopyToProto(found.file.add())
