"""A Feast repository becomes the same message in every process."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from millrace.feast_repo import registry_from_repo

REPO = Path(__file__).parents[3] / "deploy/samples/flights/feature_repo"
CODE = """
import hashlib, sys
from pathlib import Path
from millrace.feast_repo import registry_from_repo
project, content = registry_from_repo(Path(sys.argv[1]))
print(project, hashlib.sha256(content).hexdigest())
"""


@pytest.mark.slow
def test_the_same_bytes_from_another_process_and_place(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for name in ("features.py", "feature_store.yaml"):
        (copy / name).write_bytes((REPO / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, str(copy)],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    project, content = registry_from_repo(REPO)
    assert done.stdout.split() == [project, hashlib.sha256(content).hexdigest()]
    assert registry_from_repo(REPO) == (project, content)


def test_a_folder_without_a_repository(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        registry_from_repo(tmp_path)
    (tmp_path / "feature_store.yaml").write_text("provider: local\n")
    with pytest.raises(ValueError, match="names no project"):
        registry_from_repo(tmp_path)
