"""Pipeline manifests: YAML in, a checked and immutable `Manifest` out, errors that name the field.

Scalars are read as text first, so that a parameter means exactly what was written (`2013-07-01` stays that, `1e-3` stays that);
typed fields are parsed from the text. Aliases are refused, because nested ones make small files enormous.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

import yaml
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

FIELD = "manifest_yaml"
MAX_MANIFEST_CHARS = 64 * 1024
MAX_STAGES = 64
MAX_DEPTH = 20
MAX_RETRIES = 3

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?$")]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
DriftKind = Literal["COVARIATE", "PREDICTION", "LABEL", "PERFORMANCE", "QUALITY"]


def _value(raw: object) -> object:
    if not isinstance(raw, str):
        raise ValueError("must be a scalar")  # noqa: TRY004 - pydantic turns ValueError into a field's error
    return raw


def _environment_text(raw: object) -> object:
    if isinstance(raw, str) and "\0" in raw:
        raise ValueError("must not hold a NUL character")
    return _value(raw)


ParameterValue = Annotated[str, BeforeValidator(_environment_text), Field(max_length=4096)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Resources(_Part):
    """What a stage claims of the machine while it runs, all its processes together."""

    cpus: float = Field(default=1.0, ge=0.1, le=1024)
    """CPUs; also the number of threads numeric libraries start."""
    memory_mib: int = Field(default=2048, ge=16, le=16_777_216)
    """Memory in MiB; a stage that uses more is ended."""
    gpus: int = Field(default=0, ge=0, le=64)
    """GPUs; a stage sees no others."""
    gpu_resource: Annotated[str, Field(pattern=r"^([a-z0-9.-]+/[A-Za-z0-9._-]+)?$", max_length=128)] = ""
    """In a cluster: the extended resource that `gpus` counts, for example a MIG slice (`nvidia.com/mig-1g.10gb`); empty is the
    cluster's usual one."""


class Distributed(_Part):
    """A stage that torchrun starts."""

    workers: int = Field(ge=1, le=64)
    """Processes, one rank each."""
    workers_per_pod: int = Field(default=1, ge=1, le=64)
    """In a cluster: processes in each pod; `workers` and the stage's GPUs divide evenly among the pods."""


LabelName = Annotated[
    str, Field(pattern=r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")
]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")]
ObjectName = Annotated[str, Field(pattern=r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$")]


class Toleration(_Part):
    """A taint that the stage's pods tolerate, as Kubernetes has it."""

    key: LabelName | Literal[""] = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: LabelValue = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""


class Pod(_Part):
    """Where the stage runs in a cluster; a single machine has no use for it."""

    image: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._/:@-]*)?$", max_length=512)] = ""
    """Image that holds `millrace-stage` and what the command needs; empty is the coordinator's default."""
    node_selector: dict[LabelName, LabelValue] = Field(default_factory=dict, max_length=32)
    """Labels a node must have, for example `nvidia.com/gpu.product`."""
    tolerations: tuple[Toleration, ...] = Field(default=(), max_length=32)
    runtime_class: ObjectName = ""
    priority_class: ObjectName = ""


class Stage(_Part):
    """One step of the pipeline."""

    name: Name
    command: tuple[Annotated[Text, BeforeValidator(_environment_text)], ...] = Field(min_length=1, max_length=256)
    """Program and arguments; `python` is the coordinator's own interpreter."""
    depends_on: tuple[Name, ...] = Field(default=(), max_length=MAX_STAGES)
    retries: int = Field(default=0, ge=0, le=MAX_RETRIES)
    """Attempts beyond the first after failures that may pass."""
    timeout_s: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    """Longest time of one attempt, in seconds."""
    resources: Resources = Resources()
    distributed: Distributed | None = None
    pod: Pod = Pod()
    outputs: tuple[Text, ...] = Field(default=(), max_length=256)
    """Files below the stage's output folder that are kept and compared."""
    effects: bool = False
    """Whether the stage changes other services; such stages are left out of a reproduction."""

    @property
    def workers(self) -> int:
        """Processes under torchrun; 0 for a stage that is not distributed."""
        return self.distributed.workers if self.distributed else 0

    @property
    def pods(self) -> int:
        """Pods of the stage in a cluster."""
        return self.distributed.workers // self.distributed.workers_per_pod if self.distributed else 1


class Retrain(_Part):
    """When drift starts the pipeline anew."""

    model: Name
    kinds: tuple[DriftKind, ...] = Field(min_length=1, max_length=8)
    cooldown_s: float = Field(default=86_400.0, ge=0, le=3.2e9, allow_inf_nan=False)
    """Least event time between the windows of two findings that start a run, in seconds."""
    parameters: dict[str, ParameterValue] = Field(default_factory=dict, max_length=128)
    """Overrides; `{window_start}` and `{window_end}` become the finding's window (RFC 3339)."""


class Manifest(_Part):
    """A checked pipeline manifest; stages are in an order in which each follows what it depends on."""

    name: Name
    seed: int = Field(default=0, ge=-(2**63), le=2**63 - 1)
    parameters: dict[str, ParameterValue] = Field(default_factory=dict, max_length=128)
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=MAX_STAGES)
    retrain: Retrain | None = None

    def stage(self, name: str) -> Stage:
        """The stage called `name`."""
        return next(stage for stage in self.stages if stage.name == name)


