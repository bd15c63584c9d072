"""What a join is."""

from dataclasses import dataclass
from enum import Enum


class JoinKind(Enum):
    """Which rows a join makes; the value is the name in the `.proto` without its prefix."""

    INNER = "INNER"
    LEFT = "LEFT"
    AS_OF = "AS_OF"


@dataclass(frozen=True)
class JoinKey:
    """Columns whose values must be equal."""

    left: str
    right: str


@dataclass(frozen=True)
class JoinSpec:
    """Two contracts that are joined; see `JoinSource` in the protos. Times are microseconds of event time, unless they say otherwise."""

    kind: JoinKind
    left: str
    right: str
    keys: tuple[JoinKey, ...]
    before_us: int = 0
    """How far a partner may lie before the left record; for AS_OF its largest age, `ANY_AGE_US` without a bound."""
    after_us: int = 0
    lateness_us: int = 0
    idle_s: float = 0.0
    """Of the wall clock."""
    wait_s: float = 0.0
    """Of the wall clock."""
    right_prefix: str = ""

    @property
    def open_us(self) -> int:
        """How long after its event time a left record may still find partners."""
        return self.after_us + self.lateness_us

    @property
    def identity(self) -> str:
        """What cannot change: how far a join is would mean something else."""
        keys = ",".join(f"{key.left}={key.right}" for key in self.keys)
        return f"{self.kind.value}:{self.left}:{self.right}:{keys}:{self.before_us}:{self.after_us}:{self.right_prefix}"


ANY_AGE_US = 1 << 60
