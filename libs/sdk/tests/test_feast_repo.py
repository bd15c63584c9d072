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


HEAD = """
from datetime import timedelta
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Float64, String

events = FileSource(name="events", path="events", timestamp_field="at")
user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
fields = [Field(name="user", dtype=String), Field(name="amount", dtype=Float64)]
"""
PERMISSIONS = """
from feast.permissions.action import AuthzedAction
from feast.permissions.permission import Permission
from feast.permissions.policy import RoleBasedPolicy

newest = FeatureView(name="newest", entities=[user], schema=fields, source=events)
rule = Permission(name="r", types=[FeatureView], policy=RoleBasedPolicy(roles=["a"]), actions=[AuthzedAction.UPDATE])
"""
BATCH = """
from feast import BatchFeatureView
from feast.aggregation import Aggregation

total = BatchFeatureView(
    name="total", entities=[user], schema=fields, source=events, mode="python", udf=lambda rows: rows, udf_string="rows",
    aggregations=[Aggregation(column="amount", function="sum", time_window=timedelta(hours=1))],
)
"""


@pytest.mark.filterwarnings("ignore")
def test_permissions_go_along(tmp_path: Path) -> None:
    from feast.protos.feast.core.Registry_pb2 import Registry

    (tmp_path / "feature_store.yaml").write_text("project: p\n")
    (tmp_path / "features.py").write_text(HEAD + PERMISSIONS)
    (rule,) = Registry.FromString(registry_from_repo(tmp_path)[1]).permissions
    assert rule.spec.policy.role_based_policy.roles == ["a"]
    assert not rule.HasField("meta")


@pytest.mark.filterwarnings("ignore")
def test_aggregations_that_feast_would_lose_are_refused(tmp_path: Path) -> None:
    (tmp_path / "feature_store.yaml").write_text("project: p\n")
    (tmp_path / "features.py").write_text(HEAD + BATCH)
    with pytest.raises(ValueError, match="'total' has aggregations, which Feast loses"):
        registry_from_repo(tmp_path)
