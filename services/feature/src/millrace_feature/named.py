"""A plan for features that a request names one by one, instead of a feature service's: of views, and of on-demand views."""

from collections.abc import Sequence

from millrace_kit.errors import InvalidArgumentError

from millrace_feature.plan import Definitions, ServicePlan, Transform, ValueType, ViewUse

FIELD = "features"
MAX_FEATURES = 10_000


def named_plan(definitions: Definitions, names: Sequence[str], like: ServicePlan | None) -> ServicePlan:
    """The plan whose vector is `names`, texts and times among them, so it is for training sets alone.

    Args:
        definitions: where views are looked for.
        names: `view__feature`.
        like: a service whose aliases and renamed join keys are known too, before the views of those names.

    Raises:
        InvalidArgumentError: a name is none of a feature, stands twice, or two of them use one view in two ways.
    """
    if len(names) > MAX_FEATURES:
        raise InvalidArgumentError(FIELD, f"names more than {MAX_FEATURES} features")
    places = {view.name: ViewUse(view.name, view.name, view.join_keys) for view in definitions.views}
    places.update({use.alias: use for use in like.uses} if like is not None else {})
    on_demand = {plan.name: plan for plan in definitions.on_demand}
    uses: dict[str, ViewUse] = {}
    transforms: dict[str, Transform] = {}
    request: dict[str, ValueType] = {}
    for i, name in enumerate(names):
        alias, feature = _split(name, {**places, **on_demand}, f"{FIELD}[{i}]")
        if alias in on_demand:
            computed = on_demand[alias]
            known: Sequence[str] = computed.transforms[0].outputs
            transforms[alias] = computed.transforms[0]
            needed = computed.uses
            request.update(computed.request_fields)
        else:
            known = definitions.view(places[alias].view).features
            needed = (places[alias],)
        if feature not in known:
            raise InvalidArgumentError(f"{FIELD}[{i}]", f"{alias!r} has no feature {feature!r}")
        for use in needed:
            if uses.setdefault(use.alias, use) != use:
                raise InvalidArgumentError(f"{FIELD}[{i}]", f"uses {use.alias!r} in two ways; build two sets")
    if len(set(names)) < len(names):
        raise InvalidArgumentError(FIELD, "names a feature twice")
    fields = tuple(sorted(request.items()))
    label = like.name if like is not None else ""
    return ServicePlan(label, tuple(names), tuple(uses.values()), tuple(transforms.values()), fields)


def _split(name: str, known: dict[str, object] | dict[str, ViewUse | ServicePlan], field: str) -> tuple[str, str]:
    """(view, feature); a view's name may itself hold "__", so the longest that is known is meant."""
    places = [i for i in range(len(name)) if name.startswith("__", i)]
    for i in reversed(places):
        if name[:i] in known:
            return name[:i], name[i + 2 :]
    raise InvalidArgumentError(field, f"{name!r} is no view__feature of these definitions")
