"""Print what packages of this repository need from the package index, with the extras they ask each other for.

    python3 deploy/images/requirements.py services/registry libs/kit protos

Every Dockerfile calls it on `pyproject.toml` files alone, so that a change of code does not install dependencies again. What a package
needs of another package of this repository is not printed; the extras named there are.
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS = re.compile(r"(?P<name>millrace[a-z-]*)(\[(?P<extras>[a-z0-9, -]+)\])?")


def requirements(projects: Iterable[dict[str, Any]], extras: Iterable[str] = ()) -> list[str]:
    """Requirements of all `projects` (tables `project`) together; `extras` are asked for in addition, as `package[extra]`."""
    known = {str(project["name"]): project for project in projects}
    wanted: list[str] = [*known, *extras]
    seen, found = set[str](), set[str]()
    while wanted:
        text = wanted.pop()
        if text in seen:
            continue
        seen.add(text)
        ours = OURS.fullmatch(text)
        if ours is None:
            found.add(text)
            continue
        # One that is asked for without an extra is installed as a whole; its folder is on the command line or it needs nothing.
        project = known.get(ours["name"], {})
        if ours["extras"] is None:
            wanted += project.get("dependencies", [])
        for extra in (ours["extras"] or "").split(","):
            wanted += project.get("optional-dependencies", {}).get(extra.strip(), []) if extra else []
    return sorted(found)


def main() -> int:
    """Print the requirements of the folders on the command line, `folder[extra]` with an extra."""
    projects, extras = [], []
    for argument in sys.argv[1:]:
        folder, _, extra = argument.rstrip("]").partition("[")
        project = tomllib.loads(Path(folder, "pyproject.toml").read_text(encoding="utf-8"))["project"]
        projects.append(project)
        extras += [f"{project['name']}[{extra}]"] if extra else []
    print("\n".join(requirements(projects, extras)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
