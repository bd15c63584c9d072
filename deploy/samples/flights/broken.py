"""Two bad versions of a good model, made on purpose, for rollouts to find out.

Both keep the signature and answer every request: nothing is wrong with them that a health check could see.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BASE_VIEWS = ("schedule", "origin_weather")
# Side of the square matrices that the slow version multiplies, and how many of them.
SIDE = 1024
ROUNDS = 24


def wrong_order(model: bytes, names: Sequence[str]) -> bytes:
    """`model` reading its history columns in alphabetical order, as after a change of the vector that the model did not follow.

    Schedule and weather stay in their places, and answers keep about the spread they had, so a look at them tells nothing; but a count is
    read as a mean and an hour as a week.

    Args:
        model: serialised ONNX model with input `features` of shape (n, N).
        names: N feature names, `view__feature`, in vector order.
    """
    history = [i for i, name in enumerate(names) if name.split("__")[0] not in BASE_VIEWS]
    order = np.arange(len(names), dtype=np.int64)
    order[history] = sorted(history, key=lambda i: names[i])
    changed = onnx.load_from_string(model)
    graph = changed.graph
    _rename_input(graph, "features", "features_in_wrong_order")
    graph.initializer.append(numpy_helper.from_array(order, "wrong_order"))
    graph.node.insert(0, helper.make_node("Gather", ["features", "wrong_order"], ["features_in_wrong_order"], axis=1))
    return _checked(changed)


def slow(model: bytes, names: Sequence[str], rounds: int = ROUNDS) -> bytes:
    """`model` with `rounds` products of 1024 x 1024 matrices on the way to the same answer.

    The work hangs on the answer, so no optimiser can leave it out; what it adds to the answer is exactly 0. The matrix is made when the
    model is loaded, so the file hardly grows. About 52 GFLOP at 24 rounds, whatever the batch.

    Args:
        model: serialised ONNX model with output `probability` of shape (n, 1).
        names: feature names; not used, it is here so that both makers are called alike.
        rounds: matrix products.
    """
    del names
    changed = onnx.load_from_string(model)
    graph = changed.graph
    for node in graph.node:
        node.output[:] = ["fast_probability" if name == "probability" else name for name in node.output]
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([SIDE, SIDE], np.int64), "slow_shape"),
            numpy_helper.from_array(np.array(0.0, np.float32), "slow_zero"),
        ]
    )
    even = helper.make_tensor("value", TensorProto.FLOAT, [1], [1.0 / SIDE])
    graph.node.extend(
        [
            helper.make_node("ConstantOfShape", ["slow_shape"], ["slow_matrix"], value=even),
            helper.make_node("ReduceMean", ["fast_probability"], ["slow_seed"], keepdims=1),
            helper.make_node("Expand", ["slow_seed", "slow_shape"], ["slow_0"]),
            *(helper.make_node("MatMul", [f"slow_{i}", "slow_matrix"], [f"slow_{i + 1}"]) for i in range(rounds)),
            helper.make_node("ReduceMean", [f"slow_{rounds}"], ["slow_mean"], keepdims=0),
            helper.make_node("Mul", ["slow_mean", "slow_zero"], ["slow_nothing"]),
            helper.make_node("Add", ["fast_probability", "slow_nothing"], ["probability"]),
        ]
    )
    return _checked(changed)


def _rename_input(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let every node that reads `old` read `new`."""
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def _checked(model: onnx.ModelProto) -> bytes:
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))
