"""What an A/B test or a shadow run compares: metrics, each with how its values are known. Pure."""

from millrace_rollout_controller.manifest import ABTest, Rollout, Spec
from millrace_rollout_controller.value_gates import Goal, Tracked, Valued, tracked

LATENCY = "latencyP99Ms"
"""The only one that is no mean."""


def compared(spec: Spec) -> tuple[Goal, ...]:
    """What the strategy reports; of an A/B test the goal at least."""
    rollout = spec.rollout
    if rollout.strategy == "Shadow":
        # Nobody acts on a shadow's answers, so they have no outcomes.
        return Goal("errorRate"), Goal(LATENCY)
    if rollout.strategy != "ABTest":
        return ()
    goal = (rollout.ab_test or ABTest()).as_goal
    always = ("errorRate", LATENCY, "outcome/accuracy", "outcome/brier")
    found = tuple(goal if metric == goal.metric else Goal(metric) for metric in always)
    return found if goal in found else (*found, goal)


def confidence(spec: Spec) -> float:
    """Confidence of the comparisons."""
    block = spec.rollout.ab_test or spec.rollout.shadow
    return block.confidence if block is not None else ABTest().confidence


def tracked_values(rollout: Rollout) -> frozenset[Tracked]:
    """What the gates and the goal of a rollout need to be tracked."""
    wanted: list[Valued] = [*rollout.gates]
    if rollout.ab_test is not None:
        wanted.append(rollout.ab_test.as_goal)
    return frozenset(value for one in wanted if (value := tracked(one)) is not None)
