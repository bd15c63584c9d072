"""The group-sequential look of a comparison with a declared maximum (`maxSamples`). Pure."""

import numpy as np
from millrace_kit import group_sequential
from pydantic import BaseModel

from millrace_rollout_controller.counts import Sums


class Look(BaseModel):
    """One look that was taken."""

    fraction: float
    """Of the declared maximum."""
    information: float
    boundary: float
    z: float

    @property
    def proved(self) -> bool:
        """Whether it reached its boundary."""
        return self.z >= self.boundary


def due(looks: list[Look], n: float, most: int) -> bool:
    """Whether another look may be taken at `n` candidate values."""
    taken = int(looks[-1].fraction * group_sequential.LOOKS + 1e-9) if looks else 0
    return taken < group_sequential.LOOKS and n * group_sequential.LOOKS >= most * (taken + 1)


def look(
    looks: list[Look],
    candidate: Sums,
    stable: Sums,
    ratio: float,
    *,
    room: float,
    shift: float,
    most: int,
    alpha: float,
) -> Look:
    """Take a look.

    Args:
        looks: those before.
        candidate: all values of the candidate.
        stable: all values of stable of the same time.
        ratio: sum over batches of the candidate's count squared by stable's count.
        room: how much less than what is to be refuted the candidate seems to lose.
        shift: candidate minus stable that is to be refuted.
        most: declared maximum of candidate values.
        alpha: chance of a false pass over all looks.
    """
    arms = [tuple(np.asarray(value) for value in (sums.n, sums.total, sums.square)) for sums in (candidate, stable)]
    error = float(group_sequential.standard_error(arms[0], arms[1], np.asarray(ratio), shift))
    # Information cannot fall; with a variance estimated anew it might by a hair.
    information = max(1.0 / error**2, looks[-1].information * (1.0 + 1e-6) if looks else 0.0)
    fraction = min(1.0, candidate.n / most)
    before = group_sequential.spent(looks[-1].fraction, alpha) if looks else 0.0
    boundary = group_sequential.next_boundary(
        [*(one.information for one in looks), information],
        [one.boundary for one in looks],
        group_sequential.spent(fraction, alpha) - before,
    )
    return Look(fraction=fraction, information=information, boundary=boundary, z=room / error)
