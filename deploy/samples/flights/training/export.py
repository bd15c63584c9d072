"""Stage export: writes the chosen candidate as `model.onnx` and makes sure that it answers as torch did."""

import numpy as np
import onnxruntime as ort
from common import Dataset, Doubles, Floats, Stage, read_json
from graph import build

TOLERANCE = 1e-4
ROWS = 5_000


def main() -> None:
    """Build, compare with torch's held-out predictions, write."""
    stage = Stage.from_environment()
    data = Dataset.load(stage.inputs["validate"])
    evaluation = read_json(stage.inputs["evaluate"] / "evaluation.json")
    models = [dict(np.load(stage.inputs[f"train_{member}"] / "model.npz")) for member in evaluation["members"]]
    content = build(models, data.names)
    expected = np.load(stage.inputs["evaluate"] / "predictions.npy")[:ROWS]
    difference = float(np.max(np.abs(run(content, data.features[data.split : data.split + ROWS]) - expected)))
    if difference > TOLERANCE:
        stage.refuse(f"ONNX and torch differ by {difference:.2g}, allowed is {TOLERANCE}")
    (stage.output / "model.onnx").write_bytes(content)
    print(f"model.onnx: {len(content) / 1024:.0f} KiB, differs from torch by at most {difference:.2g}", flush=True)
    stage.result(bytes=len(content), largest_difference=difference, members="+".join(evaluation["members"]))


def run(content: bytes, features: Floats) -> Doubles:
    """Probabilities of shape (rows,) by onnxruntime, one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    answers = session.run(["probability"], {"features": np.asarray(features, dtype=np.float32)})[0]
    return np.asarray(answers[:, 0], dtype=np.float64)


if __name__ == "__main__":
    main()
