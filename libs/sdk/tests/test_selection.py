"""Judging features: what is left out, why, and what stays."""

import numpy as np
import pyarrow as pa
import pytest
from millrace.areas.transformers import raw_features, step_of
from millrace.selection import Thresholds, report, select
from millrace_kit.errors import InvalidArgumentError

ROWS = 900


def training_rows() -> pa.Table:
    rng = np.random.default_rng(3)
    signal, weak, noise = (rng.normal(size=ROWS) for _ in range(3))
    late = signal + 0.3 * weak + rng.normal(scale=0.4, size=ROWS) > 0
    return pa.table(
        {
            "v__signal": pa.array(signal, mask=rng.random(ROWS) < 0.1),
            "v__copy": signal * 2 + 1,
            "v__weak": weak,
            "v__noise": noise,
            "v__constant": np.ones(ROWS),
            "v__gone": pa.array(noise, mask=np.ones(ROWS, bool)),
            "v__rare": pa.array(noise, mask=rng.random(ROWS) < 0.97),
            "v__city": np.where(late ^ (rng.random(ROWS) < 0.2), "ams", "ber"),
            "late": late,
        }
    )


NAMES = [name for name in training_rows().column_names if name.startswith("v__")]


def test_filters_information_and_permutation_agree_on_what_matters() -> None:
    judged = {item.feature: item for item in select(training_rows(), features=NAMES, label="late")}
    assert judged["v__constant"].reason == "constant"
    assert judged["v__gone"].reason == "missing in 100%"
    assert judged["v__rare"].reason.startswith("missing in 9")
    # The better of two that say the same stays: the copy has no gaps.
    assert judged["v__copy"].is_selected
    assert "with v__copy" in judged["v__signal"].reason
    assert judged["v__weak"].is_selected
    assert judged["v__city"].is_selected
    assert judged["v__city"].scores["mutual_information"] > 0.1
    assert judged["v__copy"].scores["permutation_mean"] > 10 * abs(judged["v__noise"].scores["permutation_mean"])
    assert next(iter(judged)) == "v__copy"


def test_the_same_rows_give_the_same_report() -> None:
    rows, given = training_rows(), Thresholds(max_rows=500, repeats=2, keep=2)
    first, second = (select(rows, features=NAMES, label="late", thresholds=given) for _ in range(2))
    assert first == second
    assert sum(item.is_selected for item in first) == 2
    kept = report("best", "0" * 64, first, given, estimator="trees")
    assert [score.feature for score in kept.features if score.selected] == [i.feature for i in first if i.is_selected]
    assert kept.parameters["keep"] == 2


def test_a_model_of_the_callers_is_asked_instead() -> None:
    def model(rows: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-rows[:, 1]))

    names = ["v__noise", "v__copy", "v__weak"]
    judged = select(training_rows(), features=names, label="late", predict=model)
    assert [item.feature for item in judged if item.is_selected] == ["v__copy"]
    assert {item.reason for item in judged if not item.is_selected} == {"importance 0"}


def test_quantities_are_labels_too() -> None:
    rows = training_rows()
    judged = select(rows, features=["v__noise", "v__copy"], label="v__weak", thresholds=Thresholds(permutation=False))
    assert all("mutual_information" in item.scores for item in judged)


@pytest.mark.parametrize(("rows", "label"), [(10, "late"), (ROWS, "v__constant")])
def test_sets_that_say_nothing_are_refused(rows, label) -> None:
    with pytest.raises(ValueError, match=r"rows|one value"):
        select(training_rows().slice(0, rows), features=["v__noise"], label=label)


def test_steps_are_plain_values() -> None:
    step = step_of(0, {"kind": "bin", "inputs": "v__x", "bins": 4})
    assert (step.kind, list(step.inputs), step.parameters["bins"]) == ("bin", ["v__x"], 4)
    with pytest.raises(InvalidArgumentError, match="needs kind"):
        step_of(0, {"inputs": ["v__x"]})
    steps = [
        {"kind": "impute", "inputs": ["v__x"], "output": "v__filled"},
        {"kind": "standard", "inputs": ["v__filled", "v__y"]},
        {"kind": "hash", "inputs": "v__x"},
    ]
    assert raw_features(steps) == ["v__x", "v__y"]
