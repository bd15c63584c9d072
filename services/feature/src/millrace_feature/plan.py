"""Compiled definitions: what a request or a build needs to know, as plain values.

A plan is made once per definitions hash (`compiler.py`) and kept as JSON, so neither a request nor a restart touches Feast.
Windows follow one rule on both sides: with slide s, at instant t a window of width w holds the events whose time lies in
[floor_s(t) - w, floor_s(t)), so only complete slides count and nothing at or after t does. With a fresh head of unit m it is
[floor_s(t) - w, floor_m(t)): the near end moves with t, the far end stays on the slides' edges.
"""

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from millrace_feature.functions import Schema

ValueType = Literal["string", "int64", "double", "bool", "timestamp"]


@dataclass(frozen=True, slots=True)
class Aggregate:
    """One windowed feature of a view."""

    feature: str
    column: str
    function: str
    """Canonical name, see `functions.py`."""
    window_us: int
    slide_us: int = 0
    """How far the window moves at once; a multiple of the view's hop, which 0 stands for."""


@dataclass(frozen=True, slots=True)
class WindowView:
    """Windowed aggregates of one contract's rows per entity: a Feast StreamFeatureView with aggregations."""

    name: str
    contract: str
    event_time: str
    join_keys: tuple[str, ...]
    hop_us: int
    aggregates: tuple[Aggregate, ...]
    head_us: int = 0
    """Unit in which events of the running slide are kept and counted; 0: they are not."""
    arrived_at: str = ""
    """Column that says when a row came in; needed for `late_us`."""
    late_us: int = 0
    """Rows that came in later than this after their event time do not count, in the stream and in the lake; 0: all count."""

    @property
    def features(self) -> tuple[str, ...]:
        """Names of its features in order."""
        return tuple(a.feature for a in self.aggregates)

    @property
    def schema(self) -> Schema:
        """What its tiles hold."""
        return Schema.of((a.column, a.function) for a in self.aggregates)

    @property
    def columns(self) -> tuple[str, ...]:
        """Aggregated columns, sorted."""
        return tuple(sorted({a.column for a in self.aggregates}))

    @property
    def source_columns(self) -> tuple[str, ...]:
        """Every column of the contract it needs."""
        late = (self.arrived_at,) if self.late_us else ()
        return tuple(dict.fromkeys([self.event_time, *self.join_keys, *self.columns, *late]))

    @property
    def windows_us(self) -> tuple[tuple[int, int], ...]:
        """Distinct (width, slide) of its windows, widest first."""
        return tuple(sorted({(a.window_us, a.slide_us or self.hop_us) for a in self.aggregates}, reverse=True))

    @property
    def step_us(self) -> int:
        """Finest unit of its tiles."""
        return self.head_us or self.hop_us

    @property
    def reach_us(self) -> int:
        """How far back a read looks."""
        return max(width + slide for width, slide in self.windows_us)

    @property
    def group(self) -> str:
        """Identity of the stored state: views that share it share tiles; a view that changes it is filled again."""
        place = (self.contract, self.event_time, self.join_keys, self.arrived_at if self.late_us else "", self.late_us)
        return _identity("tiles 2", *place, self.hop_us, self.head_us, asdict(self.schema), self.reach_us)


Metric = Literal["L2", "cosine", "inner_product"]


@dataclass(frozen=True, slots=True)
class VectorField:
    """A feature that is a list of numbers: an embedding."""

    feature: str
    length: int
    """Numbers in each; 0: any."""
    is_wide: bool
    """Whether the numbers are float64 (Array(Float64)) instead of float32."""
    metric: Metric | None = None
    """How near vectors are found, unless a search says otherwise; None where there is no `vector_index`."""


@dataclass(frozen=True, slots=True)
class LatestView:
    """The newest row per entity: a plain Feast FeatureView."""

    name: str
    contract: str
    event_time: str
    join_keys: tuple[str, ...]
    ttl_us: int
    """0 means forever."""
    features: tuple[str, ...]
    """Columns of the contract."""
    vectors: tuple[VectorField, ...] = ()
    """Those of the features that are embeddings."""
    feast_keys: tuple[str, ...] = ()
    """The join keys in the order of the view's schema, by which Feast's clients sort what a search found."""

    def vector(self, feature: str) -> VectorField | None:
        """The embedding called `feature`."""
        return next((field for field in self.vectors if field.feature == feature), None)

    @property
    def reach_us(self) -> int:
        """How far back a read looks; 0 when it has no bound."""
        return self.ttl_us

    @property
    def group(self) -> str:
        """Identity of the stored state."""
        # How vectors are searched is no part of it: an index is made from the same rows.
        shapes = [(field.feature, field.length, field.is_wide) for field in self.vectors]
        place = (self.contract, self.event_time, self.join_keys, self.features, self.ttl_us)
        return _identity("rows 2", *place, *([shapes] if shapes else []))


View = WindowView | LatestView