class _Loader(yaml.BaseLoader):
    """Text scalars only, no aliases, no duplicate keys, bounded depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _value_node in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key must be text{_at(key.start_mark)}")
            if key.value in seen:
                raise yaml.YAMLError(f"key {key.value!r} stands twice{_at(key.start_mark)}")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _at(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f" (line {mark.line + 1})"


def _refuse(path: str, problem: str) -> NoReturn:
    raise InvalidArgumentError(f"{FIELD}.{path}" if path else FIELD, problem)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one stage may ask for."""

    cpus: float = 1024
    memory_mib: int = 16_777_216
    gpus: int = 64
    timeout_s: float = 86_400
    in_pods: bool = False
    """Whether a distributed stage is split into pods, so that its GPUs have to divide among them."""


def parse_manifest(text: str, limits: Limits) -> Manifest:
    """Read a manifest whose stages keep within `limits`.

    Raises:
        InvalidArgumentError: naming the field, for example `manifest_yaml.stages[2].retries`.
    """
    check.text(text, FIELD, limit=MAX_MANIFEST_CHARS)
    try:
        raw = yaml.load(text, Loader=_Loader)  # noqa: S506 - the loader makes text, lists and mappings only
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        _refuse("", f"is not a YAML manifest: {' '.join(str(error).split())}"[:500])
    if not isinstance(raw, dict):
        _refuse("", "must be a mapping with name and stages")
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        _refuse(_path(first["loc"]), _problem(dict(first)))
    _check_stages(manifest, limits)
    _check_retrain(manifest)
    return manifest.model_copy(update={"stages": _ordered(manifest.stages)})


