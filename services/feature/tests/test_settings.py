"""Processes that share ports need what replicas need."""

from typing import Any

import pytest
from millrace_feature.settings import FeatureSettings
from millrace_kit.settings import SettingsError, parse_settings

SHARED: dict[str, Any] = {
    "listen": "127.0.0.1:7402",
    "processes": 4,
    "database_url": "postgresql+psycopg://db/features",
    "bus": {"kind": "kafka", "bootstrap_servers": ["kafka:9092"]},
    "online_store": {"kind": "redis"},
}


def test_processes_with_all_they_share() -> None:
    assert parse_settings(FeatureSettings, SHARED, "test").processes == 4


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"online_store": {"kind": "embedded"}}, "online_store.kind"),
        ({"bus": {"kind": "embedded"}}, "bus.kind"),
        ({"database_url": ""}, "database_url"),
        ({"listen": "127.0.0.1:0"}, "listen"),
        ({"feast": {"http_listen": "127.0.0.1:0"}}, "feast.http_listen"),
    ],
)
def test_processes_that_could_share_nothing_are_refused(changed: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        parse_settings(FeatureSettings, {**SHARED, **changed}, "test")
