"""Entry point of `kubectl-millrace`, which kubectl runs for `kubectl millrace`."""

import sys
from importlib.util import find_spec

NEEDED = {"kubernetes": "kubernetes", "cel": "common-expression-language", "numpy": "numpy"}


def main() -> None:
    """Run the plugin; says what to install where its extra is missing."""
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        print(f"kubectl millrace: needs {', '.join(missing)} (pip install 'millrace[kubernetes]')", file=sys.stderr)
        raise SystemExit(1)
    from millrace.kubectl.commands import root

    root(prog_name="kubectl millrace")
