"""The `ModelDeployment` manifest: strict, with the path of whatever is wrong."""

from typing import Annotated, Literal

from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError
from pydantic import Field, ValidationError

from millrace_rollout_controller import documents, manifest_rules, value_gates
from millrace_rollout_controller.manifest_rules import seconds
from millrace_rollout_controller.server_block import Block, Server

MAX_MANIFEST_CHARACTERS = 65_536
MAX_STEPS = 20
MAX_GATES = 20
MAX_RULES = 64
MAX_CALLERS = 256
MAX_PROMQL_CHARACTERS = 2000
MAX_KEEP_OLD_SECONDS = 7 * 86_400

Duration = Annotated[str, Field(min_length=2, max_length=21, pattern=r"^([0-9]{1,6}h)?([0-9]{1,6}m)?([0-9]{1,6}s)?$")]
"""A length of time like `30s`, `10m` or `1h30m`; more than 0 and at most 720h."""
Confidence = Annotated[float, Field(ge=0.5, le=0.999999)]
"""One minus the chance of a wrong answer, over the whole rollout and however often it is read."""
Strategy = Literal["Canary", "BlueGreen", "ABTest", "Shadow"]
Balancing = Literal["LeastRequest", "RoundRobin", "ResponseTime", "ConsistentHash"]
"""Over the servers of a version: fewest requests under way, in turn, faster ones more, or one server for each value of the sticky header."""
Caller = Annotated[str, Field(pattern=r"^(\*|[A-Za-z0-9][A-Za-z0-9._@:/-]{0,127})$")]
Number = Annotated[float, Field(ge=-1e12, le=1e12)]
GoalMetric = Annotated[str, Field(max_length=80, pattern=(
    "^(errorRate|latencyP99Ms|outcome/accuracy|outcome/brier|outcome/mae|outcome/rmse|business/[A-Za-z_][A-Za-z0-9_]{0,62})$"
))]  # fmt: skip
"""Of a comparison that an A/B test reports."""
GateMetric = Annotated[str, Field(max_length=80, pattern=(
    "^(errorRate|latencyP50Ms|latencyP95Ms|latencyP99Ms|throughput|outcome/accuracy|outcome/brier|outcome/mae|outcome/rmse|drift/prediction"
    "|shadow/labelFlipRate|shadow/scoreShift|shadow/maxAbsDiff|business/[A-Za-z_][A-Za-z0-9_]{0,62})$"
))]  # fmt: skip
"""`business/<column>` is a number or bool in the outcome's record."""
ValueRange = Annotated[tuple[Number, ...], Field(min_length=2, max_length=2)]
"""The smallest and the largest value."""
SegmentBy = Annotated[
    str, Field(max_length=80, pattern=r"^(client|feature/.{1,64}|outcome/[A-Za-z_][A-Za-z0-9_]{0,62})$")
]
"""Tells groups of predictions apart: by the caller, by a feature, or by a column of the outcome's record."""
DEFAULT_CONFIDENCE = 0.95


class Metadata(Block):
    """Name of the deployment."""

    name: str


class Sticky(Block):
    """Header whose value keeps a caller on one version."""

    header: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,127}$")]
    """In lower case."""


class Rule(Block):
    """Requests for which a CEL expression holds go to one arm."""

    when: Annotated[str, Field(min_length=1, max_length=2048)]
    """CEL over `request.headers['…']`, `request.inputs['…']` and `features['…']`; the latter two of Predict, calls by V2 have neither."""
    to: Literal["stable", "candidate"]


class Routing(Block):
    """Who goes where."""

    sticky: Sticky | None = None
    rules: tuple[Rule, ...] = Field(default=(), max_length=MAX_RULES)
    hedge_after_ms: Annotated[int, Field(ge=1, le=600_000)] | None = None
    """A call without an answer after so long goes to another server too, and the first answer counts. For models whose p99 is far from
    their median; None never."""
    callers: Annotated[tuple[Caller, ...], Field(min_length=1, max_length=MAX_CALLERS)] | None = None
    """Who may call the model: names of API keys or subjects of tokens, as the gateway knows them. None lets everybody."""
    testers: Annotated[tuple[Caller, ...], Field(min_length=1, max_length=MAX_CALLERS)] | None = None
    """Who may choose a version by `x-millrace-version`; `*` is everybody who may call. Such calls are no evidence. None is nobody."""


