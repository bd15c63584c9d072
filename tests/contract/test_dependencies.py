"""Every package declares what it imports, so that an image with only its own dependencies runs."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "libs/kit",
    "libs/sdk",
    *sorted(str(p.parent.relative_to(ROOT)) for p in ROOT.glob("services/*/pyproject.toml")),
)
# Looked up by file, or there only inside another process; never imported by the package's own process.
ELSEWHERE = {"pytriton", "triton_python_backend_utils", "torch"}
# A model's file that runs inside Triton, whose image brings what it imports.
OTHER_PROCESS = {"triton_model.py"}
# Several distributions share these names; the longest known prefix decides.
NAMESPACES = {
    "google.rpc": "googleapis-common-protos",
    "google.protobuf": "protobuf",
    "envoy.config": "xds-protos",
    "envoy.extensions": "xds-protos",
    "envoy.service": "xds-protos",
    "envoy.type": "xds-protos",
    "envoy.data": "xds-protos",
    "envoy.annotations": "xds-protos",
    "envoy.admin": "xds-protos",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-grpc",
    "opentelemetry.instrumentation": "opentelemetry-instrumentation-grpc",
    "opentelemetry": "opentelemetry-api",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "grpc_status": "grpcio-status",
    "millrace_api": "millrace-api",
    "pyspark": "pyspark",  # of an extra that is not installed here
}
# What another declared package brings and promises to bring.
BROUGHT = {
    "pandas": {"feast"},
    "opentelemetry-api": {"opentelemetry-sdk"},
    "googleapis-common-protos": {"grpcio-status", "xds-protos"},
    "grpcio": {"grpcio-status", "millrace-kit"},
}


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def _declared(package: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """What a package asks for, and what the kit it builds on asks for."""
    project = tomllib.loads((ROOT / package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = list(project["dependencies"])
    for extra in project.get("optional-dependencies", {}).values():
        asked += extra
    names = {_name(text) for text in asked} | {_name(project["name"])}
    if "millrace-kit" in names and package != "libs/kit":
        names |= _declared("libs/kit")
    return names


def _imports(package: str) -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / package / "src").rglob("*.py")):
        if path.name in OTHER_PROCESS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name, path.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.module, path.name


def _distributions(module: str, installed: dict[str, list[str]]) -> set[str]:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if known := NAMESPACES.get(".".join(parts[:length])):
            return {known}
    if parts[0].split("_")[0] == "millrace":  # ours are installed editable, which lists no files
        return {parts[0].replace("_", "-")}
    return {_name(name) for name in installed.get(parts[0], [])}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_declares_what_it_imports(package: str) -> None:
    installed = {name: list(found) for name, found in packages_distributions().items()}
    declared = _declared(package)
    undeclared = set()
    for module, file in _imports(package):
        top = module.partition(".")[0]
        if top in sys.stdlib_module_names or top in ELSEWHERE:
            continue
        possible = _distributions(module, installed)
        possible |= {other for name in possible for other in BROUGHT.get(name, ())}
        if not possible & declared:
            undeclared.add(f"{file} imports {module}: {' or '.join(sorted(possible)) or 'nobody installs it'}")
    assert not undeclared, f"{package}/pyproject.toml does not ask for: " + "; ".join(sorted(undeclared))
