"""Every test of the repository may use the real servers of `tools/parts`."""

pytest_plugins = ["parts.plugin"]