class Pause(Block):
    """A wait; without a duration until `resume`."""

    duration: Duration | None = None

    @property
    def seconds(self) -> float | None:
        """Length in seconds; None waits for a person."""
        return None if self.duration is None else seconds(self.duration, "duration")


class Step(Block):
    """A weight and what must have happened before the next one."""

    weight: Annotated[float, Field(gt=0, le=100)]
    min_requests: int = Field(default=0, ge=0, le=1_000_000_000)
    """Candidate requests in this step."""
    pause: Pause | None = None
    until: Literal["Decided"] | None = None
    """Decided: stay until every gate has a verdict, but those that are required Never; then `maxRequests` says how long at most."""
    max_requests: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Of a step until Decided: candidate requests in it after which `onUndecided` is done."""
    on_undecided: Literal["Hold", "Rollback"] | None = None
    """Of a step until Decided: hold the weight for a person, which is what None means, or roll back."""


class BlueGreen(Block):
    """A candidate beside stable without traffic of its own, then all traffic in one change."""

    auto_promotion: bool = True
    """Switch as soon as nothing is missing; otherwise a person promotes."""
    mirror_percent: float = Field(default=0.0, ge=0, le=100)
    """Percent of the requests copied to the candidate before the switch, so that gates have something to judge."""
    min_requests: int = Field(default=0, ge=0, le=1_000_000_000)
    """Requests of the preview (copies, and callers whom a rule sends to the candidate) before the switch."""
    pause: Pause | None = None
    """How long the preview lasts at least; without a duration until `resume`."""
    watch_seconds: int = Field(default=0, ge=0, le=86_400)
    """How long gates go on after the switch; a failing one switches back at once."""
    keep_old_seconds: int = Field(default=600, ge=0, le=MAX_KEEP_OLD_SECONDS)
    """How long the old version's servers stay up after the switch, so that `undo` is one change of the route."""


class Bandit(Block):
    """Bounds of a split that follows the result."""

    min_weight: float = Field(default=10.0, gt=0, le=50)
    """Percent that each version keeps, however bad it looks."""
    max_change: float = Field(default=10.0, gt=0, le=100)
    """Percent that one move shifts at most."""
    min_samples: int = Field(default=200, ge=10, le=1_000_000_000)
    """Values of the goal that each version needs before the first move."""
    interval: Duration = "60s"
    """Shortest time between two moves."""


class ABTest(Block):
    """A split between stable and candidate until there is an answer."""

    split: Annotated[float, Field(gt=0, lt=100)] = 50.0
    """Percent of the candidate."""
    min_requests: int = Field(default=0, ge=0, le=1_000_000_000)
    """Candidate requests before the test may end."""
    duration: Duration | None = None
    """Time before the test may end. Without `minRequests` and `duration` only a person ends it."""
    goal: GoalMetric = "outcome/accuracy"
    """Metric that decides which version is better; `business/<column>` is a number or bool in the outcome's record."""
    better: Literal["Higher", "Lower"] | None = None
    """Of a business/ goal: which values are the good ones."""
    value_range: ValueRange | None = None
    """Of a goal business/, outcome/mae or outcome/rmse: the smallest and the largest value; what lies beyond counts as that. With it the result is exact
    at every look, without it only in the limit of many values."""
    segment: SegmentBy | None = None
    """Of a goal outcome/ or business/: also a result for each group of predictions, told apart by a feature, by a column of the outcome's record, or
    by the caller. The first 16 groups count apart. A group for which stable is better keeps onSuccess: Promote from promoting."""
    confidence: Confidence = DEFAULT_CONFIDENCE
    """Of every comparison in the status."""
    on_success: Literal["Hold", "Promote"] = "Hold"
    """When the test has ended and the goal says that the candidate is better: wait for a person, or promote."""
    allocation: Literal["Fixed", "Thompson"] = "Fixed"
    """Thompson: the split starts at `split` and follows the chance, by what the goal says so far, that the candidate is better. Callers then
    change sides as the split moves."""
    bandit: Bandit | None = None
    """Bounds of a split by Thompson; None takes the defaults."""

    @property
    def as_goal(self) -> value_gates.Goal:
        """The goal with how its values are known."""
        return value_gates.Goal(self.goal, self.better, self.value_range, self.segment)


class Segment(Block):
    """What tells groups of requests apart."""

    header: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,127}$")]
    """In lower case; its first 16 values are looked at one by one."""


