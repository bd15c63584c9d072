"""Stage evaluate: compares both variants, and the mean of the two, on flights that none of them has seen; picks the best by AUC."""

import numpy as np
from common import Dataset, Stage, write_json
from metrics import calibration, figures

VARIANTS = ("a", "b")


def main() -> None:
    """Write `evaluation.json` and the chosen candidate's held-out predictions."""
    stage = Stage.from_environment()
    data = Dataset.load(stage.inputs["validate"])
    labels = data.labels[data.split :].astype(np.float64)
    scores = {name: np.load(stage.inputs[f"train_{name}"] / "heldout.npy") for name in VARIANTS}
    # The mean of the logits, as the exported graph computes it.
    logits = np.mean([np.log(s) - np.log1p(-s) for s in (np.clip(s, 1e-9, 1 - 1e-9) for s in scores.values())], axis=0)
    scores["ab"] = 1 / (1 + np.exp(-logits))
    measured = {name: figures(labels, candidate) for name, candidate in scores.items()}
    chosen = max(measured, key=lambda name: (measured[name]["auc"], name))
    for name, values in measured.items():
        said = ", ".join(f"{figure} {value:.4f}" for figure, value in values.items())
        print(f"{name}{' (chosen)' if name == chosen else ''}: {said}", flush=True)
    np.save(stage.output / "predictions.npy", scores[chosen])
    write_json(
        stage.output / "evaluation.json",
        {
            "chosen": chosen,
            "members": list(chosen),
            "rows": len(labels),
            "candidates": measured,
            "calibration": calibration(labels, scores[chosen]),
        },
    )
    stage.result(chosen=chosen, rows=len(labels), **{name: round(value, 4) for name, value in measured[chosen].items()})


if __name__ == "__main__":
    main()