def _path(location: Iterable[int | str]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path[:200]


def _problem(error: dict[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "is not a field of a manifest"
    return str(error["msg"]).removeprefix("Value error, ")


def _check_stages(manifest: Manifest, limits: Limits) -> None:
    names = [stage.name for stage in manifest.stages]
    for number, stage in enumerate(manifest.stages):
        path = f"stages[{number}]"
        if names.index(stage.name) != number:
            _refuse(f"{path}.name", f"stage {stage.name!r} stands twice")
        for place, needed in enumerate(stage.depends_on):
            if needed == stage.name:
                _refuse(f"{path}.depends_on[{place}]", "a stage cannot depend on itself")
            if needed not in names:
                _refuse(f"{path}.depends_on[{place}]", f"there is no stage {needed!r}")
            if stage.depends_on.index(needed) != place:
                _refuse(f"{path}.depends_on[{place}]", f"stage {needed!r} stands twice")
        for place, output in enumerate(stage.outputs):
            _check_output(stage, place, f"{path}.outputs[{place}]", output)
        if stage.distributed is not None:
            _check_distributed(stage, path, in_pods=limits.in_pods)
        _check_limits(stage, path, limits)


def _check_output(stage: Stage, place: int, path: str, output: str) -> None:
    parts = output.split("/")
    if output.startswith("/") or any(part in {"", ".", ".."} for part in parts) or "\0" in output or "\\" in output:
        _refuse(path, "must be a path below the stage's output folder, without '..'")
    if stage.outputs.index(output) != place:
        _refuse(path, f"output {output!r} stands twice")


def _check_distributed(stage: Stage, path: str, *, in_pods: bool) -> None:
    if stage.command[0] != "python":
        _refuse(f"{path}.command[0]", "a distributed stage starts with 'python'")
    if len(stage.command) < 2 or (stage.command[1].startswith("-") and stage.command[1] != "-m"):
        _refuse(f"{path}.command", "a distributed stage runs a script file or '-m module'")
    if stage.command[1] == "-m" and len(stage.command) < 3:
        _refuse(f"{path}.command", "names no module after '-m'")
    assert stage.distributed is not None
    workers, each = stage.distributed.workers, stage.distributed.workers_per_pod
    if workers % each:
        _refuse(f"{path}.distributed.workers_per_pod", f"{workers} workers do not divide into pods of {each}")
    if in_pods and stage.resources.gpus % stage.pods:
        _refuse(f"{path}.resources.gpus", f"{stage.resources.gpus} GPUs do not divide among {stage.pods} pods")


def _check_limits(stage: Stage, path: str, limits: Limits) -> None:
    asked = {"cpus": stage.resources.cpus, "memory_mib": stage.resources.memory_mib, "gpus": stage.resources.gpus}
    for name, value in asked.items():
        if value > getattr(limits, name):
            _refuse(f"{path}.resources.{name}", f"asks for {value:g}, this coordinator has {getattr(limits, name):g}")
    if stage.timeout_s > limits.timeout_s:
        _refuse(f"{path}.timeout_s", f"is longer than the limit of {limits.timeout_s:g} s")


def _check_retrain(manifest: Manifest) -> None:
    for name in manifest.parameters:
        if not name or len(name) > 128:
            _refuse("parameters", "a parameter's name has 1 to 128 characters")
    if manifest.retrain is None:
        return
    for name, value in manifest.retrain.parameters.items():
        if name not in manifest.parameters:
            _refuse(f"retrain.parameters.{name[:128]}", "the pipeline has no such parameter")
        rest = value.replace("{window_start}", "").replace("{window_end}", "")
        if "{" in rest or "}" in rest:
            _refuse(f"retrain.parameters.{name}", "knows {window_start} and {window_end} only")


def _ordered(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Kahn's algorithm, stable in the manifest's order."""
    done: list[Stage] = []
    left = list(stages)
    while left:
        finished = {stage.name for stage in done}
        ready = [stage for stage in left if finished.issuperset(stage.depends_on)]
        if not ready:
            number = stages.index(left[0])
            cycle = _cycle(left)
            _refuse(f"stages[{number}].depends_on", f"stages depend on each other in a circle: {' -> '.join(cycle)}")
        done.extend(ready)
        left = [stage for stage in left if stage not in ready]
    return tuple(done)


def _cycle(stages: list[Stage]) -> list[str]:
    """One circle among `stages`, each of which waits for another of them."""
    needs = {stage.name: next(n for n in stage.depends_on if n in {s.name for s in stages}) for stage in stages}
    walked = [stages[0].name]
    while needs[walked[-1]] not in walked:
        walked.append(needs[walked[-1]])
    return [*walked[walked.index(needs[walked[-1]]) :], needs[walked[-1]]]
