"""Which way a version may go, and what it needs for it."""

from collections.abc import Mapping

from millrace_kit.errors import FailedPreconditionError

from millrace_registry.models import Approval, Stage, Version

# Forward one stage at a time; back one when a stage did not hold what the one before promised; Archived from everywhere.
# An archived version can only begin again, so nothing returns to users without passing its checks anew.
NEXT: Mapping[Stage, frozenset[Stage]] = {
    Stage.DEVELOPMENT: frozenset({Stage.TESTING, Stage.ARCHIVED}),
    Stage.TESTING: frozenset({Stage.STAGING, Stage.DEVELOPMENT, Stage.ARCHIVED}),
    Stage.STAGING: frozenset({Stage.PRODUCTION, Stage.TESTING, Stage.ARCHIVED}),
    Stage.PRODUCTION: frozenset({Stage.STAGING, Stage.ARCHIVED}),
    Stage.ARCHIVED: frozenset({Stage.DEVELOPMENT}),
}
# Stages an approval can be recorded for.
APPROVABLE = frozenset({Stage.TESTING, Stage.STAGING, Stage.PRODUCTION})
NEEDS_APPROVAL = frozenset({Stage.PRODUCTION})


def open_approvals(version: Version) -> tuple[Approval, ...]:
    """Approvals no promotion has used up: each promotion to Production needs one given since the last."""
    return version.approvals[version.spent_approvals :]


def check_transition(version: Version, to_stage: Stage) -> None:
    """Refuse what is not on the way.

    Raises:
        FailedPreconditionError: no such step from the current stage, or its approval is missing.
    """
    content = version.content
    metadata = {
        "model": content.model, "version": content.version, "stage": version.stage.value, "to_stage": to_stage.value,
    }  # fmt: skip
    if to_stage not in NEXT[version.stage]:
        ways = ", ".join(sorted(NEXT[version.stage]))
        message = f"{content.model} {content.version} is in {version.stage} and can go to: {ways}; not to {to_stage}"
        raise FailedPreconditionError("ILLEGAL_TRANSITION", message, metadata)
    if to_stage in NEEDS_APPROVAL and not any(a.to_stage is to_stage for a in open_approvals(version)):
        message = f"{content.model} {content.version} needs an approval for {to_stage} first"
        raise FailedPreconditionError("APPROVAL_MISSING", message, metadata)
