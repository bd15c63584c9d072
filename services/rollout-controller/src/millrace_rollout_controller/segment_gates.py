"""Gates that judge groups of predictions by themselves: by a feature, a column of the outcome's record, or the caller.

The chance of a wrong failure is split: half on all predictions together, half in equal parts on as many groups as can be told apart, whether
there are so many or not. Any of them that fails sends the candidate back. The gate passes when all predictions together have passed and no group with
enough values looks worse than allowed; that every group has to be right needs no correction.
"""

import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet

from millrace_rollout_controller.counts import Counts, Sums
from millrace_rollout_controller.manifest import Gate
from millrace_rollout_controller.shadow_pairs import WHOLE
from millrace_rollout_controller.state import GateView, Verdict
from millrace_rollout_controller.value_gates import Valued, tracked

GROUPS = 18
"""What the drift monitor keeps apart: 16 by name, the others together, and those without a value."""
PRICE = math.log(2.0 * GROUPS)
"""Logarithm by which a group's evidence has to be stronger."""
_NAMED = 6
"""Groups of one verdict that are named in the evidence."""


def groups(gate: Valued, candidate: Counts, stable: Counts) -> Iterator[tuple[str, Counts, Counts]]:
    """Every group with its own figures of both versions."""
    value = tracked(gate)
    if value is None:
        return
    mine, theirs = candidate.values.get(value.key, {}), stable.values.get(value.key, {})
    for name in sorted((mine.keys() | theirs.keys()) - {WHOLE}):
        one, other = (Counts(values={value.key: {WHOLE: sums.get(name, Sums())}}) for sums in (mine, theirs))
        yield name, one, other


def of_group(gate: Gate) -> Gate:
    """The gate as a group's failure is tested."""
    return gate.model_copy(update={"confidence": 1.0 - (1.0 - gate.level) / (2.0 * GROUPS)})


def of_whole(gate: Gate) -> Gate:
    """The gate as the failure of all together is tested."""
    return gate.model_copy(update={"confidence": 1.0 - (1.0 - gate.level) / 2.0})


def together(whole: GateView, halved: GateView, parts: Mapping[str, GateView], bad: AbstractSet[str]) -> GateView:
    """The gate's verdict.

    Args:
        whole: of all predictions at the gate's confidence.
        halved: the same with half of the error.
        parts: of the groups, each with its part of the error.
        bad: groups that look worse than allowed.
    """
    failed = sorted(name for name, view in parts.items() if view.verdict == "fail")
    words = f"all: {halved.evidence if halved.verdict == 'fail' else whole.evidence}"
    for name in failed[:_NAMED]:
        words = f"segment {name!r} failed: {parts[name].evidence}; {words}"
    looks_bad = sorted(bad - set(failed))
    others = sorted(parts.keys() - bad - set(failed))
    for title, names in (("look worse than allowed", looks_bad), ("within the limit so far", others)):
        if names:
            more = ", …" if len(names) > _NAMED else ""
            words += f"; {len(names)} of {len(parts)} segments {title}: {', '.join(map(repr, names[:_NAMED]))}{more}"
    verdict: Verdict = "undecided"
    if failed or halved.verdict == "fail":
        verdict = "fail"
    elif whole.verdict == "pass" and not looks_bad:
        verdict = "pass"
    return whole.model_copy(update={"verdict": verdict, "evidence": words})
