"""Numbers to bins: equally wide ones, equally full ones, or given edges. A missing number is in no bin."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from millrace_feature.transformers.columns import Column, Floats, Rows, as_floats
from millrace_feature.transformers.steps import Parameters, State, Step, per_input

MAX_BINS = 1000


class BinParameters(Parameters):
    """Of kind `bin`."""

    strategy: Literal["uniform", "quantile"] = "quantile"
    """Equally wide bins, or equally full ones."""
    bins: int = Field(default=5, ge=2, le=MAX_BINS)
    """How many; equally full bins whose edges coincide become one."""
    edges: tuple[float, ...] = Field(default=(), max_length=MAX_BINS - 1, strict=False)
    """Inner edges in ascending order instead: n edges make n + 1 bins."""
    encode: Literal["ordinal", "onehot"] = "ordinal"
    """The bin's number from 0, or one output a bin."""


class Bin(Step):
    """The bin each number lies in: edge[i] <= x < edge[i + 1]; what lies outside is in the first or the last one."""

    kind = "bin"
    Given: ClassVar[type[Parameters]] = BinParameters

    @classmethod
    def fit(cls, parameters: Any, rows: Rows) -> State:
        """Inner edges per input."""
        if parameters.edges:
            if any(a >= b for a, b in zip(parameters.edges, parameters.edges[1:], strict=False)):
                raise ValueError("edges must ascend")
            return {"inputs": [{"edges": list(parameters.edges)} for _ in rows.inputs]}
        learned = []
        for i, name in enumerate(rows.inputs):
            numbers = rows.numbers(i)
            if len(numbers) == 0 or not np.isfinite(numbers).all():
                raise ValueError(f"input {name!r} needs finite numbers")
            low, high = float(numbers.min()), float(numbers.max())
            if parameters.strategy == "uniform":
                inner = np.linspace(low, high, parameters.bins + 1)[1:-1] if low < high else np.zeros(0)
            else:
                edges = np.percentile(numbers, np.linspace(0, 100, parameters.bins + 1), method="averaged_inverted_cdf")
                wide = edges[
                    np.concatenate([[True], np.diff(edges) > 1e-8])
                ]  # narrower ones hold rounding, not numbers
                inner = wide[1:-1]
            learned.append({"edges": inner.tolist()})
        return {"inputs": learned}

    def apply(self, columns: Sequence[Column], folds: Sequence[int] | None = None) -> list[Floats]:
        """Numbers of bins, or one column a bin."""
        del folds
        outputs: list[Floats] = []
        for i, column in enumerate(columns):
            numbers = as_floats(column)
            edges = np.array(per_input(self.state, i)["edges"], np.float64)
            found = edges.searchsorted(numbers, side="right").astype(np.float64)
            found[np.isnan(numbers)] = np.nan
            if self.given.encode == "ordinal":
                outputs.append(found)
            else:
                outputs.extend((found == b).astype(np.float64) for b in range(len(edges) + 1))
        return outputs

    def _named(self) -> tuple[str, ...]:
        if self.given.encode == "ordinal":
            return super()._named()
        sizes = [len(learned["edges"]) + 1 for learned in self.state["inputs"]]
        return tuple(f"{self.root(i)}_bin{b}" for i, size in enumerate(sizes) for b in range(size))
