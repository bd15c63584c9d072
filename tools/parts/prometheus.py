"""Prometheus and its rule checker, run by the tests themselves."""

import shutil


def missing() -> str:
    """What to install, or empty when both programs are there."""
    there = shutil.which("prometheus") and shutil.which("promtool")
    return "" if there else "needs prometheus and promtool (Debian: prometheus)"
