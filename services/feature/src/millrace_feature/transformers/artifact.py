"""What fitting leaves: steps with what they have learned, as canonical JSON whose SHA-256 is its name everywhere.

Names are resolved in order: a step's input is the newest output of that name, else a column of the training set. What no later step takes
is an output of the whole.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from millrace_feature.transformers.bins import Bin
from millrace_feature.transformers.categories import Frequency, OneHot, Ordinal, Target
from millrace_feature.transformers.dates import Date
from millrace_feature.transformers.numbers import BoxCox, Impute, Keep, Log, MinMax, Robust, Standard
from millrace_feature.transformers.steps import State, Step
from millrace_feature.transformers.texts import Hash, Text

FORMAT = 1
MAX_STEPS = 256
MAX_INPUTS = 4096
"""Inputs of one step, and columns of a training set that one transformer reads."""
MAX_OUTPUTS = 10_000
MAX_BYTES = 16 * 1024 * 1024
MAX_NAME = 256
KINDS: Mapping[str, type[Step]] = {
    step.kind: step
    for step in (
        Bin, BoxCox, Date, Frequency, Hash, Impute, Keep, Log, MinMax, OneHot, Ordinal, Robust, Standard, Target, Text,
    )
}  # fmt: skip


class SpecificationError(ValueError):
    """A step that cannot be; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Specification:
    """One step as the user asks for it."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Placed:
    """A fitted step and where its inputs come from: a column by name, or (step, output) of an earlier one."""

    step: Step
    sources: tuple[str | tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """The rows a transformer was fitted on; times in microseconds since the epoch."""

    training_set: str
    rows: int
    first_us: int
    last_us: int


class Artifact:
    """A fitted transformer.

    Raises:
        SpecificationError: the steps do not fit together.
    """

    def __init__(self, specifications: Sequence[Specification], states: Sequence[State], origin: Origin) -> None:
        self.specifications = tuple(specifications)
        self.states = tuple(states)
        self.origin = origin
        self.steps: list[Placed] = []
        live: dict[str, tuple[int, int]] = {}
        self.live = live
        """(step, output) of the newest output of every name, those that later steps take included."""
        taken: set[tuple[int, int]] = set()
        columns: dict[str, None] = {}
        for number, (given, state) in enumerate(zip(specifications, states, strict=False)):
            sources = tuple(live.get(name, name) for name in given.inputs)
            columns.update({name: None for name in sources if isinstance(name, str)})
            taken.update(s for s in sources if not isinstance(s, str))
            step = self._made(number, given, state)
            self.steps.append(Placed(step, sources))
            clash = [n for n in step.outputs if n in live and live[n] not in taken]
            if clash or len(set(step.outputs)) < len(step.outputs):
                problem = f"output {clash[0]!r} exists already" if clash else "two of its outputs have one name"
                raise SpecificationError(f"steps[{number}]: {problem}; give the step an output name")
            live.update({name: (number, i) for i, name in enumerate(step.outputs)})
        self.inputs = tuple(columns)
        """Columns it reads, in the order of their first use."""
        kept = sorted((place, name) for name, place in live.items() if place not in taken)
        self.outputs = tuple(name for _place, name in kept)
        self.places = tuple(place for place, _name in kept)
        """(step, output) of each of `outputs`."""
        if len(self.inputs) > MAX_INPUTS or len(self.outputs) > MAX_OUTPUTS:
            raise SpecificationError(f"at most {MAX_INPUTS} inputs and {MAX_OUTPUTS} outputs")
        if long := [n for n in self.outputs if len(n) > MAX_NAME]:
            raise SpecificationError(f"output name {long[0][:60]!r}… is longer than {MAX_NAME} characters")

    @staticmethod
    def _made(number: int, given: Specification, state: State) -> Step:
        try:
            return KINDS[given.kind].made(given.inputs, given.output, dict(given.parameters), state)
        except SpecificationError:
            raise
        except (ValueError, TypeError) as error:
            raise SpecificationError(f"steps[{number}] ({given.kind}): {error}") from error

    @property
    def content(self) -> bytes:
        """Canonical JSON: the same bytes for the same transformer."""
        steps = [
            {"kind": s.kind, "inputs": s.inputs, "output": s.output, "parameters": dict(s.parameters), "state": state}
            for s, state in zip(self.specifications, self.states, strict=True)
        ]
        origin = {
            "training_set": self.origin.training_set,
            "rows": self.origin.rows,
            "first_us": self.origin.first_us,
            "last_us": self.origin.last_us,
        }
        whole = {"format": FORMAT, "origin": origin, "steps": steps}
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
        return text.encode()

    @property
    def digest(self) -> str:
        """SHA-256 of `content`."""
        return hashlib.sha256(self.content).hexdigest()


def specification(
    number: int, kind: str, inputs: Sequence[str], output: str, parameters: Mapping[str, Any]
) -> Specification:
    """A checked step of a request.

    Raises:
        SpecificationError: the kind, a name or a parameter is not possible.
    """
    if kind not in KINDS:
        raise SpecificationError(f"steps[{number}].kind: {kind!r} is none of {', '.join(sorted(KINDS))}")
    if not 1 <= len(inputs) <= MAX_INPUTS or len(set(inputs)) < len(inputs) or not all(inputs):
        raise SpecificationError(f"steps[{number}].inputs: needs 1 to {MAX_INPUTS} different names")
    if output and len(inputs) > 1 and kind != Hash.kind:
        raise SpecificationError(f"steps[{number}].output: only a step of one input (or of kind 'hash') takes one")
    try:
        given = KINDS[kind].Given.model_validate(dict(parameters))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise SpecificationError(f"steps[{number}].parameters.{place}: {first['msg']}") from error
    # Defaults are written down, so that a later default changes nothing that was fitted.
    return Specification(kind, tuple(inputs), output, given.model_dump(mode="json"))


def from_content(content: bytes) -> Artifact:
    """The artifact of `Artifact.content`.

    Raises:
        SpecificationError: it is of another format, or damaged.
    """
    try:
        raw = json.loads(content)
        if raw["format"] != FORMAT:
            raise SpecificationError(f"format {raw['format']} is not {FORMAT}")
        given = [Specification(s["kind"], tuple(s["inputs"]), s["output"], s["parameters"]) for s in raw["steps"]]
        return Artifact(given, [s["state"] for s in raw["steps"]], Origin(**raw["origin"]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise SpecificationError(f"is no transformer: {type(error).__name__}: {error}") from error
