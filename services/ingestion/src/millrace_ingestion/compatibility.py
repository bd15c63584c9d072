"""Which contract may follow which: the differences of two versions, and what each mode allows.

Modes are those of Confluent Schema Registry, about records instead of schemas: BACKWARD keeps every record of the version before good
under the new one (checks loosen, new columns are nullable), FORWARD every record of the new version good under the one before (checks
tighten), FULL both, NONE asks nothing; the transitive forms look at every earlier version. Without a mode it is BACKWARD, and no column is
removed. Whatever the mode, the lake has to follow: a column never changes its type (Delta widens none of the five types into another),
not even by removal and return, and the roles of columns stay.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from millrace_kit.errors import FailedPreconditionError

from millrace_ingestion.contracts import Column, Compatibility, Contract
from millrace_ingestion.rules import CHOOSABLE

_TRANSITIVE = frozenset(mode for mode in Compatibility if mode.value.endswith("_TRANSITIVE"))
_BACKWARD = frozenset(
    {Compatibility.UNSPECIFIED, Compatibility.BACKWARD, Compatibility.BACKWARD_TRANSITIVE, Compatibility.FULL}
    | {Compatibility.FULL_TRANSITIVE}
)
_FORWARD = frozenset(
    {Compatibility.FORWARD, Compatibility.FORWARD_TRANSITIVE, Compatibility.FULL, Compatibility.FULL_TRANSITIVE}
)


@dataclass(frozen=True)
class Change:
    """One difference between two versions."""

    subject: str
    """Column, comparison or expectation; empty for the contract."""
    text: str
    """For people: what would change, and for what is refused always, what to do instead."""
    backward: bool = True
    """Records of the old version are good under the new one."""
    forward: bool = True
    """Records of the new version are good under the old one."""
    possible: bool = True
    """The lake can follow."""
    removal: bool = False


def check_evolution(versions: Sequence[Contract], new: Contract) -> None:
    """Whether `new` may follow `versions` (oldest first) under the mode of the newest of them.

    Raises:
        FailedPreconditionError: with the column, or the rule, and the change that is not allowed.
    """
    newest = versions[-1]
    mode = newest.compatibility
    for old in versions if mode in _TRANSITIVE else versions[-1:]:
        for change in changes(old, new):
            if not allows(mode, change):
                raise _refused(old, change, mode)
    for change in _returns(versions[:-1], new):
        raise _refused(newest, change, mode)


def allows(mode: Compatibility, change: Change) -> bool:
    """Whether a version with this change may follow."""
    if not change.possible or (mode is Compatibility.UNSPECIFIED and change.removal):
        return False
    return (change.backward or mode not in _BACKWARD) and (change.forward or mode not in _FORWARD)


def changes(old: Contract, new: Contract) -> Iterator[Change]:
    """Every difference, roles first, then columns in the old version's order, then rules."""
    yield from _role_changes(old, new)
    later = {column.name: column for column in new.columns}
    before = {column.name for column in old.columns}
    known = {name.lower() for name in before}
    added = [column for column in new.columns if column.name not in before]
    for column in old.columns:
        if column.name in later:
            yield from _column_changes(column, later[column.name])
            continue
        renamed = next((other for other in added if _same_but_name(column, other)), None)
        if renamed is not None:
            yield Change(
                column.name,
                f"is gone and {renamed.name!r} is like it: a column cannot be renamed, readers and landed records know the old "
                f"name; add {renamed.name!r} beside it, fill both, and remove {column.name!r} in a later version",
                possible=False,
            )
        else:
            yield Change(column.name, "is removed", forward=column.nullable, removal=True)
    for column in added:
        if column.name.lower() in known:
            yield Change(column.name, "differs from another column only in case", possible=False)
        elif column.nullable:
            yield Change(column.name, "is new")
        else:
            yield Change(
                column.name, "is new and must be nullable: records that have landed have no value", backward=False
            )
    yield from _rule_changes("comparison", old.comparisons, new.comparisons, judged=True)
    yield from _rule_changes("expectation", old.expectations, new.expectations, judged=False)
    if old.compatibility is not new.compatibility:
        yield Change("", f"compatibility: {old.compatibility.value} to {new.compatibility.value}")


def _role_changes(old: Contract, new: Contract) -> Iterator[Change]:
    for role, before, after in (
        ("event_id_column", old.event_id_column, new.event_id_column),
        ("event_time_column", old.event_time_column, new.event_time_column),
        ("key_columns", ", ".join(old.key_columns), ", ".join(new.key_columns)),
    ):
        if before != after:
            yield Change(before, f"{role} cannot change (was {before!r}, would be {after!r})", possible=False)


