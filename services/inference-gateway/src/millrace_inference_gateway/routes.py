"""Routes as the gateway uses them: checked, and with the order that makes splits sticky and monotone.

Knows neither Envoy nor gRPC's transport; `envoy_routes` turns these values into Envoy's messages.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Literal, TypeAlias

from millrace_api.rollout.v1 import rollout_pb2
from millrace_kit import check
from millrace_kit.cel_nodes import Node
from millrace_kit.cel_rules import check_rule
from millrace_kit.errors import InvalidArgumentError
from millrace_kit.value_rules import check_rules

from millrace_inference_gateway.attribute_rules import NO_ATTRIBUTES, AttributeRules, attribute_rules
from millrace_inference_gateway.input_tensors import FP32, VectorTensor, vector_tensor
from millrace_inference_gateway.predict_steps import NO_PLAN, Plan, checked_plan
from millrace_inference_gateway.value_checks import NO_CHECKS, Checks

MAX_MODELS = 1000
MAX_ARMS = 8
MAX_RULES = 64
MAX_ENDPOINTS = 1000
MAX_TIMEOUT_MS = 600_000
MAX_CALLERS = 256
DEFAULT_TIMEOUT_MS = 30_000
# Weights are percents with two decimals.
WEIGHT_UNITS = 10_000
# So are shares of copies.
MIRROR_UNITS = 10_000
ANYBODY = "*"
Balancing: TypeAlias = Literal["least_request", "round_robin", "response_time", "consistent_hash"]
_BALANCING: dict[int, Balancing] = {
    rollout_pb2.BALANCING_UNSPECIFIED: "least_request",
    rollout_pb2.BALANCING_LEAST_REQUEST: "least_request",
    rollout_pb2.BALANCING_ROUND_ROBIN: "round_robin",
    rollout_pb2.BALANCING_RESPONSE_TIME: "response_time",
    rollout_pb2.BALANCING_CONSISTENT_HASH: "consistent_hash",
}
_CALLER = re.compile(r"\*|[A-Za-z0-9][A-Za-z0-9._@:/-]{0,127}")
_HEADER = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")
_SERVICE = re.compile(
    r"(?P<namespace>[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)/(?P<name>[a-z]([a-z0-9-]{0,61}[a-z0-9])?):(?P<port>[0-9]{1,5})"
)
_SERVER_VERSION = re.compile(r"[1-9][0-9]{0,18}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One model server's gRPC address. Its HTTP is at the port before it, as Triton and MLServer have it by default (8000 and 8001)."""

    host: str
    port: int
    weight: int = 1
    """Relative to the arm's other servers."""
    zone: str = ""
    """Zone of its node; empty where nobody says."""
    far: bool = False
    """In another zone, and those of this gateway's own take what they can first."""

    @property
    def http(self) -> "Endpoint":
        """Where the same server speaks V2 over HTTP."""
        return replace(self, port=self.port - 1)

    @property
    def is_ip(self) -> bool:
        """Whether the host is an address rather than a name."""
        try:
            ip_address(self.host)
        except ValueError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Service:
    """A headless Service of Kubernetes, and the port its pods listen on."""

    namespace: str
    name: str
    port: int


@dataclass(frozen=True, slots=True)
class Arm:
    """One version behind a route; `weight` is in units of a hundredth of a percent."""

    model: str
    version: str
    digest: str
    candidate: bool
    weight: int
    endpoints: tuple[Endpoint, ...]
    service: Service | None = None
    mirror: int = 0
    """Share of the model's requests that are copied to it, in units of a hundredth of a percent."""
    leaving: bool = False
    """On its way out or kept for a way back: known, without traffic, and no rule means it."""
    plan: Plan = NO_PLAN
    asleep: bool = False
    """It has no servers: calls are held until it has been woken."""
    checks: Checks = NO_CHECKS
    """What its values may be."""
    server_version: str = ""
    """Number of the version in servers that hold others of the model too; empty where they hold one."""

    @property
    def cluster(self) -> str:
        """The name Envoy knows its gRPC servers by."""
        return f"arm/{self.model}/{self.version}"

    @property
    def http_cluster(self) -> str:
        """The name Envoy knows the HTTP side of the same servers by."""
        return f"http/{self.model}/{self.version}"