class Shadow(Block):
    """Copies of requests to the candidate, whose answers nobody gets: all of a Shadow run, or before the first step of a Canary."""

    mirror_percent: Annotated[float, Field(gt=0, le=100)] = 100.0
    """Percent of the requests that are copied."""
    min_requests: int = Field(default=0, ge=0, le=1_000_000_000)
    """Copies before the run may end."""
    min_pairs: int = Field(default=0, ge=0, le=1_000_000_000)
    """Rows of answers compared with stable's before it may end."""
    segment: Segment | None = None
    """Also compare each group by itself: gates on `shadow/…` look at the worst."""
    duration: Duration | None = None
    """Time before the run may end. Without `minRequests` and `duration` only a person ends it."""
    confidence: Confidence = DEFAULT_CONFIDENCE
    """Of every comparison in the status."""
    on_success: Literal["Hold", "Promote"] = "Hold"
    """When a Shadow run has ended and its gates have passed: wait for a person, or promote. A Canary goes on to its steps."""


class Warmup(Block):
    """Requests replayed to each new server before the candidate's first weight, until it answers steadily."""

    requests: int = Field(default=50, ge=10, le=10_000)
    """Least requests of one window; steady are three windows in a row within 10 % of each other in latency and throughput, or as steadily slower
    or faster than a stable server that answers the same requests at the same time."""
    window_seconds: float = Field(default=1.0, ge=0, le=60)
    """Least length of one window."""
    max_rate: int = Field(default=200, ge=1, le=100_000)
    """Most replayed requests a second, for the candidate's server and for the stable one beside it."""
    max_trials: int = Field(default=10, ge=3, le=100)
    """Most windows of one server; then a latency that is not steady leaves the gate undecided, and a failed or slow one fails it."""
    concurrency: int = Field(default=1, ge=1, le=64)
    """Requests under way at once."""
    max_p99_ratio: float = Field(default=1.5, ge=1, le=100)
    """Most times that the 99th percentile may be stable's, on the same requests at the same time."""
    timeout_seconds: int = Field(default=120, ge=1, le=3600)
    """Longest time for all servers of the candidate; then the gate fails."""
    required: Literal["Always", "Never"] = "Always"
    """Whether a failure ends the trial and an undecided gate waits for a person (resume or abort), or both are only said."""


class Guard(Block):
    """A window after the candidate has all traffic: the version before stays ready, and every gate may still take the new one back."""

    window: Duration
    """Length of the window; promote ends it."""
    hold_back_percent: float = Field(default=0.0, ge=0, le=50)
    """Percent of the traffic that stays with the version before until the window closes, so that comparisons go on; without it only
    outcomes of earlier requests still compare. Of Canary and ABTest only."""


