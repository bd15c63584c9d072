"""Settings are strict: a typo or a wrong type is an error that names the key."""

from pathlib import Path

import pytest
from millrace_kit.settings import (
    BusSettings,
    KafkaSecurity,
    ServiceSettings,
    SettingsError,
    load_settings,
    parse_settings,
)
from pydantic import ValidationError


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_settings(ServiceSettings, written(tmp_path, "")) == ServiceSettings()


def test_nested_blocks_and_lists(tmp_path: Path) -> None:
    text = "listen: 127.0.0.1:7403\nbus:\n  kind: kafka\n  bootstrap_servers: [a:9092, b:9092]\n"
    settings = load_settings(ServiceSettings, written(tmp_path, text))
    assert settings.bus.bootstrap_servers == ("a:9092", "b:9092")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lisen: 127.0.0.1:1\n", "lisen"),
        ("bus: {kind: rabbit}\n", "bus.kind"),
        ("bus: {partitions: '3'}\n", "bus.partitions"),
        ("bus: {partitions: 0}\n", "bus.partitions"),
        ("max_message_mib: 2000\n", "max_message_mib"),
        ("telemetry: {sample_ratio: 2}\n", "telemetry.sample_ratio"),
        ("- a\n- b\n", "(top)"),
        ("listen: 2020-01-01\n", "settings.yaml"),
        ("a: [", "not YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(ServiceSettings, written(tmp_path, text))
    assert named in str(caught.value)
    assert "settings.yaml" in str(caught.value)


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(SettingsError, match=r"one.*two"):
        parse_settings(ServiceSettings, {"one": 1, "two": 2}, "here")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        load_settings(ServiceSettings, tmp_path / "none.yaml")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        BusSettings().kind = "kafka"  # type: ignore[misc]


def test_every_setting_is_explained() -> None:
    for block in (ServiceSettings, BusSettings, KafkaSecurity):
        assert [
            name
            for name, field in block.model_fields.items()
            if not field.description and name not in {"tls", "bus", "telemetry", "security"}
        ] == []
