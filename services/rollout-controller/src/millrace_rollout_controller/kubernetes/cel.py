"""What CEL rules of the CRD are made of."""

Rule = dict[str, str]
DURATION = {
    "rule": "duration(self) > duration('0s') && duration(self) <= duration('720h')",
    "message": "must be more than 0 and at most 720h",
}


def demand(expression: str, message: str, field: str = "") -> Rule:
    """A rule that refuses an object for which the expression is not true.

    Args:
        expression: CEL; `self` is the value it stands at.
        message: why it is refused.
        field: path from there to the field that is named.
    """
    return {"rule": expression, "message": message} | ({"fieldPath": field} if field else {})
