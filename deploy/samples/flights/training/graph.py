"""The trained networks as one ONNX graph, built node by node: same weights, same bytes.

The graph takes the whole raw vector of the feature service, `features` FP32 [n, N] with NaN for missing, and gives `probability` FP32 [n, 1].
Columns are picked inside, so versions that look at fewer features keep the signature.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from encoding import CUT
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 9

Arrays = Mapping[str, npt.NDArray[np.generic]]


class _Graph:
    """Nodes and constants under way; every method returns the name of a tensor."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: npt.ArrayLike, dtype: type[np.generic] = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype=dtype), name))
        return name

    def node(self, operator: str, *inputs: str, **attributes: object) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def clip(self, tensor: str, low: float, high: float) -> str:
        return self.node("Clip", tensor, self.constant(low), self.constant(high))

    def pick(self, tensor: str, columns: npt.NDArray[np.generic]) -> str:
        return self.node("Gather", tensor, self.constant(columns, np.int64), axis=1)

    def or_else(self, absent: str, tensor: str, value: float) -> str:
        return self.node("Where", absent, self.constant(value), tensor)


def build(models: Sequence[Arrays], names: Sequence[str]) -> bytes:
    """Serialised ONNX model: the sigmoid of the mean of the models' logits.

    Args:
        models: arrays of `model.npz`: `encoding.*`, `embedding.*`, `layer.*`.
        names: N feature names in vector order, kept in the model's metadata.
    """
    graph = _Graph()
    logits = [_logit(graph, model) for model in models]
    total = graph.node("Sum", *logits)
    mean = graph.node("Mul", total, graph.constant(1 / len(logits)))
    graph.nodes.append(helper.make_node("Sigmoid", [mean], ["probability"]))
    made = helper.make_graph(
        graph.nodes,
        "flight-delay",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", len(names)])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 1])],
        graph.constants,
    )
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="millrace-flights"
    )
    helper.set_model_props(model, {"feature_names": ",".join(names)})
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _logit(graph: _Graph, model: Arrays) -> str:
    parts = [*_numbers(graph, model), *_embeddings(graph, model)]
    state = graph.node("Concat", *parts, axis=1)
    last = sum(name.startswith("layer.") and name.endswith(".weight") for name in model) - 1
    for layer in range(last + 1):
        weight, bias = graph.constant(model[f"layer.{layer}.weight"]), graph.constant(model[f"layer.{layer}.bias"])
        state = graph.node("Gemm", state, weight, bias)
        if layer < last:
            state = graph.node("Mul", state, graph.node("Sigmoid", state))
    return state


def _numbers(graph: _Graph, model: Arrays) -> list[str]:
    values = graph.pick("features", model["encoding.number_columns"])
    absent = graph.node("IsNaN", values)
    logs = graph.node("Log", graph.node("Add", graph.node("Abs", values), graph.constant(1.0)))
    signed = graph.node("Mul", graph.node("Sign", values), logs)
    centred = graph.node("Sub", signed, graph.constant(model["encoding.mean"]))
    standard = graph.clip(graph.node("Mul", centred, graph.constant(model["encoding.scale"])), -CUT, CUT)
    parts = [graph.or_else(absent, standard, 0.0)]
    if len(model["encoding.missing"]):
        ever_absent = graph.pick(graph.node("Cast", absent, to=TensorProto.FLOAT), model["encoding.missing"])
        parts.append(ever_absent)
    if len(model["encoding.bin_column"]):
        known = graph.pick(graph.or_else(absent, values, 0.0), model["encoding.bin_column"])
        above = graph.node("Sub", known, graph.constant(model["encoding.bin_low"]))
        reach = graph.clip(graph.node("Mul", above, graph.constant(model["encoding.bin_scale"])), 0.0, 1.0)
        centred = graph.node("Sub", reach, graph.constant(0.5))
        # Booleans cannot be gathered everywhere, numbers can.
        mask = graph.pick(graph.node("Cast", absent, to=TensorProto.FLOAT), model["encoding.bin_column"])
        parts.append(graph.or_else(graph.node("Cast", mask, to=TensorProto.BOOL), centred, 0.0))
    return parts


def _embeddings(graph: _Graph, model: Arrays) -> list[str]:
    parts = []
    for place, column in enumerate(np.asarray(model["encoding.code_columns"])):
        rows = float(np.asarray(model["encoding.vocabulary"])[place])
        code = graph.node("Add", graph.pick("features", np.array([column])), graph.constant(1.0))
        inside = graph.clip(graph.or_else(graph.node("IsNaN", code), code, 0.0), 0.0, rows)
        unknown = graph.node("GreaterOrEqual", inside, graph.constant(rows))
        index = graph.node("Cast", graph.or_else(unknown, inside, 0.0), to=TensorProto.INT64)
        flat = graph.node("Squeeze", index, graph.constant([1], np.int64))
        parts.append(graph.node("Gather", graph.constant(model[f"embedding.{place}"]), flat, axis=0))
    return parts