def _same_but_name(old: Column, new: Column) -> bool:
    return (old.type, old.nullable, old.minimum, old.maximum, old.allowed, old.pattern) == (
        (new.type, new.nullable, new.minimum, new.maximum, new.allowed, new.pattern)
    )


def _column_changes(old: Column, new: Column) -> Iterator[Change]:
    name = old.name
    if old.type is not new.type:
        advice = f"add a column of type {new.type.value} with another name, and fill both until readers have moved"
        text = f"the type cannot change ({old.type.value} to {new.type.value}; Delta does not widen it): {advice}"
        yield Change(name, text, possible=False)
        return
    if old.nullable != new.nullable:
        text = "becomes nullable" if new.nullable else "becomes required: records without a value are no longer good"
        yield Change(name, text, backward=new.nullable, forward=old.nullable)
    for field, before, after in (
        ("min", old.minimum, new.minimum),
        ("min_length", old.min_length, new.min_length),
        ("max", _negative(old.maximum), _negative(new.maximum)),
        ("max_length", _negative(old.max_length), _negative(new.max_length)),
        ("max_null_rate", _negative(old.max_null_rate), _negative(new.max_null_rate)),
        ("max_age_s", _negative(old.max_age_s), _negative(new.max_age_s)),
        ("max_ahead_s", _negative(old.max_ahead_s), _negative(new.max_ahead_s)),
    ):
        if before != after:
            looser = after is None or (before is not None and after < before)
            yield Change(name, f"{field} is {'looser' if looser else 'tighter'}", backward=looser, forward=not looser)
    yield from _set_changes(name, "allowed", old.allowed, new.allowed)
    yield from _set_changes(name, "allowed_numbers", old.allowed_numbers, new.allowed_numbers)
    if old.pattern != new.pattern:
        text = (
            "pattern is another one: nobody can prove which accepts more" if old.pattern and new.pattern else "pattern"
        )
        yield Change(name, text, backward=not new.pattern, forward=not old.pattern)
    if old.unique != new.unique:
        yield Change(name, f"unique: {new.unique}", backward=old.unique, forward=new.unique)
    for check in CHOOSABLE:
        difference = new.policy(check).strictness - old.policy(check).strictness
        if difference:
            text = f"policy of {check}: {old.policy(check).value} to {new.policy(check).value}"
            yield Change(name, text, backward=difference < 0, forward=difference > 0)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _set_changes(name: str, field: str, old: Sequence[object], new: Sequence[object]) -> Iterator[Change]:
    """An empty set accepts everything."""
    before, after = set(old), set(new)
    if before == after:
        return
    looser = not after or (bool(before) and before < after)
    tighter = not before or (bool(after) and after < before)
    text = "gains values" if looser else "loses values" if tighter else "is another set"
    yield Change(name, f"{field} {text}", backward=looser, forward=tighter)


def _rule_changes(kind: str, old: Sequence[object], new: Sequence[object], *, judged: bool) -> Iterator[Change]:
    """Differences of named rules; expectations are about batches, so no record's goodness hangs on them."""
    before = {str(getattr(rule, "name", "")): rule for rule in old}
    after = {str(getattr(rule, "name", "")): rule for rule in new}
    for name in (*before, *(name for name in after if name not in before)):
        if before.get(name) == after.get(name):
            continue
        gone, fresh = name not in after, name not in before
        text = f"{kind} is {'removed' if gone else 'new' if fresh else 'changed'}"
        yield Change(name, text, backward=gone or not judged, forward=fresh or not judged)


def _returns(versions: Iterable[Contract], new: Contract) -> Iterator[Change]:
    """Columns that come back with another type than the lake has of them."""
    types = {column.name: column.type for version in versions for column in version.columns}
    for column in new.columns:
        if types.get(column.name, column.type) is not column.type:
            text = f"was {types[column.name].value} in an earlier version, and the lake still has it: take another name"
            yield Change(column.name, text, possible=False)


def _refused(old: Contract, change: Change, mode: Compatibility) -> FailedPreconditionError:
    shown = "BACKWARD without removals" if mode is Compatibility.UNSPECIFIED else mode.value
    why = f" (compatibility {shown} with version {old.version})" if change.possible else ""
    return FailedPreconditionError(
        "INCOMPATIBLE_CONTRACT",
        f"contract {old.name!r}, column {change.subject!r}: {change.text}{why}",
        {"contract": old.name, "column": change.subject, "change": change.text, "compatibility": mode.value},
    )
