"""What a step is: its kind's parameters, what it has learned, its outputs, and the function from columns to columns."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from millrace_kit.settings import Settings

from millrace_feature.transformers.columns import Column, Floats, Rows

State = dict[str, Any]
"""What a step has learned, as plain JSON without NaN."""


class Parameters(Settings):
    """Parameters of a kind; strict, frozen, unknown names refused."""


class Step:
    """One fitted step; immutable once made, so it may be applied from any thread.

    Args:
        names: names of its inputs.
        base: `output` of its specification, or empty.
        parameters: of the class's `Given`.
        state: what `fit` returned.
    """

    kind: ClassVar[str]
    Given: ClassVar[type[Parameters]] = Parameters

    def __init__(self, names: Sequence[str], base: str, parameters: Any, state: State) -> None:
        self.names = tuple(names)
        self.base = base
        self.given = parameters
        self.state = state
        self.outputs: tuple[str, ...] = self._named()

    @classmethod
    def fit(cls, parameters: Any, rows: Rows) -> State:
        """Learn from `rows`; a kind that learns nothing has no state.

        Raises:
            ValueError: the rows hold nothing to learn from; the message names the input.
        """
        del parameters, rows
        return {}

    @classmethod
    def made(cls, names: Sequence[str], base: str, parameters: dict[str, Any], state: State) -> Self:
        """The step of plain values."""
        return cls(names, base, cls.Given.model_validate(parameters), state)

    def apply(self, columns: Sequence[Column], folds: Sequence[int] | None = None) -> list[Floats]:
        """Outputs for the inputs `columns`, in the order of `outputs`; NaN where missing. A row's values depend on that row alone.

        Args:
            columns: the inputs, one value a row.
            folds: fold of each row that the step was fitted on, -1 for other rows; None: it was fitted on none of them.
        """
        del folds
        return [self.column(i, column) for i, column in enumerate(columns)]

    def column(self, place: int, column: Column) -> Floats:
        """The output for input `place`, for kinds that make one of one."""
        raise NotImplementedError

    def _named(self) -> tuple[str, ...]:
        return tuple(self.root(i) for i in range(len(self.names)))

    def root(self, place: int) -> str:
        """What outputs for input `place` are called, or begin with."""
        return self.base if self.base and len(self.names) == 1 else self.names[place]


def per_input(state: State, place: int) -> Any:
    """What was learned for input `place`."""
    return state["inputs"][place]
