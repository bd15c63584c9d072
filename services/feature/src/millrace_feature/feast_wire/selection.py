"""What a Feast client asks for, compiled: once per definitions for a feature service, and for a list of features it names the first time.

Features stand in Feast's order: view by view as they are first named, on-demand views last.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from millrace_kit.errors import InvalidArgumentError

from millrace_feature.feast_wire.errors import collision, no_feature, no_service, no_view
from millrace_feature.plan import Definitions, ServicePlan, Transform, ValueType, ViewUse
from millrace_feature.serving import CompiledService

MAX_SELECTIONS = 1024
"""Compiled selections kept, the least recently used ones dropped: clients may name any list of features."""
MAX_FEATURES = 10_000
"""Most features of one request."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request names."""

    service: str = ""
    """A feature service; empty when features are named."""
    features: tuple[str, ...] = ()
    """`view:feature`."""
    full_names: bool = False
    """Whether names in the answer are `view__feature`."""


@dataclass(frozen=True, slots=True)
class Block:
    """Features of one view or on-demand view, which share statuses and event times."""

    part: int
    """Whose values they are, as `CompiledService.parts` counts."""
    picker: Any
    """Takes the block's values out of a row's; always gives a sequence."""
    view: str
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    """Feast's types."""
    is_computed: bool
    """Whether an on-demand view made them: then they have no event time, and no row is missing."""

    @property
    def is_all_double(self) -> bool:
        """Whether every feature is a DOUBLE."""
        return set(self.kinds) == {"DOUBLE"}


class Selection:
    """A compiled request: what to read and how the answer is laid out."""

    def __init__(self, plan: ServicePlan, definitions: Definitions, *, full_names: bool) -> None:
        self.service = CompiledService(plan, definitions)
        self.label = plan.name
        """For metrics: the service's name, empty for features named one by one."""
        self.keys: Mapping[str, str] = _key_types(plan, definitions)
        """Join keys under the names requests use, with Feast's types."""
        self.request_fields: Mapping[str, ValueType] = dict(plan.request_fields)
        self.key_users = {key: use.view for use in plan.uses for key in use.keys}
        """A view that needs each join key."""
        self.blocks = _blocks(self.service, definitions, full_names=full_names)
        names = [name for block in self.blocks for name in block.names]
        if len(set(names)) != len(names):
            raise collision([name for name in dict.fromkeys(names) if names.count(name) > 1])
        self.names = tuple(names)
        self.views = tuple(dict.fromkeys(block.view for block in self.blocks if not block.is_computed))


def _key_types(plan: ServicePlan, definitions: Definitions) -> dict[str, str]:
    known = dict(dict(definitions.feast_types).get("", ()))
    kinds = dict(definitions.key_types)
    fallback = {"string": "STRING", "int64": "INT64"}
    return {
        key: known[key] if known.get(key, "INVALID") != "INVALID" else fallback[kinds[key]] for key in plan.join_keys
    }


def _blocks(service: CompiledService, definitions: Definitions, *, full_names: bool) -> tuple[Block, ...]:
    types = {view: dict(columns) for view, columns in definitions.feast_types}
    chosen: dict[int, list[int]] = {}
    for part, place in dict.fromkeys(service.places):  # the numbers of an embedding lie at one place
        chosen.setdefault(part, []).append(place)
    uses, transforms = service.plan.uses, service.plan.transforms
    blocks = []
    for part, places in sorted(chosen.items(), key=lambda item: item[0] >= len(uses)):
        is_computed = part >= len(uses)
        if is_computed:
            transform = transforms[part - len(uses)]
            alias = view = transform.name
            features: Sequence[str] = transform.outputs
        else:
            alias, view = uses[part].alias, uses[part].view
            features = definitions.view(view).features
        picked = [features[place] for place in places]
        kinds = tuple(types.get(view, {}).get(name, "DOUBLE") for name in picked)
        names = tuple(f"{alias}__{name}" if full_names else name for name in picked)
        blocks.append(Block(part, _picker(places), alias, names, kinds, is_computed))
    return tuple(blocks)


