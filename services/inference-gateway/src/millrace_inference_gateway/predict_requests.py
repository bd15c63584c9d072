"""What a Predict may ask."""

import math

from millrace_api.prediction.v1 import prediction_pb2
from millrace_kit import check
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError

from millrace_inference_gateway.caller_key import MAX_KEY, is_key
from millrace_inference_gateway.predict import MAX_NAME
from millrace_inference_gateway.routes import Route, RouteTable
from millrace_inference_gateway.value_checks import Checks, Findings


def route_of(model: str, table: RouteTable) -> Route:
    """The route of a model that Predict can fill.

    Raises:
        InvalidArgumentError: that is no model's name.
        NotFoundError: there is no such model.
        FailedPreconditionError: the model takes no vector of features.
    """
    check.name(model, "model")
    route = table.routes.get(model)
    if route is None:
        raise NotFoundError("model", model)
    if not route.input_tensor or not route.feature_names:
        text = f"model {route.model!r} has no feature vector; call it by the V2 protocol"
        raise FailedPreconditionError("NO_FEATURE_VECTOR", text, {"model": route.model})
    if route.tensor is None:
        text = f"the input of model {route.model!r} cannot hold {len(route.feature_names)} numbers; call it by the V2 protocol"
        raise FailedPreconditionError("NO_FEATURE_VECTOR", text, {"model": route.model})
    return route


def check_row(request: prediction_pb2.PredictRequest, max_inputs: int, checks: Checks) -> Findings:
    """Check what one prediction is asked with, and say what was let pass.

    Raises:
        InvalidArgumentError: names the field that is wrong.
    """
    odd: list[tuple[str, float]] = []
    if len(request.inputs) > max_inputs:
        raise InvalidArgumentError("inputs", f"has more than {max_inputs} entries")
    for name, value in request.inputs.items():
        if not name or len(name) > MAX_NAME:
            raise InvalidArgumentError("inputs", f"has a name that is empty or longer than {MAX_NAME} characters")
        kind = value.WhichOneof("kind")
        if kind is None:
            raise InvalidArgumentError(f"inputs[{name!r}]", "has no value; leave the input out instead")
        if kind == "double_value" and not math.isfinite(value.double_value):
            odd.append((name, value.double_value))
    for field in ("subject", "sticky_key"):
        text: str = getattr(request, field)
        if text and not is_key(text):
            raise InvalidArgumentError(field, f"needs at most {MAX_KEY} printable ASCII characters")
    if request.HasField("event_time"):
        check.timestamp(request.event_time, "event_time")
    return checks.inputs(request.inputs, odd)