class Gate(Block):
    """One condition on the candidate: a metric of ours with exactly one of `max`, `min` and `compare`, or a PromQL query with `max` or `min`."""

    metric: GateMetric | None = None
    """What is judged; `business/<column>` is a number or bool in the outcome's record."""
    promql: Annotated[str, Field(min_length=1, max_length=MAX_PROMQL_CHARACTERS)] | None = None
    """Query with one value as its answer; {{model}}, {{candidate}}, {{stable}} and {{namespace}} are filled in."""
    max: float | None = None
    min: float | None = None
    compare: Literal["notWorseThanStable"] | None = None
    tensor: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Of shadow/maxAbsDiff: the output it is about; None is all of them."""
    margin: Annotated[float, Field(gt=0, le=1e12)] | None = None
    """How much worse than stable the candidate may be, in the metric's unit; of a latency the part by which its percentile may be longer. Less than 1
    but for business/, outcome/mae and outcome/rmse."""
    better: Literal["Higher", "Lower"] | None = None
    """Of a business/ metric compared: which values are the good ones."""
    value_range: ValueRange | None = None
    """Of business/, outcome/mae and outcome/rmse: the smallest and the largest value; what lies beyond counts as that. With it the test is exact at
    every look, without it only in the limit of many values."""
    segment: SegmentBy | None = None
    """Of outcome/ and business/: also judge groups of predictions by themselves, told apart by a feature, by a column of the outcome's record, or by
    the caller. The first 16 groups count apart."""
    max_samples: Annotated[int, Field(ge=100, le=100_000_000)] | None = None
    """Of a comparison required at Promotion: candidate values at which the promotion is decided at the latest. Then passing has five looks on
    the way there, which need fewer values than a look after every one; failing is still looked at always."""
    confidence: Confidence | None = None
    """One minus the chance of a wrong verdict in each direction; of a metric only, where None is 0.95."""
    failure_limit: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Answers beyond the bound in a row at which the gate fails; of a query and of throughput only, where None is 3."""
    required: Literal["EveryStep", "Promotion", "Never"] = "EveryStep"
    """When it must have passed: to leave any step, to reach 100 %, or never. A fail rolls back in every case."""

    @property
    def level(self) -> float:
        """The confidence in force."""
        return DEFAULT_CONFIDENCE if self.confidence is None else self.confidence

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values of the metric are better."""
        return value_gates.higher_is_better(self.metric, self.better)

    @property
    def is_value(self) -> bool:
        """About values of any unit, not of 0 to 1."""
        return value_gates.is_value(self.metric)

    @property
    def is_asymptotic(self) -> bool:
        """Tested in the limit of many values: nobody said how large they may be."""
        return self.is_value and self.value_range is None

    @property
    def is_reading(self) -> bool:
        """Judged by single readings, beyond the bound or not, instead of by a test."""
        return self.promql is not None or self.metric == "throughput"

    @property
    def failures(self) -> int:
        """The failure limit in force."""
        return 3 if self.failure_limit is None else self.failure_limit

    @property
    def text(self) -> str:
        """As people write it, for example "latencyP99Ms <= 80"."""
        subject = self.metric or f"promql {' '.join((self.promql or '').split())[:80]}"
        by = f" by {self.segment}" if self.segment is not None else ""
        if self.compare:
            return f"{subject} notWorseThanStable (margin {self.margin:g}){by}"
        if self.tensor is not None:
            subject = f"{subject} of {self.tensor}"
        return f"{subject} <= {self.max:g}{by}" if self.max is not None else f"{subject} >= {self.min:g}{by}"


class Rollout(Block):
    """How a new version replaces the stable one. Each strategy has its own block, and refuses the others'."""

    strategy: Strategy = "Canary"
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=MAX_STEPS)] | None = None
    """Canary only: rising weights; 100 is added at the end. None is one step of 100."""
    blue_green: BlueGreen | None = None
    ab_test: ABTest | None = None
    shadow: Shadow | None = None
    gates: tuple[Gate, ...] = Field(default=(), max_length=MAX_GATES)
    guard: Guard | None = None
    advance: Literal["BySteps", "OnEvidence"] = "BySteps"
    """OnEvidence (Canary only): `minRequests` counts the whole rollout instead of the step alone, and while a gate is half the way to failing the
    weight goes back to the first step's."""
    counted_by: Literal["Gateways", "Servers"] = "Gateways"
    """Who counts requests and errors. Servers: also of callers who go around the gateways (`xds:///`). Model servers know no percentiles, so gates
    on latency stay undecided then."""
    warmup: Warmup | None = None
    """Replay requests to new servers before the first weight; None leaves it at the warm-up every server does by itself."""
    on_failure: Literal["Rollback"] = "Rollback"
    progress_deadline_seconds: int = Field(default=120, ge=1, le=86_400)
    """A candidate without ready servers for this long is rolled back."""


class Spec(Block):
    """What is wanted."""

    model: str
    version: str
    server: Server = Server()
    routing: Routing = Routing()
    balancing: Balancing = "LeastRequest"
    rollout: Rollout = Rollout()


class Manifest(Block):
    """One ModelDeployment."""

    api_version: Literal["millrace.dev/v1alpha1"]
    kind: Literal["ModelDeployment"]
    metadata: Metadata
    spec: Spec


def parse(text: str) -> Manifest:
    """The manifest in `text` (YAML or JSON).

    Raises:
        InvalidArgumentError: names the path of the first thing that is wrong, for example `spec.rollout.steps[1].weight`.
    """
    check.text(text, "manifest_yaml", limit=MAX_MANIFEST_CHARACTERS)
    encoded = documents.to_json(text, "manifest_yaml")
    try:
        manifest = Manifest.model_validate_json(encoded)
    except ValidationError as error:
        first = error.errors()[0]
        problem = "unknown key" if first["type"] == "extra_forbidden" else str(first["msg"])
        raise InvalidArgumentError(_path(first["loc"]), problem) from None
    check.name(manifest.metadata.name, "metadata.name")
    manifest_rules.check_spec(manifest.spec)
    return manifest


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path[:200] or "manifest_yaml"