@dataclass(frozen=True, slots=True)
class Rule:
    """Requests for which `when` holds go to the arm of that role."""

    when: Node
    candidate: bool


@dataclass(frozen=True, slots=True)
class Route:
    """How one model is served. `arms` has the candidate first: a growing weight then only ever adds callers to it."""

    model: str
    arms: tuple[Arm, ...]
    sticky_header: str
    rules: tuple[Rule, ...]
    balancing: Balancing
    timeout_ms: int
    feature_service: str
    feature_names: tuple[str, ...]
    input_tensor: str
    output_tensor: str
    segment_header: str = ""
    """Header by whose value comparisons of copies are kept apart too; empty for none."""
    hedge_after_ms: int = 0
    """After so long without an answer another server is asked too; 0 never."""
    callers: tuple[str, ...] = ()
    """Who may call; empty is everybody."""
    testers: tuple[str, ...] = ()
    """Who may choose a version; `*` is everybody who may call."""
    tensor: VectorTensor | None = None
    """What Predict fills; None where it cannot hold the features."""
    may_sleep: bool = False
    """Whether versions without requests are put to sleep, and the rollout controller has to know of all that are made."""
    attributes: AttributeRules = field(default=NO_ATTRIBUTES, compare=False)
    """What the rules ask of inputs and features."""

    @property
    def asleep(self) -> bool:
        """Whether calls by weight may have to wait for servers."""
        return any(arm.asleep and arm.weight for arm in self.arms)

    @property
    def plan(self) -> Plan:
        """What the stable version declares for Predict."""
        return next((arm.plan for arm in self.arms if not arm.candidate), NO_PLAN)

    def asked(self, chosen: str = "") -> Arm:
        """Whose rules and definitions count: the version's the caller chose, else the stable one's, for nobody knows yet which will answer."""
        found = [arm for arm in self.arms if arm.version == chosen] or [a for a in self.arms if not a.candidate]
        return (found or self.arms)[0]

    def plan_of(self, version: str) -> Plan:
        """What the version declares that answered."""
        return next((arm.plan for arm in self.arms if arm.version == version), NO_PLAN)


@dataclass(frozen=True, slots=True)
class RouteTable:
    """Every model's route."""

    generation: int = 0
    routes: dict[str, Route] = field(default_factory=dict)

    @property
    def arms(self) -> dict[str, Arm]:
        """Arms by cluster name."""
        return {arm.cluster: arm for route in self.routes.values() for arm in route.arms}


def cluster_arm(cluster: str) -> tuple[str, str] | None:
    """Model and version of a cluster name; None when the cluster is no arm."""
    parts = cluster.split("/")
    return (parts[1], parts[2]) if len(parts) == 3 and parts[0] in {"arm", "http"} else None


def check_routes(routes: rollout_pb2.Routes) -> RouteTable:
    """The routes as values.

    Raises:
        InvalidArgumentError: names the field that is wrong; nothing of such routes is used.
    """
    if routes.generation < 0:
        raise InvalidArgumentError("routes.generation", "must not be negative")
    if len(routes.models) > MAX_MODELS:
        raise InvalidArgumentError("routes.models", f"has more than {MAX_MODELS} models")
    table: dict[str, Route] = {}
    for index, message in enumerate(routes.models):
        where = f"routes.models[{index}]"
        route = _check_route(message, where)
        if route.model in table:
            raise InvalidArgumentError(f"{where}.model", f"{route.model!r} has two routes")
        table[route.model] = route
    return RouteTable(routes.generation, table)


