"""Grafana dashboards of the chart, made from the tables in `panels`: `python -m chart.dashboards` writes them, `--check` compares."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from chart.panels import DASHBOARDS, Panel

FOLDER = Path(__file__).resolve().parents[2] / "charts" / "millrace" / "dashboards"
COLUMNS, WIDTH, HEIGHT = 2, 12, 8
# Grafana's own number of this JSON's layout.
SCHEMA_VERSION = 39
HERE = 'namespace="$namespace"'


def metrics_in(text: str) -> set[str]:
    """Names of Millrace's metrics in a text."""
    return set(re.findall(r"\bmillrace_[a-z0-9_]+", text)) - {
        "millrace_reading",
        "millrace_dev_model",
        "millrace_dev_version",
    }


def dashboard(name: str, title: str, panels: tuple[Panel, ...]) -> dict[str, Any]:
    """One dashboard as Grafana reads it."""
    return {
        "uid": f"millrace-{name}",
        "title": title,
        "tags": ["millrace"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "links": [{"type": "dashboards", "title": "Millrace", "tags": ["millrace"], "asDropdown": True}],
        "templating": {"list": [_variable("datasource"), _variable("namespace")]},
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _variable(name: str) -> dict[str, Any]:
    if name == "datasource":
        return {"name": name, "type": "datasource", "query": "prometheus", "label": "Data source"}
    query = "label_values(millrace_rpc_server_duration_seconds_count, namespace)"
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {"name": name, "type": "query", "datasource": source, "query": query, "refresh": 2, "label": "Namespace"}


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    place = {"x": number % COLUMNS * WIDTH, "y": number // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT}
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": source,
            "expr": query.replace("%%", HERE),
            "legendFormat": legend,
        }
        for index, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number + 1,
        "type": panel.kind,
        "title": panel.title,
        "datasource": source,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"showLegend": True, "displayMode": "list", "placement": "bottom"}},
        "targets": targets,
    }


def rendered() -> dict[str, str]:
    """Text of every file, by its name."""
    return {
        f"{name}.json": json.dumps(dashboard(name, title, panels), indent=1) + "\n"
        for name, (title, panels) in DASHBOARDS.items()
    }


def main() -> int:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(prog="python -m chart.dashboards", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is not up to date")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    stale = 0
    for name, text in rendered().items():
        path = FOLDER / name
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path} is not what its table says: run python -m chart.dashboards", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    raise SystemExit(main())
