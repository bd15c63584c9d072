"""Pieces of a build on cases made by hand."""

import numpy as np
import pytest
from millrace_feature.serving import EXPIRED
from millrace_feature.transforms import TransformRunner
from millrace_kit.errors import FailedPreconditionError


def test_a_transform_that_fails_says_which() -> None:
    import dill
    from millrace_feature.plan import Transform

    def wrong(inputs: dict) -> dict:
        return {"out": inputs["a"][:-1]}

    runner = TransformRunner(
        Transform("view", (), ("a",), ("out",), singleton=False, body=dill.dumps(wrong, recurse=True))
    )
    with pytest.raises(FailedPreconditionError, match="view") as caught:
        runner.run({}, {"a": [1.0, 2.0]}, 2)
    assert caught.value.reason == "TRANSFORM_FAILED"


def test_a_singleton_gets_one_row_at_a_time() -> None:
    import dill
    from millrace_feature.plan import Transform

    def double(row: dict) -> dict:
        return {"out": None if row["a"] is None else row["v__b"] * row["a"]}

    body = dill.dumps(double, recurse=True)
    runner = TransformRunner(Transform("view", (("v", "b"),), ("a",), ("out",), singleton=True, body=body))
    (out,) = runner.run({("v", "b"): [3.0, 4.0]}, {"a": [2.0, None]}, 2)
    assert out[0] == 6.0
    assert np.isnan(out[1])


def test_statuses_are_those_of_the_contract() -> None:
    from millrace_api.feature.v1 import feature_pb2

    assert EXPIRED == feature_pb2.FEATURE_STATUS_EXPIRED