def _check_route(message: rollout_pb2.ModelRoute, where: str) -> Route:
    model = check.name(message.model, f"{where}.model")
    arms = _check_arms(message, model, where)
    sticky = message.sticky_header.lower()
    if sticky and not _HEADER.fullmatch(sticky):
        raise InvalidArgumentError(f"{where}.sticky_header", "is no header name")
    if len(message.rules) > MAX_RULES:
        raise InvalidArgumentError(f"{where}.rules", f"has more than {MAX_RULES} rules")
    rules = []
    for index, rule in enumerate(message.rules):
        node = check_rule(rule.when, f"{where}.rules[{index}].when")
        candidate = _is_candidate(rule.to, f"{where}.rules[{index}].to")
        # A rule for a role that nobody has now simply does not match; the candidate comes and goes.
        if any(arm.candidate == candidate and not arm.leaving for arm in arms):
            rules.append(Rule(node, candidate))
    if not 0 <= message.timeout_ms <= MAX_TIMEOUT_MS:
        raise InvalidArgumentError(f"{where}.timeout_ms", f"must be 0 to {MAX_TIMEOUT_MS}")
    tensor = vector_tensor(message.input_datatype, message.input_shape, len(message.feature_names))
    return Route(
        model=model,
        arms=_with_checks(arms, message, tensor, where),
        sticky_header=sticky,
        rules=tuple(rules),
        balancing=_check_balancing(message, where),
        timeout_ms=message.timeout_ms or DEFAULT_TIMEOUT_MS,
        feature_service=message.feature_service,
        feature_names=tuple(message.feature_names),
        input_tensor=message.input_tensor,
        output_tensor=message.output_tensor,
        segment_header=_check_segment(message.segment_header, f"{where}.segment_header"),
        hedge_after_ms=message.hedge_after_ms,
        callers=_check_names(message.callers, f"{where}.callers"),
        testers=_check_names(message.testers, f"{where}.testers"),
        tensor=tensor,
        may_sleep=message.may_sleep,
        attributes=attribute_rules((rule.when for rule in rules), message.feature_names),
    )


def _with_checks(
    arms: tuple[Arm, ...], message: rollout_pb2.ModelRoute, tensor: VectorTensor | None, where: str
) -> tuple[Arm, ...]:
    names = message.feature_names
    for index, arm in enumerate(message.arms):
        check_rules(arm.rules, f"{where}.arms[{index}].rules", frozenset(names))
    rules, given = {arm.version: arm.rules for arm in message.arms}, not message.feature_service
    kind = tensor.kind if tensor is not None else FP32
    return tuple(
        replace(arm, checks=Checks(arm.model, arm.version, rules[arm.version], names, kind, given=given))
        for arm in arms
    )


def _check_balancing(message: rollout_pb2.ModelRoute, where: str) -> Balancing:
    found = _BALANCING.get(message.balancing)
    if found is None:
        raise InvalidArgumentError(f"{where}.balancing", "is not known to this gateway")
    if found == "consistent_hash" and not message.sticky_header:
        raise InvalidArgumentError(f"{where}.sticky_header", "is needed for BALANCING_CONSISTENT_HASH")
    if not 0 <= message.hedge_after_ms <= MAX_TIMEOUT_MS:
        raise InvalidArgumentError(f"{where}.hedge_after_ms", f"must be 0 to {MAX_TIMEOUT_MS}")
    return found


def _check_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    if len(names) > MAX_CALLERS:
        raise InvalidArgumentError(where, f"has more than {MAX_CALLERS} names")
    for index, name in enumerate(names):
        if not _CALLER.fullmatch(name):
            raise InvalidArgumentError(f"{where}[{index}]", "is no name of a caller")
    return tuple(names)


def _check_segment(text: str, where: str) -> str:
    header = text.lower()
    if header and not _HEADER.fullmatch(header):
        raise InvalidArgumentError(where, "is no header name")
    return header


