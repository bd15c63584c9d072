"""What every stage of the pipeline shares: its place in the run, its parameters, its inputs and its result."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

MODEL = "flight-delay"
FEATURE_SERVICE = "flight_delay"
LABEL = "late"
# A probability at or above it says "late".
THRESHOLD = 0.5
# Views that need no history: what version 1.0.0 looks at.
BASE_VIEWS = ("schedule", "origin_weather")
# A feature with this end is a place in a vocabulary, -1 for a word that is not in it.
CODE_SUFFIX = "_code"
# sysexits.h: the coordinator tries again after EX_TEMPFAIL, and does not after EX_CONFIG.
TEMPORARY, PERMANENT = 75, 78

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    """One attempt of one stage."""

    run_id: str
    name: str
    attempt: int
    """From 1."""
    seed: int
    output: Path
    """Folder of this attempt, empty at the start."""
    inputs: Mapping[str, Path]
    """Output folders of the stages this one depends on, directly or not."""
    parameters: Mapping[str, str]
    reproduction_of: str
    """Run that is being made again; empty in an ordinary run."""

    @classmethod
    def from_environment(cls) -> Self:
        """The attempt the coordinator started this process for; fails on purpose when the run asks for it."""
        env = os.environ
        stage = cls(
            run_id=env["MILLRACE_RUN_ID"],
            name=env["MILLRACE_STAGE"],
            attempt=int(env["MILLRACE_ATTEMPT"]),
            seed=int(env["MILLRACE_SEED"]),
            output=Path(env["MILLRACE_OUTPUT_DIR"]),
            inputs={name: Path(folder) for name, folder in json.loads(env["MILLRACE_INPUTS"]).items()},
            parameters=json.loads(env["MILLRACE_PARAMETERS"]),
            reproduction_of=env.get("MILLRACE_REPRODUCTION_OF", ""),
        )
        if stage.parameters.get("fail_once") == stage.name and stage.attempt == 1:
            print(f"{stage.name}: fails on its first attempt because parameter fail_once names it", flush=True)
            sys.exit(TEMPORARY)
        return stage

    def refuse(self, reason: str) -> NoReturn:
        """End the attempt so that it is not tried again."""
        print(f"{self.name}: {reason}", file=sys.stderr, flush=True)
        sys.exit(PERMANENT)

    def number(self, parameter: str, default: float) -> float:
        """A numeric parameter; `default` when it is empty."""
        text = self.parameters.get(parameter, "")
        try:
            return float(text) if text else default
        except ValueError:
            self.refuse(f"parameter {parameter} is {text!r}, not a number")

    def result(self, **values: Any) -> None:
        """Leave `result.json`, which the coordinator reads and shows."""
        write_json(self.output / "result.json", values)

    def period(self) -> "Period":
        """Which flights are trained on and which are held out."""
        instants: dict[str, datetime | None] = {}
        for parameter in ("train_start", "train_end", "test_end", "known_at"):
            text = self.parameters.get(parameter, "")
            try:
                instants[parameter] = datetime.fromisoformat(text) if text else None
            except ValueError:
                self.refuse(f"parameter {parameter} is {text!r}, not an instant")
        start, end, test_end = instants["train_start"], instants["train_end"], instants["test_end"]
        if start is None or end is None:
            self.refuse("parameters train_start and train_end are needed")
        if test_end is None:
            test_end, end = end, end - timedelta(days=self.number("holdout_days", 14))
        if not start < end < test_end:
            self.refuse(f"{start} to {end} to {test_end} is no order of train_start, split and end")
        return Period(start, end, test_end, instants["known_at"] or test_end)


@dataclass(frozen=True)
class Period:
    """Flights scheduled from `start` to `split` are trained on, those from `split` to `end` are held out."""

    start: datetime
    split: datetime
    end: datetime
    known_at: datetime


@dataclass(frozen=True)
class Dataset:
    """The training set as the validate stage left it, in event-time order."""

    names: list[str]
    """N feature names, `view__feature`, in vector order."""
    features: Floats
    """Shape (rows, N); NaN is missing."""
    labels: Floats
    """Shape (rows,), 0 or 1."""
    split: int
    """Rows before it are trained on, the others held out."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the validate stage's files; features are mapped, not read."""
        schema = read_json(folder / "schema.json")
        features = np.load(folder / "features.npy", mmap_mode="r")
        return cls(schema["feature_names"], features, np.load(folder / "labels.npy"), schema["train_rows"])

    def columns(self, which: str) -> Places:
        """Places of the columns a version looks at: `base` or `all`."""
        chosen = [i for i, name in enumerate(self.names) if which == "all" or name.split("__")[0] in BASE_VIEWS]
        return np.array(chosen, dtype=np.int64)


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """A JSON file with the same bytes for the same values."""
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
