"""Fixtures of the rollout controller's tests."""

import pytest

from .support import onnx_model


@pytest.fixture(scope="session")
def tiny() -> bytes:
    return onnx_model(0.1)