def _check_arms(message: rollout_pb2.ModelRoute, model: str, where: str) -> tuple[Arm, ...]:
    if not 1 <= len(message.arms) <= MAX_ARMS:
        raise InvalidArgumentError(f"{where}.arms", f"needs 1 to {MAX_ARMS} arms")
    arms: list[Arm] = []
    for index, arm in enumerate(message.arms):
        place = f"{where}.arms[{index}]"
        version = check.semver(arm.version, f"{place}.version")
        digest = check.sha256(arm.digest, f"{place}.digest") if arm.digest else ""
        if not 0 <= check.finite(arm.weight, f"{place}.weight") <= 100:
            raise InvalidArgumentError(f"{place}.weight", "must be 0 to 100")
        if len(arm.endpoints) > MAX_ENDPOINTS:
            raise InvalidArgumentError(f"{place}.endpoints", f"has more than {MAX_ENDPOINTS}")
        endpoints = tuple(_check_endpoint(e, f"{place}.endpoints[{i}]") for i, e in enumerate(arm.endpoints))
        leaving = arm.role == rollout_pb2.ARM_ROLE_UNSPECIFIED
        if leaving and (arm.weight or arm.mirror_percent):
            raise InvalidArgumentError(f"{place}.role", "is needed by a version with traffic")
        candidate = leaving or _is_candidate(arm.role, f"{place}.role")
        if not 0 <= check.finite(arm.mirror_percent, f"{place}.mirror_percent") <= 100:
            raise InvalidArgumentError(f"{place}.mirror_percent", "must be 0 to 100")
        mirror = round(arm.mirror_percent / 100 * MIRROR_UNITS)
        service = _check_service(arm.service, f"{place}.service") if arm.service else None
        weight = round(arm.weight * 100)
        plan = checked_plan(arm.predict, f"{place}.predict") if arm.HasField("predict") else NO_PLAN
        if arm.server_version and not _SERVER_VERSION.fullmatch(arm.server_version):
            raise InvalidArgumentError(f"{place}.server_version", "is no version of a model server")
        made = Arm(model, version, digest, candidate, weight, endpoints, service, mirror, leaving, plan)
        arms.append(replace(made, server_version=arm.server_version))
    arms = [replace(a, asleep=True, endpoints=()) if m.asleep else a for a, m in zip(arms, message.arms, strict=True)]
    if sum(arm.mirror > 0 for arm in arms) > 1:
        raise InvalidArgumentError(f"{where}.arms", "name two versions that get copies")
    if len({arm.version for arm in arms}) < len(arms):
        raise InvalidArgumentError(f"{where}.arms", "name one version twice")
    if abs(sum(arm.weight for arm in message.arms) - 100) > 0.01:
        raise InvalidArgumentError(f"{where}.arms", "have weights that do not add up to 100")
    arms.sort(key=lambda arm: (not arm.candidate, check.semver_key(arm.version), arm.version))
    return _exact_weights(arms)


def _exact_weights(arms: list[Arm]) -> tuple[Arm, ...]:
    """The heaviest arm takes what rounding left, so that the total never changes and hashes stay where they are."""
    rest = WEIGHT_UNITS - sum(arm.weight for arm in arms)
    last = max(range(len(arms)), key=lambda index: arms[index].weight)
    arms[last] = replace(arms[last], weight=arms[last].weight + rest)
    return tuple(arms)


def _is_candidate(role: int, where: str) -> bool:
    if role not in {rollout_pb2.ARM_ROLE_STABLE, rollout_pb2.ARM_ROLE_CANDIDATE}:
        raise InvalidArgumentError(where, "must be ARM_ROLE_STABLE or ARM_ROLE_CANDIDATE")
    return role == rollout_pb2.ARM_ROLE_CANDIDATE


def _check_endpoint(text: str, where: str) -> Endpoint:
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    # The port before it is the server's HTTP.
    if not port.isascii() or not port.isdigit() or not 1 < int(port[:6]) < 65_536:
        raise InvalidArgumentError(where, f"{text[:80]!r} is not host:port")
    endpoint = Endpoint(host, int(port))
    if not endpoint.is_ip and not _HOST.fullmatch(host):
        raise InvalidArgumentError(where, f"{text[:80]!r} is not host:port")
    return endpoint


def _check_service(text: str, where: str) -> Service:
    found = _SERVICE.fullmatch(text)
    if found is None or not 0 < int(found["port"]) < 65_536:
        raise InvalidArgumentError(where, f"{text[:140]!r} is not namespace/name:port")
    return Service(found["namespace"], found["name"], int(found["port"]))
