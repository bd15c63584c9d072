"""References to secrets in settings: followed, named when they lead nowhere, and never shown."""

import json
import logging
import sys
from pathlib import Path
from typing import Self

import pytest
from millrace_kit.entry import read_arguments
from millrace_kit.references import MAX_FILE_BYTES, MIN_MASKED_CHARACTERS
from millrace_kit.settings import ServiceSettings, Settings, SettingsError, load_settings
from millrace_kit.telemetry import start_telemetry
from pydantic import Field, model_validator

SECRET = "hunter2/@:secret"
ENCODED = "hunter2%2F%40%3Asecret"


class Example(Settings):
    url: str = ""
    names: tuple[str, ...] = ()
    options: dict[str, str] = Field(default_factory=dict)
    number: int = 0
    short: str = Field(default="", max_length=3)
    picky: str = ""

    @model_validator(mode="after")
    def _picky(self) -> Self:
        if self.picky:
            raise ValueError(f"picky: {self.picky!r} is not good")
        return self


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILLRACE_TEST_SECRET", SECRET)
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n", encoding="utf-8")
    return file


def load(tmp_path: Path, text: str, *, tolerant: bool = False) -> Example:
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return load_settings(Example, file, tolerant=tolerant)


def test_files_and_variables_anywhere_in_any_string(secret: Path, tmp_path: Path) -> None:
    text = f"""
url: postgresql://me:${{url-file:{secret}}}@host/${{url-env:MILLRACE_TEST_SECRET}}
names: [plain, "${{file:{secret}}}"]
options: {{token: "a ${{env:MILLRACE_TEST_SECRET}} b", dollar: "$${{env:HOME}} costs $5"}}
"""
    settings = load(tmp_path, text)
    assert settings.url == f"postgresql://me:{ENCODED}@host/{ENCODED}"
    assert settings.names == ("plain", SECRET)
    assert settings.options == {"token": f"a {SECRET} b", "dollar": "${env:HOME} costs $5"}


def test_what_a_reference_stands_for_is_not_expanded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_TEST_SECRET", "${env:HOME}")
    assert load(tmp_path, "url: ${env:MILLRACE_TEST_SECRET}").url == "${env:HOME}"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("options: {password: '${file:/no/such/file}'}", r"options\.password: /no/such/file: No such file"),
        ("names: [a, '${env:MILLRACE_NOT_SET}']", r"names\.1: there is no environment variable MILLRACE_NOT_SET"),
        ("url: '${fil:/x}'", r"url: unknown reference"),
        ("url: '${HOME}'", r"url: a reference is"),
        ("url: '${file:/x'", r"url: a reference is"),
        ("url: '${file:}'", r"url: a reference is"),
        ("{url: '${env:A_}', names: ['${env:B_}']}", r"url.*A_.*names\.0.*B_"),
    ],
)
def test_what_leads_nowhere_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load(tmp_path, text)


def test_files_that_are_no_secrets(tmp_path: Path) -> None:
    file = tmp_path / "big"
    file.write_bytes(b"a" * (MAX_FILE_BYTES + 1))
    with pytest.raises(SettingsError, match="longer than"):
        load(tmp_path, f"url: ${{file:{file}}}")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="no UTF-8"):
        load(tmp_path, f"url: ${{file:{file}}}")


def test_a_tolerant_check_keeps_what_is_not_here(secret: Path, tmp_path: Path) -> None:
    settings = load(tmp_path, f"{{url: '${{file:/no/such/file}}', names: ['${{file:{secret}}}']}}", tolerant=True)
    assert settings.url == "${file:/no/such/file}"
    assert settings.names == (SECRET,)
    with pytest.raises(SettingsError, match="unknown reference"):
        load(tmp_path, "url: '${fil:/x}'", tolerant=True)


def test_a_tolerant_check_knows_keys_that_must_have_a_form(tmp_path: Path) -> None:
    class Formed(Settings):
        pod: str = Field(pattern=r"^[a-z0-9-]+$")
        number: int = 0

    file = tmp_path / "settings.yaml"
    file.write_text("pod: ${env:MILLRACE_NOT_SET}\n", encoding="utf-8")
    assert load_settings(Formed, file, tolerant=True).pod == "placeholder"
    file.write_text("{pod: '${env:MILLRACE_NOT_SET}', number: no}\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="number"):
        load_settings(Formed, file, tolerant=True)
    file.write_text("pod: A_B\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="pod"):
        load_settings(Formed, file, tolerant=True)


@pytest.mark.parametrize("wrong", ["number", "short", "picky", "no_such_key"])
@pytest.mark.parametrize("reference", ["${env:MILLRACE_TEST_SECRET}", "x${url-env:MILLRACE_TEST_SECRET}"])
def test_errors_never_show_a_secret(secret: Path, tmp_path: Path, wrong: str, reference: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, f"{wrong}: '{reference}'")
    assert wrong in str(caught.value)
    seen: BaseException | None = caught.value
    while seen is not None:  # what a traceback would print too
        assert "hunter2" not in f"{seen} {seen!r}"
        seen = seen.__cause__ or seen.__context__


def test_the_log_never_shows_a_secret(
    secret: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))
    settings = load(tmp_path, f"url: ${{file:{secret}}}")
    start_telemetry("test", ServiceSettings().telemetry)
    log = logging.getLogger("millrace_test")
    log.warning("connecting to %s", settings.url)
    log.warning("settings are %r", settings)
    try:
        int(ENCODED)
    except ValueError:
        log.exception("failed")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if "millrace_test" in line]
    assert [line["message"] for line in lines] == ["connecting to ***", lines[1]["message"], "failed"]
    assert "hunter2" not in json.dumps(lines)
    assert "'***'" in lines[2]["error"]
    assert len(SECRET) >= MIN_MASKED_CHARACTERS


def test_check_works_without_the_files_and_a_start_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("url: ${file:/no/such/file}\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["millrace-test", "--config", str(file), "--check"])
    with pytest.raises(SystemExit) as ended:
        read_arguments("test", Example)
    assert ended.value.code == 0
    monkeypatch.setattr(sys, "argv", ["millrace-test", "--config", str(file)])
    with pytest.raises(SystemExit) as ended:
        read_arguments("test", Example)
    assert ended.value.code == 2
    assert "url: /no/such/file" in capsys.readouterr().err
