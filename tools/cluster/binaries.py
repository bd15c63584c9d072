"""Programs a test cluster needs and Debian has not: built once from their Go modules into a cache.

A program is built again when what it is built from changes (module version, or the sources in `kubernetes/`).
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("MILLRACE_CACHE", Path.home() / ".cache" / "millrace"))
BIN = CACHE / "bin"
SOURCES = Path(__file__).parent / "kubernetes"
KUBERNETES = "v1.34.4"
BUILD_TIMEOUT_S = 2400.0
_VERSION = "k8s.io/component-base/version"


class BuildError(Exception):
    """A program that could not be built; the message shows the compiler's last lines."""


@dataclass(frozen=True)
class Program:
    """One program."""

    name: str
    package: str
    """`./folder` in `kubernetes/`, or `module/path@version`."""
    ldflags: str = "-s -w"
    inside: str = ""
    """`./folder` to build in the folder of module `package`: `go install` refuses modules with `replace` lines."""

    def key(self) -> str:
        """Changes whenever the program has to be built again."""
        digest = hashlib.sha256(f"{self.package} {self.ldflags}{self.inside}".encode())
        if self.package.startswith("./"):
            for path in sorted([SOURCES / "go.mod", SOURCES / "go.sum", *(SOURCES / self.package).glob("*.go")]):
                digest.update(path.read_bytes())
        return digest.hexdigest()

    def built(self) -> bool:
        """Whether the cache holds it."""
        stamp = BIN / f".{self.name}.key"
        return (BIN / self.name).exists() and stamp.exists() and stamp.read_text(encoding="ascii") == self.key()


PROGRAMS = {
    program.name: program
    for program in (
        Program(
            "kube-all",
            "./components",
            f"-s -w -X {_VERSION}.gitVersion={KUBERNETES} -X {_VERSION}.gitMajor=1 -X {_VERSION}.gitMinor=34",
        ),
        Program("coredns", "./coredns"),
        Program("pause", "./pause"),
        Program("helm", "helm.sh/helm/v3/cmd/helm@v3.22.0"),
        Program("untt", "github.com/helm-unittest/helm-unittest@v1.1.2", inside="./cmd/helm-unittest"),
    )
}


def missing() -> str:
    """Why programs cannot be built here, or empty."""
    return "" if shutil.which("go") else "needs Go to build Kubernetes"


def build(*names: str) -> None:
    """Build what the cache lacks.

    Raises:
        BuildError: a build failed.
    """
    BIN.mkdir(parents=True, exist_ok=True)
    for name in names or PROGRAMS:
        program = PROGRAMS[name]
        if program.built():
            continue
        began = time.monotonic()
        print(f"cluster: building {name} from {program.package}", file=sys.stderr, flush=True)
        _build(program)
        (BIN / f".{name}.key").write_text(program.key(), encoding="ascii")
        print(f"cluster: built {name} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _build(program: Program) -> None:
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-trimpath"}
    if program.package.startswith("./"):
        command = ["go", "build", "-ldflags", program.ldflags, "-o", str(BIN / program.name), program.package]
        folder = SOURCES
    elif program.inside:
        command = ["go", "build", "-ldflags", program.ldflags, "-o", str(BIN / program.name), program.inside]
        folder = _module(program.package, environment)
    else:
        command = ["go", "install", "-ldflags", program.ldflags, program.package]
        environment["GOBIN"] = str(BIN)
        folder = BIN
    done = subprocess.run(
        command, cwd=folder, env=environment, check=False, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
    )
    if done.returncode:
        raise BuildError(f"{program.name}: {' '.join(command)} failed:\n{done.stderr[-3000:]}")


def _module(package: str, environment: dict[str, str]) -> Path:
    """Folder of a module's sources in Go's cache."""
    command = ["go", "mod", "download", "-json", package]
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
    )
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return Path(json.loads(done.stdout)["Dir"])
