"""Build hook: generated code is made when the wheel is built, never committed."""

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent))


class GenerateHook(BuildHookInterface[Any]):
    """Runs the protobuf compiler over `millrace_api/` before the wheel is packed."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's own signature
        """Generate before the files are collected."""
        from generate import generate

        generate(Path(self.root))