def _picker(places: Sequence[int]) -> Any:
    """Takes `places` out of a sequence; a slice where they follow each other."""
    first, last = places[0], places[-1]
    if list(places) == list(range(first, last + 1)):
        return itemgetter(slice(first, last + 1))
    return itemgetter(*places)


class Selections:
    """The selections of one set of definitions, compiled when they are first asked for."""

    def __init__(self, definitions: Definitions, limit: int = MAX_SELECTIONS) -> None:
        self.definitions = definitions
        self._limit = limit
        self._known: OrderedDict[Wanted, Selection] = OrderedDict()
        self._transforms = {plan.name: plan for plan in definitions.on_demand}

    def find(self, wanted: Wanted) -> Selection:
        """The selection of what a request names.

        Raises:
            MillraceError: the service, a view or a feature does not exist, or two features would have one name.
        """
        found = self._known.get(wanted)
        if found is not None:
            self._known.move_to_end(wanted)
            return found
        plan = self._service(wanted.service) if wanted.service else self._plan(wanted.features)
        found = Selection(plan, self.definitions, full_names=wanted.full_names)
        if len(self._known) >= self._limit:
            self._known.popitem(last=False)
        self._known[wanted] = found
        return found

    def _service(self, name: str) -> ServicePlan:
        plan = self.definitions.service(name)
        if plan is None:
            raise no_service(name, self.definitions.project)
        return plan

    def _plan(self, references: Sequence[str]) -> ServicePlan:
        """A plan without a name for features named one by one."""
        if not references:
            raise InvalidArgumentError("features", "names no feature; give features or feature_service")
        if len(references) > MAX_FEATURES:
            raise InvalidArgumentError("features", f"names more than {MAX_FEATURES} features")
        views = {view.name: view for view in self.definitions.views}
        uses: dict[str, ViewUse] = {}
        transforms: dict[str, Transform] = {}
        request: dict[str, ValueType] = {}
        names: list[str] = []
        for i, reference in enumerate(references):
            view_name, feature = parsed_reference(reference, f"features[{i}]")
            if view_name in views:
                view = views[view_name]
                _known_feature(view_name, feature, view.features)
                _put(uses, ViewUse(view_name, view_name, view.join_keys))
            elif view_name in self._transforms:
                computed = self._transforms[view_name]
                transforms[view_name] = computed.transforms[0]
                _known_feature(view_name, feature, computed.transforms[0].outputs)
                for use in computed.uses:
                    _put(uses, use)
                request.update(computed.request_fields)
            else:
                raise no_view(view_name, self.definitions.project)
            names.append(f"{view_name}__{feature}")
        if len(set(names)) != len(names):
            raise collision([name for name in dict.fromkeys(names) if names.count(name) > 1])
        fields = tuple(sorted(request.items()))
        return ServicePlan("", tuple(names), tuple(uses.values()), tuple(transforms.values()), fields)


def _put(uses: dict[str, ViewUse], use: ViewUse) -> None:
    if uses.setdefault(use.alias, use) != use:
        raise InvalidArgumentError("features", f"use {use.alias!r} in two ways; ask for them in two requests")


def _known_feature(view: str, feature: str, features: Sequence[str]) -> None:
    if feature not in features:
        raise no_feature(view, feature)


def parsed_reference(reference: str, field: str) -> tuple[str, str]:
    """(view, feature) of `view:feature`; `view@latest` is the view."""
    view, colon, feature = reference.partition(":")
    view, at, version = view.partition("@")
    if not colon or not view or not feature:
        raise InvalidArgumentError(field, f"{reference!r} is not of the form view:feature")
    if at and version.lower() not in {"", "latest"}:
        problem = (
            f"{reference!r} pins a version of a view; versions of all definitions are switched by ApplyDefinitions"
        )
        raise InvalidArgumentError(field, problem)
    return view, feature
