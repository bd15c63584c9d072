"""Figures measured on the cluster, gathered into one JSON file (`build/perf/cluster.json`) as the tests go."""

import json

from tests.cluster.release import ROOT

FILE = ROOT / "build" / "perf" / "cluster.json"


def keep(name: str, value: object) -> None:
    """Add a figure, or replace it."""
    FILE.parent.mkdir(parents=True, exist_ok=True)
    figures = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    figures[name] = value
    FILE.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"\n{name}: {value}")