@dataclass(frozen=True, slots=True)
class ViewUse:
    """A view as a service uses it: under an alias and with the request's names for its join keys."""

    alias: str
    view: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Transform:
    """A Feast OnDemandFeatureView in Python mode: a function from lists by name to lists by name."""

    name: str
    inputs: tuple[tuple[str, str], ...]
    """(view alias, feature) of every stored feature it reads."""
    request_fields: tuple[str, ...]
    outputs: tuple[str, ...]
    singleton: bool
    """Whether the function takes one row (values by name) instead of lists."""
    body: bytes
    """The function, pickled by dill as Feast does."""
    fitted: bool = False
    """Whether `body` is a fitted transformer instead (`transformers/artifact.py`), whose inputs are `inputs` in their order."""


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """A Feast FeatureService compiled."""

    name: str
    features: tuple[str, ...]
    """`alias__feature` in vector order."""
    uses: tuple[ViewUse, ...]
    """Every view needed, for the vector or by a transform."""
    transforms: tuple[Transform, ...]
    request_fields: tuple[tuple[str, ValueType], ...]

    @property
    def join_keys(self) -> tuple[str, ...]:
        """Names a request gives its entities under, sorted."""
        return tuple(sorted({key for use in self.uses for key in use.keys}))


@dataclass(frozen=True, slots=True)
class Definitions:
    """Everything one definitions hash stands for."""

    project: str
    digest: str
    event_times: tuple[tuple[str, str], ...]
    """(contract, event-time column) of every data source."""
    key_types: tuple[tuple[str, ValueType], ...]
    """Type of every join key, under the names requests use."""
    views: tuple[View, ...]
    services: tuple[ServicePlan, ...]
    on_demand: tuple[ServicePlan, ...] = ()
    """One a Python-mode on-demand view: all its outputs, for reads that name features instead of a service."""
    feast_types: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    """(view, (column, Feast's name of its type)...) of every view; the view "" holds the join keys under the names requests use."""

    def view(self, name: str) -> View:
        """The view called `name`."""
        return next(view for view in self.views if view.name == name)

    def service(self, name: str) -> ServicePlan | None:
        """The service called `name`."""
        return next((service for service in self.services if service.name == name), None)

    def event_time(self, contract: str) -> str | None:
        """Event-time column of `contract`, when a data source has that name."""
        return dict(self.event_times).get(contract)


def _identity(kind: str, *parts: object) -> str:
    return hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()[:16]


def to_json(definitions: Definitions) -> str:
    """The definitions as JSON text."""

    def plain(value: object) -> object:
        if isinstance(value, bytes):
            return base64.b64encode(value).decode("ascii")
        raise TypeError(type(value).__name__)

    fields = asdict(definitions)
    return json.dumps(fields, default=plain)


def _window_view(raw: dict[str, Any]) -> WindowView:
    aggregates = tuple(Aggregate(**a) for a in raw["aggregates"])
    return WindowView(**{**raw, "join_keys": tuple(raw["join_keys"]), "aggregates": aggregates})


def _latest_view(raw: dict[str, Any]) -> LatestView:
    vectors = tuple(VectorField(**field) for field in raw.get("vectors", ()))
    names: dict[str, Any] = {"join_keys": tuple(raw["join_keys"]), "features": tuple(raw["features"])}
    return LatestView(**{**raw, **names, "vectors": vectors, "feast_keys": tuple(raw.get("feast_keys", ()))})


def _service(raw: dict[str, Any]) -> ServicePlan:
    return ServicePlan(
        name=raw["name"],
        features=tuple(raw["features"]),
        uses=tuple(ViewUse(u["alias"], u["view"], tuple(u["keys"])) for u in raw["uses"]),
        transforms=tuple(
            Transform(
                name=t["name"],
                inputs=tuple((alias, feature) for alias, feature in t["inputs"]),
                request_fields=tuple(t["request_fields"]),
                outputs=tuple(t["outputs"]),
                singleton=t["singleton"],
                body=base64.b64decode(t["body"]),
                fitted=t.get("fitted", False),
            )
            for t in raw["transforms"]
        ),
        request_fields=tuple((name, kind) for name, kind in raw["request_fields"]),
    )


def from_json(text: str) -> Definitions:
    """The definitions `to_json` wrote."""
    raw = json.loads(text)
    return Definitions(
        project=raw["project"],
        digest=raw["digest"],
        event_times=tuple((c, e) for c, e in raw["event_times"]),
        key_types=tuple((k, t) for k, t in raw["key_types"]),
        views=tuple(_window_view(v) if "hop_us" in v else _latest_view(v) for v in raw["views"]),
        services=tuple(_service(s) for s in raw["services"]),
        on_demand=tuple(_service(s) for s in raw.get("on_demand", ())),
        feast_types=tuple((view, tuple((c, t) for c, t in types)) for view, types in raw.get("feast_types", ())),
    )
