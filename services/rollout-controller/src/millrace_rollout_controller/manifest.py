"""The `ModelDeployment` manifest: strict, with the path of whatever is wrong."""

import json
import re
from typing import Annotated, Any, Literal

import yaml
from millrace_kit import cel_rules, check
from millrace_kit.errors import InvalidArgumentError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

MAX_MANIFEST_CHARACTERS = 65_536
MAX_STEPS = 20
MAX_GATES = 20
MAX_RULES = 64
MAX_REPLICAS = 32
MAX_PAUSE_S = 30 * 86_400
_DURATION = re.compile(r"(?=.)(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?")
_HEADER = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")


class Block(BaseModel):
    """Base of every part: frozen, strict types, camelCase keys, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=to_camel, populate_by_name=False
    )


class Metadata(Block):
    """Name of the deployment."""

    name: str


class Resources(Block):
    """Requests and limits in Kubernetes' own words; the executor refuses what it cannot give."""

    limits: dict[str, str | int | float] = Field(default={}, max_length=16)
    requests: dict[str, str | int | float] = Field(default={}, max_length=16)


class Server(Block):
    """The model servers of each version."""

    replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS)
    resources: Resources = Resources()
    max_batch_size: int = Field(default=64, ge=1, le=4096)
    """Most rows of one batch."""
    timeout_ms: int = Field(default=1000, ge=1, le=600_000)
    """Deadline of one model call."""
    instances: int = Field(default=1, ge=1, le=16)
    """Copies of the model inside one server."""
    queue_delay_us: int = Field(default=0, ge=0, le=1_000_000)
    """How long a request may wait for others to fill a batch."""


class Sticky(Block):
    """Header whose value keeps a caller on one version."""

    header: str


class Rule(Block):
    """Requests for which a CEL expression holds go to one arm."""

    when: str
    to: Literal["stable", "candidate"]


class Routing(Block):
    """Who goes where."""

    sticky: Sticky | None = None
    rules: tuple[Rule, ...] = Field(default=(), max_length=MAX_RULES)


class Pause(Block):
    """A wait; without a duration until `resume`."""

    duration: str | None = None

    @property
    def seconds(self) -> float | None:
        """Length in seconds; None waits for a person."""
        return None if self.duration is None else _seconds(self.duration, "duration")


class Step(Block):
    """A weight and what must have happened before the next one."""

    weight: Annotated[float, Field(gt=0, le=100)]
    min_requests: int = Field(default=0, ge=0, le=1_000_000_000)
    """Candidate requests in this step."""
    pause: Pause | None = None


class Gate(Block):
    """One condition on the candidate; exactly one of `max`, `min` and `compare`."""

    metric: Literal["errorRate", "latencyP99Ms", "outcome/accuracy", "outcome/brier"]
    max: float | None = None
    min: float | None = None
    compare: Literal["notWorseThanStable"] | None = None
    margin: Annotated[float, Field(gt=0, lt=1)] | None = None
    """How much worse than stable the candidate may be."""
    confidence: float = Field(default=0.95, ge=0.5, le=0.999999)
    """One minus the chance of a wrong verdict in each direction, over the whole rollout and however often it is read."""
    required: Literal["EveryStep", "Promotion", "Never"] = "EveryStep"
    """When it must have passed: to leave any step, to reach 100 %, or never. A fail rolls back in every case."""

    @property
    def text(self) -> str:
        """As people write it, for example "latencyP99Ms <= 80"."""
        if self.compare:
            return f"{self.metric} notWorseThanStable (margin {self.margin:g})"
        return f"{self.metric} <= {self.max:g}" if self.max is not None else f"{self.metric} >= {self.min:g}"


class Rollout(Block):
    """How a new version replaces the stable one."""

    strategy: str = "Canary"
    steps: tuple[Step, ...] = Field(default=(Step(weight=100.0),), min_length=1, max_length=MAX_STEPS)
    gates: tuple[Gate, ...] = Field(default=(), max_length=MAX_GATES)
    on_failure: Literal["Rollback"] = "Rollback"
    progress_deadline_seconds: int = Field(default=120, ge=1, le=86_400)
    """A candidate without ready servers for this long is rolled back."""


