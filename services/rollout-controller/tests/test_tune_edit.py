"""`millrace tune`: writing the result into a manifest (comments and everything else stay), reading requests, and refusals."""

import asyncio
import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from millrace_kit.clock import FakeClock, SystemClock
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError
from millrace_rollout_controller.manifest import parse
from millrace_rollout_controller.probe import sample_request
from millrace_rollout_controller.server_block import Server
from millrace_rollout_controller.settings import RolloutSettings, TritonSettings
from millrace_rollout_controller.tuning import command, edit, report, requests
from millrace_rollout_controller.tuning.bench import Bench, Method, measured, private_executor
from millrace_rollout_controller.tuning.configuration import Configuration
from millrace_rollout_controller.tuning.decision import ROUNDS, decide
from millrace_rollout_controller.warm_gate import Window
from tritonclient.grpc import service_pb2

from .support import Files, version_ref
from .test_tune_search import Modelled, search

BLOCK = """\
# The flights model.
apiVersion: millrace.dev/v1alpha1
kind: ModelDeployment
metadata: {name: flights}   # one line
spec:
  model: flight-delay
  version: 1.0.0
  server:
    # Two of them, for one may die.
    replicas: 2
    maxBatchSize: 16     # rows
    batching:
      maxQueueSize: 128
      preferredSizes:
        - 4   # measured in May
        - 8

    # Callers give up after this.
    timeoutMs: 500
  rollout:
    steps: [{weight: 5}, {weight: 100}]
"""
TUNED = Configuration(instances=4, max_batch_size=32, queue_delay_us=200, preferred_sizes=(16,))
HEAD = "apiVersion: millrace.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {name: flights}\n"


def test_comments_layout_and_all_other_fields_stay() -> None:
    made = edit.edited(BLOCK, TUNED)
    expected = (
        BLOCK.replace("    replicas: 2", "    instances: 4\n    queueDelayUs: 200\n    replicas: 2")
        .replace("maxBatchSize: 16 ", "maxBatchSize: 32 ")
        .replace("preferredSizes:\n        - 4   # measured in May\n        - 8", "preferredSizes: [16]")
    )
    assert made == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            "spec: {model: m, version: 1.0.0}",
            "spec: {server: {instances: 4, maxBatchSize: 32, queueDelayUs: 200, batching: {preferredSizes: [16]}}, model: m, version: 1.0.0}",
        ),
        (
            "spec:\n  model: m\n  version: 1.0.0  # last",
            "spec:\n  server: {instances: 4, maxBatchSize: 32, queueDelayUs: 200, batching: {preferredSizes: [16]}}\n  model: m\n  version: 1.0.0  # last",
        ),
        (
            "spec: {model: m, version: 1.0.0, server: {}}",
            "spec: {model: m, version: 1.0.0, server: {instances: 4, maxBatchSize: 32, queueDelayUs: 200, batching: {preferredSizes: [16]}}}",
        ),
        (
            "spec:\n  model: m\n  version: 1.0.0\n  server: {queueDelayUs: 7, maxBatchSize: 32, instances: 2}",
            "spec:\n  model: m\n  version: 1.0.0\n  server: {batching: {preferredSizes: [16]}, queueDelayUs: 200, maxBatchSize: 32, instances: 4}",
        ),
        (
            "spec:\r\n  model: m\r\n  version: 1.0.0\r\n  server:\r\n    instances: 4\r\n    batching: {preferredSizes: [8]}\r\n",
            "spec:\r\n  model: m\r\n  version: 1.0.0\r\n  server:\r\n    maxBatchSize: 32\r\n    queueDelayUs: 200\r\n    instances: 4\r\n    batching: {preferredSizes: [16]}\r\n",
        ),
    ],
)
def test_every_layout(spec: str, expected: str) -> None:
    assert edit.edited(HEAD + spec, TUNED) == HEAD + expected


def test_json_stays_json_and_what_is_equal_stays_untouched() -> None:
    document = yaml.safe_load(BLOCK)
    made = json.loads(edit.edited(json.dumps(document, indent=2), TUNED))
    document["spec"]["server"] |= {"instances": 4, "maxBatchSize": 32, "queueDelayUs": 200}
    document["spec"]["server"]["batching"]["preferredSizes"] = [16]
    assert made == document
    assert edit.edited(BLOCK, Configuration.of(parse(BLOCK).spec.server)) == BLOCK
    cleared = edit.edited(BLOCK, Configuration(1, 16, 0))
    assert parse(cleared).spec.server.batching.preferred_sizes == ()
    assert "maxQueueSize: 128" in cleared


def test_rare_layouts_mean_the_same_afterwards() -> None:
    odd = HEAD + "spec:\n  model: m\n  version: 1.0.0\n  ? server\n  : instances: !!int 1\n    'maxBatchSize': 16\n"
    made = parse(edit.edited(odd, TUNED))
    assert made.spec.server == TUNED.applied(parse(odd).spec.server)


