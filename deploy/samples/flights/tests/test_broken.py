"""The two bad versions: one answers wrongly, one slowly, and neither shows it from outside."""

import time

import broken
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

NAMES = ["schedule__a", "view__z", "view__m", "view__c"]


def good() -> bytes:
    """The sigmoid of a weighted sum."""
    weights = numpy_helper.from_array(np.array([[1.0], [2.0], [-3.0], [0.5]], np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["features", "w"], ["sum"]),
        helper.make_node("Sigmoid", ["sum"], ["probability"]),
    ]
    graph = helper.make_graph(
        nodes,
        "good",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 1])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def answers(model: bytes, rows: np.ndarray) -> np.ndarray:
    from export import run

    return run(model, rows)


ROWS = np.random.default_rng(2).normal(size=(50, 4)).astype(np.float32)


def test_the_wrong_order_is_the_alphabetical_one_of_the_history() -> None:
    wrong = broken.wrong_order(good(), NAMES)
    assert np.array_equal(answers(wrong, ROWS), answers(good(), ROWS[:, [0, 3, 2, 1]]))
    assert not np.allclose(answers(wrong, ROWS), answers(good(), ROWS))


def test_both_keep_the_signature() -> None:
    wanted = onnx.load_from_string(good()).graph
    for bad in (broken.wrong_order(good(), NAMES), broken.slow(good(), NAMES)):
        graph = onnx.load_from_string(bad).graph
        assert graph.input == wanted.input
        assert graph.output == wanted.output
        assert len(bad) < 10_000_000


def test_the_slow_one_gives_the_same_answer_much_later() -> None:
    slow = broken.slow(good(), NAMES)
    assert np.array_equal(answers(slow, ROWS), answers(good(), ROWS))
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(slow, options, providers=["CPUExecutionProvider"])
    took = []
    for _ in range(3):
        began = time.process_time()
        session.run(None, {"features": ROWS[:1]})
        took.append(time.process_time() - began)
    # 52 GFLOP: no core does that in less.
    assert min(took) > 0.05