class Spec(Block):
    """What is wanted."""

    model: str
    version: str
    server: Server = Server()
    routing: Routing = Routing()
    balancing: Literal["LeastRequest", "RoundRobin"] = "LeastRequest"
    rollout: Rollout = Rollout()

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps, ending with 100 %."""
        steps = self.rollout.steps
        return steps if steps[-1].weight == 100 else (*steps, Step(weight=100.0))


class Manifest(Block):
    """One ModelDeployment."""

    api_version: Literal["millrace.dev/v1alpha1"]
    kind: Literal["ModelDeployment"]
    metadata: Metadata
    spec: Spec


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (a few lines of them can stand for gigabytes) and without repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not accepted")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len({str(key) for key in keys}) < len(keys):
            raise yaml.YAMLError(f"a key is repeated at line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)


def parse(text: str) -> Manifest:
    """The manifest in `text` (YAML or JSON).

    Raises:
        InvalidArgumentError: names the path of the first thing that is wrong, for example `spec.rollout.steps[1].weight`.
    """
    check.text(text, "manifest_yaml", limit=MAX_MANIFEST_CHARACTERS)
    try:
        raw = yaml.load(text, _Loader)  # noqa: S506 - a safe loader
        encoded = json.dumps(raw, allow_nan=False)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, OverflowError) as error:
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        raise InvalidArgumentError("manifest_yaml", f"is not YAML of plain values: {problem}") from None
    if not isinstance(raw, dict):
        raise InvalidArgumentError("manifest_yaml", "must be a mapping")
    try:
        manifest = Manifest.model_validate_json(encoded)
    except ValidationError as error:
        first = error.errors()[0]
        problem = "unknown key" if first["type"] == "extra_forbidden" else str(first["msg"])
        raise InvalidArgumentError(_path(first["loc"]), problem) from None
    _check_spec(manifest)
    return manifest


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path[:200] or "manifest_yaml"


def _check_spec(manifest: Manifest) -> None:
    check.name(manifest.metadata.name, "metadata.name")
    spec = manifest.spec
    check.name(spec.model, "spec.model")
    check.semver(spec.version, "spec.version")
    sticky = spec.routing.sticky
    if sticky is not None and not _HEADER.fullmatch(sticky.header):
        raise InvalidArgumentError("spec.routing.sticky.header", "needs a header name in lower case")
    for index, rule in enumerate(spec.routing.rules):
        cel_rules.check_rule(rule.when, f"spec.routing.rules[{index}].when")
    if spec.rollout.strategy != "Canary":
        known = "BlueGreen", "ABTest", "Shadow"
        problem = "is not available yet" if spec.rollout.strategy in known else "is not known"
        raise InvalidArgumentError("spec.rollout.strategy", f"{problem}; use Canary")
    _check_steps(spec.rollout.steps)
    for index, gate in enumerate(spec.rollout.gates):
        _check_gate(gate, f"spec.rollout.gates[{index}]")


def _check_steps(steps: tuple[Step, ...]) -> None:
    before = 0.0
    for index, step in enumerate(steps):
        where = f"spec.rollout.steps[{index}]"
        if step.weight <= before:
            raise InvalidArgumentError(f"{where}.weight", "must be greater than the step's before")
        if round(step.weight, 2) != step.weight:
            raise InvalidArgumentError(f"{where}.weight", "has more than two decimals")
        before = step.weight
        if step.pause is not None and step.pause.duration is not None:
            _seconds(step.pause.duration, f"{where}.pause.duration")


_FORMS: dict[str, tuple[str, ...]] = {
    "errorRate": ("max", "compare"),
    "latencyP99Ms": ("max",),
    "outcome/accuracy": ("min", "compare"),
    "outcome/brier": ("max", "compare"),
}


def _check_gate(gate: Gate, where: str) -> None:
    allowed = _FORMS[gate.metric]
    given = [form for form in ("max", "min", "compare") if getattr(gate, form) is not None]
    if len(given) != 1:
        raise InvalidArgumentError(where, f"needs exactly one of {', '.join(allowed)}")
    if given[0] not in allowed:
        raise InvalidArgumentError(f"{where}.{given[0]}", f"does not fit {gate.metric}; use {' or '.join(allowed)}")
    if (gate.margin is not None) != (gate.compare is not None):
        raise InvalidArgumentError(f"{where}.margin", "belongs to compare, and compare needs it")
    bound = gate.max if gate.max is not None else gate.min
    if bound is None:
        return
    if gate.metric == "latencyP99Ms":
        if not 0 < bound <= 600_000:
            raise InvalidArgumentError(f"{where}.max", "must be more than 0 and at most 600000 (milliseconds)")
    elif not 0 < bound < 1:
        raise InvalidArgumentError(f"{where}.{given[0]}", "must be between 0 and 1, both left out")


def _seconds(text: str, where: str) -> float:
    match = _DURATION.fullmatch(text)
    if match is None or not any(match.groups()):
        raise InvalidArgumentError(where, "needs a duration like 30s, 10m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = hours * 3600 + minutes * 60 + seconds
    if not 0 < total <= MAX_PAUSE_S:
        raise InvalidArgumentError(where, "must be more than 0 and at most 720h")
    return float(total)
