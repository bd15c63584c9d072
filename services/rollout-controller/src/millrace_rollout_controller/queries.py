"""Queries of gates: what is asked of Prometheus about one trial. Pure."""

import re
from collections.abc import Mapping, Sequence

from millrace_rollout_controller.gate_rules import PLACEHOLDERS
from millrace_rollout_controller.manifest import Gate


def render(promql: str, subject: Mapping[str, str]) -> str:
    """The query with `{{model}}`, `{{candidate}}`, `{{stable}}` and `{{namespace}}` filled in.

    Nothing can end a PromQL string: names and versions hold letters, digits, dots, `+`, `_` and `-` only.
    """
    names = "|".join(PLACEHOLDERS)
    return re.sub(rf"\{{\{{({names})\}}\}}", lambda found: subject[found[1]], promql)


def queries(gates: Sequence[Gate], subject: Mapping[str, str]) -> dict[int, str]:
    """Final texts by the index of their gate."""
    return {i: render(gate.promql, subject) for i, gate in enumerate(gates) if gate.promql is not None}