def test_an_edit_that_would_mean_something_else_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    at = BLOCK.index("replicas: 2") + len("replicas: ")
    for wrong in ((at, at + 1, "3"), (at, at, "{")):
        right = edit._edits(BLOCK, Configuration.of(parse(BLOCK).spec.server), TUNED)
        with monkeypatch.context() as patched:
            patched.setattr(edit, "_edits", lambda *_, right=right, wrong=wrong: [*right, wrong])
            with pytest.raises(FailedPreconditionError, match=r"write it by hand: server: \{instances: 4") as refused:
                edit.edited(BLOCK, TUNED)
        assert refused.value.reason == "LAYOUT_NOT_EDITABLE"


def test_a_file_is_replaced_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text("before")
    path.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    edit.write(link, "after\r\n")
    assert path.read_bytes() == b"after\r\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, path]


async def nobody(model: str, limit: int) -> list[bytes]:
    return []


async def test_requests_are_those_of_a_file_else_of_callers_else_zeros(tmp_path: Path) -> None:
    ref = version_ref("1.0.0", b"x")
    logged = sample_request(ref)
    logged.model_version, logged.inputs[0].shape[0] = "1000004000000", 3
    logged.raw_input_contents[0] = bytes(48)

    async def samples(model: str, limit: int) -> list[bytes]:
        return [logged.SerializeToString(), sample_request(ref).SerializeToString(), b"\xff no request"]

    of_callers = await requests.load(ref, None, samples, max_rows=3)
    assert (len(of_callers.bodies), of_callers.rows, of_callers.max_rows) == (2, 2.0, 3)
    assert service_pb2.ModelInferRequest.FromString(of_callers.bodies[0]).model_version == ""
    assert len((await requests.load(ref, None, samples, max_rows=2)).bodies) == 1, "no server answers three rows then"
    zeros = await requests.load(ref, None, nobody, max_rows=64)
    assert (len(zeros.bodies), zeros.max_rows) == (1, 1)
    assert "zeros" in zeros.source
    path = tmp_path / "requests.json"
    path.write_text(
        json.dumps({"data": [{"features": [1, 2, 3, 4]}, {"features": {"content": [5, 6, 7, 8], "shape": [4]}}]})
    )
    of_file = await requests.load(ref, path, samples, max_rows=3)
    made = [service_pb2.ModelInferRequest.FromString(body) for body in of_file.bodies]
    assert [list(one.inputs[0].shape) for one in made] == [[1, 4], [1, 4]]
    assert np.frombuffer(made[1].raw_input_contents[0], np.float32).tolist() == [5, 6, 7, 8]
    assert of_file.source == "2 requests of requests.json"


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("no json", "--requests"),
        ([], "data"),
        ({"data": []}, "data"),
        ({"data": [{}]}, "data[0]"),
        ({"data": [{"features": [1, 2, 3, 4]}, {"features": [1, 2]}]}, "data[1].features"),
        ({"data": [{"features": ["a", "b", "c", "d"]}]}, "data[0].features"),
        ({"data": [{"features": {"content": [1, 2, 3, 4], "shape": [2, 2]}}]}, "data[0].features"),
    ],
)
def test_a_wrong_request_is_named(tmp_path: Path, content: Any, field: str) -> None:
    path = tmp_path / "requests.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InvalidArgumentError) as refused:
        requests.from_file(version_ref("1.0.0", b"x"), path)
    assert refused.value.field == field


def test_open_dimensions_take_their_length_from_the_values(tmp_path: Path) -> None:
    ref = version_ref("1.0.0", b"x")
    ref = ref.model_copy(update={"inputs": (ref.inputs[0].model_copy(update={"shape": (-1, 2)}),)})
    path = tmp_path / "requests.json"
    path.write_text(json.dumps({"data": [{"features": [1, 2, 3, 4, 5, 6]}]}))
    (made,) = requests.from_file(ref, path)
    assert list(made.inputs[0].shape) == [1, 3, 2]


@pytest.mark.parametrize(
    ("server", "options", "field"),
    [
        ("{resources: {limits: {nvidia.com/gpu: 1}}}", {}, "spec.server.resources.limits[nvidia.com/gpu]"),
        ("{timeoutMs: 10}", {}, "--p99"),
        ("{maxBatchSize: 8}", {"min_batch_size": 16}, "--min-batch-size"),
        ("{maxBatch: 8}", {}, "spec.server.maxBatch"),
    ],
)
async def test_what_cannot_be_tuned_is_refused_before_anything_starts(
    tmp_path: Path, server: str, options: dict[str, Any], field: str
) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text(f"{HEAD}spec: {{model: m, version: 1.0.0, server: {server}}}")
    settings = RolloutSettings.model_validate({"state_dir": str(tmp_path / "state")})
    with pytest.raises(InvalidArgumentError) as refused:
        await command.tune(command.Options(path, 20.0, **options), settings, SystemClock())
    assert refused.value.field == field
    assert not (tmp_path / "state").exists()


async def test_without_a_registry_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text(BLOCK)
    settings = RolloutSettings.model_validate(
        {"state_dir": str(tmp_path), "registry_address": "127.0.0.1:1", "registry_timeout_s": 0.5}
    )
    with pytest.raises(Exception, match="the registry does not answer"):
        await command.tune(command.Options(path, 20.0), settings, SystemClock())


def test_two_tuners_do_not_measure_each_other(tmp_path: Path) -> None:
    with (
        command._alone(tmp_path),
        pytest.raises(FailedPreconditionError, match="another tune runs"),
        command._alone(tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--p99", "20"], "--p99"),
        (["--p99", "20ms", "--budget", "soon"], "--budget"),
        (["--p99", "20ms", "--max-concurrency", "0"], "--max-concurrency"),
        (["--p99", "20ms", "--write", "--output", "x"], "--output"),
    ],
)
def test_wrong_options_are_named(words: list[str], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        command.arguments(["--config", "c", "-f", "m", *words])
    assert refused.value.field == field


def test_the_cache_and_other_servers_are_left_out_of_what_is_measured() -> None:
    block = Server.model_validate_json(
        '{"placement": "Shared", "memoryMib": 100, "replicas": 3, "responseCacheMib": 8, "maxBatchSize": 8}'
    )
    assert measured(block) == Server.model_validate({"maxBatchSize": 8})


async def outcome(
    monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object] = lambda: None, p99_ms: float = 50.0
) -> None:
    """Have the tuner's measuring say that a shorter wait and more instances are better, if anything meets the bound."""
    model = Modelled()
    made = search(model, parse(BLOCK).spec.server.model_copy(update={"queue_delay_us": 20_000}), p99_ms=p99_ms)
    decision = await decide(made, p99_ms, model.play)
    assert decision.verdict == ("better" if p99_ms == 50.0 else "undecided")

    async def measure(*_: object, **__: object) -> command._Measured:
        meanwhile()
        ref = version_ref("1.0.0", b"x")
        return command._Measured(ref, report.this_machine("2.51.0"), "3 requests of a file", made, decision)

    monkeypatch.setattr(command, "_measure", measure)


async def test_the_report_says_what_it_was_measured_on_and_how_sure_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, output = tmp_path / "manifest.yaml", tmp_path / "tuned.yaml"
    path.write_text(BLOCK)
    await outcome(monkeypatch)
    options = command.Options(path, 50.0, output=output)
    made = await command.tune(options, RolloutSettings(), SystemClock())
    text, found = made.text(), made.json()
    assert f"{found['machine']['cores']} cores" in text
    assert "GPU not used" in text
    assert "noise: the same configuration differed by 0% between rounds" in text
    assert "(manifest)" in text.splitlines()[1]
    assert json.loads(json.dumps(found))["chosen"]["configuration"] == found["rounds"]["best"]["configuration"]
    assert len(found["rounds"]["ratios"]) == ROUNDS
    assert "+    instances:" in found["patch"]
    assert parse(output.read_text()).spec.server.instances == found["chosen"]["configuration"]["instances"]
    assert path.read_text() == BLOCK


async def test_a_manifest_that_was_changed_meanwhile_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text(BLOCK)
    await outcome(monkeypatch, lambda: path.write_text(BLOCK.replace("replicas: 2", "replicas: 3")))
    made = await command.tune(command.Options(path, 50.0, write=True), RolloutSettings(), SystemClock())
    assert made.written == ""
    assert "was changed while it was measured" in made.problem
    assert made.decision.verdict == "better", "what was measured is still told"
    assert "replicas: 3" in path.read_text()


@pytest.mark.parametrize(("p99_ms", "code"), [(50.0, 0), (1.0, 1)])
def test_the_exit_code_says_whether_it_was_decided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], p99_ms: float, code: int
) -> None:
    path, config = tmp_path / "manifest.yaml", tmp_path / "config.yaml"
    path.write_text(BLOCK)
    config.write_text("{}")
    asyncio.run(outcome(monkeypatch, p99_ms=p99_ms))
    words = ["tune", "--config", str(config), "-f", str(path), "--p99", f"{p99_ms}ms", "--write", "--json"]
    monkeypatch.setattr(sys, "argv", words)
    ended = 0
    try:
        command.main()
    except SystemExit as end:
        ended = end.code if isinstance(end.code, int) else -1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (ended, found["verdict"]) == (code, "undecided" if code else "better")
    assert (found["chosen"] is None, found["closest"] is None) == (code == 1, code == 0)
    assert (path.read_text() == BLOCK) == (code == 1)
    if code:
        assert "undecided, nothing is written: nothing meets a p99 of 1 ms; closest: {instances: 1" in printed.err
    else:
        assert f"next: millrace apply -f {path}" in printed.err


def test_a_point_is_broken_off_when_the_time_is_over(tmp_path: Path) -> None:
    clock, method, ref = FakeClock(), Method(), version_ref("1.0.0", b"x")
    executor = private_executor(tmp_path, TritonSettings(), Files(), clock)
    bench = Bench(
        executor, tmp_path, ref, Server(), [], bound_ms=50.0, method=method, clock=clock, ready_s=1.0, until=10.0
    )  # fmt: skip
    unsteady = [Window((1.0,), 1.0), Window((2.0,), 1.0), Window((1.0,), 1.0)]
    assert not bench._enough([])
    assert not bench._enough(unsteady)
    clock.advance(10.0)
    assert bench._enough(unsteady)
