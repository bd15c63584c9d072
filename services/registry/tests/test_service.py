"""The registry's calls over gRPC, as a client sees them."""

import asyncio
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from millrace_api.common.v1 import common_pb2
from millrace_api.events.v1 import events_pb2
from millrace_kit.bus import MODELS, Message, open_bus
from millrace_kit.errors import MillraceError
from millrace_registry.settings import RegistrySettings

from .harness import Client, R, model_version, serving, sha

STAGES = (R.STAGE_TESTING, R.STAGE_STAGING, R.STAGE_PRODUCTION)


def stored(settings: RegistrySettings, digest: str) -> Path:
    return Path(settings.state_dir) / "artifacts" / "sha256" / digest[:2] / digest


async def messages(settings: RegistrySettings, count: int) -> list[Message]:
    bus = await open_bus(settings.bus)
    subscription = await bus.subscribe([MODELS], group="test", at={})
    found: list[Message] = []
    async with asyncio.timeout(30):
        while len(found) < count:
            found += await subscription.fetch(timeout_s=0.2)
    found += await subscription.fetch(timeout_s=0.2)
    await subscription.close()
    await bus.close()
    return found


async def test_a_model_is_made_once(client: Client) -> None:
    outcome = R.OutcomeSpec(
        contract="outcomes", subject_column="flight_id", label_column="late", threshold=0.5, numeric=True
    )
    model = R.Model(name="flight-delay", description="late?", feature_service="flight_delay", outcome=outcome)
    first = await client.call("CreateModel", R.CreateModelRequest(model=model))
    again = await client.call("CreateModel", R.CreateModelRequest(model=model))
    assert (first.created, again.created) == (True, False)
    assert first.model == again.model
    assert first.model.HasField("created_at")
    assert (await client.call("GetModel", R.GetModelRequest(name="flight-delay"))).model == first.model
    assert [m.name for m in (await client.call("ListModels", R.ListModelsRequest())).models] == ["flight-delay", "m"]
    model.outcome.threshold = 0.6
    with pytest.raises(MillraceError, match="outcome") as caught:
        await client.call("CreateModel", R.CreateModelRequest(model=model))
    assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS


async def test_a_version_keeps_everything_it_was_registered_with(client: Client) -> None:
    answer = await client.register()
    assert answer.created
    sent, got = model_version(), answer.version
    for part in ("artifacts", "platform", "signature", "lineage", "metrics", "tags"):
        assert getattr(got, part) == getattr(sent, part), part
    assert got.stage == R.STAGE_DEVELOPMENT
    assert got.revision == 1
    assert got.digest == sha(f"model.onnx {sha(b'onnx')} 4\n".encode())
    assert await client.version("1.0.0") == got


async def test_registering_again_changes_nothing_and_other_content_is_refused(client: Client) -> None:
    first = await client.register()
    again = await client.register()
    assert not again.created
    assert again.version == first.version
    for changes, named in (
        ({"content": b"other"}, "digest"),
        ({"metrics": {"auc": 0.5}}, "metrics"),
        ({"tags": {}}, "tags"),
        ({"platform": "pytorch_libtorch"}, "platform"),
        ({"lineage": R.Lineage(run_id="run-2")}, "lineage"),
    ):
        with pytest.raises(MillraceError, match=named) as caught:
            await client.register(**changes)
        assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert await client.version("1.0.0") == first.version


async def test_the_digest_covers_paths_and_not_their_order(client: Client) -> None:
    contents = {"b/model.onnx": b"x", "a.json": b"yy"}
    for content in contents.values():
        await client.put(content)
    files = [common_pb2.Artifact(path=p, sha256=sha(c), size_bytes=len(c)) for p, c in contents.items()]
    one = await client.register("1.0.0", artifacts=files)
    two = await client.register("1.0.1", artifacts=files[::-1])
    lines = f"a.json {sha(b'yy')} 2\nb/model.onnx {sha(b'x')} 1\n"
    assert one.version.digest == two.version.digest == sha(lines.encode())
    files[0].path = "c/model.onnx"
    assert (await client.register("1.0.2", artifacts=files)).version.digest != one.version.digest


async def test_versions_are_listed_newest_first_by_precedence(client: Client) -> None:
    for version in ("1.10.0", "1.2.0", "2.0.0-rc.2", "2.0.0-rc.10", "2.0.0", "0.9.9"):
        await client.register(version)
    listed = (await client.call("ListVersions", R.ListVersionsRequest(model="m"))).versions
    assert [v.version for v in listed] == ["2.0.0", "2.0.0-rc.10", "2.0.0-rc.2", "1.10.0", "1.2.0", "0.9.9"]


async def test_a_version_needs_its_files(client: Client) -> None:
    with pytest.raises(MillraceError, match=r"model\.onnx") as caught:
        await client.call("RegisterVersion", R.RegisterVersionRequest(version=model_version(), actor="ann"))
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ARTIFACT_MISSING")
    await client.put(b"onnx")
    wrong = [common_pb2.Artifact(path="model.onnx", sha256=sha(b"onnx"), size_bytes=5)]
    with pytest.raises(MillraceError) as caught:
        await client.register(artifacts=wrong)
    assert caught.value.metadata["field"] == "version.artifacts[0].size_bytes"


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (2 << 20) + 17])
async def test_files_come_back_as_they_went(client: Client, size: int) -> None:
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    first, second = await client.put(content), await client.put(content, chunk=100_000)
    assert (first.existed, second.existed) == (False, True)
    assert first.sha256 == sha(content)
    assert await client.get(first.sha256) == content


async def test_an_upload_that_is_not_what_it_says_is_not_kept(client: Client, settings: RegistrySettings) -> None:
    for arguments, field in (
        ({"sha256": sha(b"other")}, "header.sha256"),
        ({"sha256": "abc"}, "header.sha256"),
        ({"size": 3}, "chunk"),
        ({"size": 5}, "header.size_bytes"),
        ({"size": -1}, "header.size_bytes"),
        ({"size": 1 << 62}, "header.size_bytes"),
    ):
        with pytest.raises(MillraceError) as caught:
            await client.put(b"onnx", **arguments)
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.metadata["field"] == field
    with pytest.raises(MillraceError) as caught:
        await client.put(bytes(3 << 20), chunk=2 << 20)
    assert caught.value.metadata["field"] == "chunk"
    folder = Path(settings.state_dir) / "artifacts"
    assert [p for p in folder.rglob("*") if p.is_file()] == []
    for parts in ([], [R.PutArtifactRequest(chunk=b"x")], [R.PutArtifactRequest()]):
        with pytest.raises(MillraceError) as caught:
            await client.call("PutArtifact", iter(parts))
        assert caught.value.metadata["field"] == "header"


async def test_a_tampered_file_is_refused_everywhere_and_repaired_by_uploading(
    client: Client, settings: RegistrySettings
) -> None:
    content = bytes(3 << 20)
    await client.put(content)
    file = stored(settings, sha(content))
    changed = bytearray(content)
    changed[-1] = 1
    file.write_bytes(changed)
    for call in (client.get(sha(content)), register_without_upload(client, content)):
        with pytest.raises(MillraceError) as caught:
            await call
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.DATA_LOSS, "DIGEST_MISMATCH")
    assert not (await client.put(content)).existed
    assert await client.get(sha(content)) == content


async def register_without_upload(client: Client, content: bytes) -> object:
    request = R.RegisterVersionRequest(version=model_version(content=content), actor="ann")
    return await client.call("RegisterVersion", request)


async def test_the_way_to_production(client: Client) -> None:
    await client.register()
    await client.move("1.0.0", R.STAGE_TESTING, R.STAGE_STAGING)
    with pytest.raises(MillraceError) as caught:
        await client.move("1.0.0", R.STAGE_PRODUCTION)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "APPROVAL_MISSING")
    approved = await client.approve("1.0.0")
    assert [(a.actor, a.to_stage, a.comment) for a in approved.approvals] == [("bob", R.STAGE_PRODUCTION, "looks good")]
    moved = await client.move("1.0.0", R.STAGE_PRODUCTION)
    assert moved.stage == R.STAGE_PRODUCTION
    assert moved.revision == 5
    assert await client.version() == moved


async def test_an_approval_for_another_stage_is_none_for_production(client: Client) -> None:
    await client.register()
    await client.approve("1.0.0", R.STAGE_STAGING)
    await client.move("1.0.0", R.STAGE_TESTING, R.STAGE_STAGING)
    with pytest.raises(MillraceError, match="approval"):
        await client.move("1.0.0", R.STAGE_PRODUCTION)


async def test_a_second_promotion_needs_a_second_approval(client: Client) -> None:
    await client.register()
    await client.promote("1.0.0")
    await client.move("1.0.0", R.STAGE_STAGING)
    with pytest.raises(MillraceError, match="approval"):
        await client.move("1.0.0", R.STAGE_PRODUCTION)
    await client.approve("1.0.0")
    assert (await client.move("1.0.0", R.STAGE_PRODUCTION)).stage == R.STAGE_PRODUCTION


async def test_the_version_in_production_is_the_one_promoted_last(client: Client) -> None:
    with pytest.raises(MillraceError) as caught:
        await client.version()
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    for version in ("1.0.0", "2.0.0"):
        await client.register(version)
        await client.promote(version)
    assert (await client.version()).version == "2.0.0"
    assert (await client.version("1.0.0")).stage == R.STAGE_PRODUCTION  # nothing is archived on the side
    await client.move("2.0.0", R.STAGE_ARCHIVED)
    assert (await client.version()).version == "1.0.0"


async def test_repeating_a_call_whose_answer_was_lost_changes_nothing(client: Client) -> None:
    await client.register()
    first = await client.promote("1.0.0")
    assert await client.move("1.0.0", R.STAGE_PRODUCTION) == first
    approved = await client.approve("1.0.0", comment="again")
    assert await client.approve("1.0.0", comment="again") == approved


async def test_compare_and_swap(client: Client) -> None:
    registered = (await client.register()).version
    moved = await client.move("1.0.0", R.STAGE_TESTING, expected_revision=registered.revision)
    with pytest.raises(MillraceError) as caught:
        await client.move("1.0.0", R.STAGE_STAGING, expected_revision=registered.revision)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.ABORTED, "REVISION_CHANGED")
    assert await client.version("1.0.0") == moved


async def test_of_concurrent_promotions_exactly_one_wins(client: Client) -> None:
    await client.register()
    await client.approve("1.0.0")
    staged = await client.move("1.0.0", R.STAGE_TESTING, R.STAGE_STAGING)
    tries = [
        client.move("1.0.0", stage, expected_revision=staged.revision)
        for stage in (R.STAGE_PRODUCTION, R.STAGE_ARCHIVED) * 5
    ]
    results = await asyncio.gather(*tries, return_exceptions=True)
    won = [r for r in results if not isinstance(r, BaseException)]
    lost = [r for r in results if isinstance(r, MillraceError)]
    assert len(won) == 1
    assert {error.code for error in lost} == {grpc.StatusCode.ABORTED}
    assert len(lost) == 9
    assert await client.version("1.0.0") == won[0]
    changes = [e for e in (await client.audit(model="m")).entries if e.action == "TransitionStage"]
    assert len(changes) == 3


async def test_every_change_is_audited(client: Client) -> None:
    await client.register()
    await client.promote("1.0.0")
    entries = (await client.audit()).entries
    assert [(e.action, e.actor, e.version) for e in entries] == [
        ("CreateModel", "", ""),
        ("RegisterVersion", "ann", "1.0.0"),
        ("Approve", "bob", "1.0.0"),
        ("TransitionStage", "ann", "1.0.0"),
        ("TransitionStage", "ann", "1.0.0"),
        ("TransitionStage", "ann", "1.0.0"),
    ]
    assert entries[-1].detail == "Staging -> Production"
    assert entries[2].detail == "Production: looks good"
    pages, token = [], ""
    while True:
        page = await client.audit(model="m", page_size=4, page_token=token)
        pages.append([e.id for e in page.entries])
        token = page.next_page_token
        if not token:
            break
    assert pages == [[1, 2, 3, 4], [5, 6]]
    assert not (await client.audit(model="other")).entries


async def test_changes_are_announced_in_order_with_what_they_led_to(client: Client, settings: RegistrySettings) -> None:
    await client.register("1.0.0")
    await client.promote("1.0.0")
    await client.register("1.1.0")
    found = await messages(settings, 6)
    events = [events_pb2.ModelChanged.FromString(m.value) for m in found]
    assert [(e.change, e.version.version, e.version.stage) for e in events] == [
        ("Registered", "1.0.0", R.STAGE_DEVELOPMENT),
        ("Approved", "1.0.0", R.STAGE_DEVELOPMENT),
        ("StageChanged", "1.0.0", R.STAGE_TESTING),
        ("StageChanged", "1.0.0", R.STAGE_STAGING),
        ("StageChanged", "1.0.0", R.STAGE_PRODUCTION),
        ("Registered", "1.1.0", R.STAGE_DEVELOPMENT),
    ]
    assert [e.sequence for e in events] == sorted({e.sequence for e in events})
    assert {m.key for m in found} == {"m"}
    assert len({m.headers["event-id"] for m in found}) == 6
    assert events[4].version == await client.version("1.0.0")
    assert events[4].actor == "ann"


async def test_all_is_there_after_a_restart(settings: RegistrySettings) -> None:
    async with serving(settings) as client:
        await client.create_model()
        await client.register()
        before = await client.promote("1.0.0")
    async with serving(settings) as client:
        assert await client.version() == before
        assert await client.get(sha(b"onnx")) == b"onnx"
        assert len((await client.audit()).entries) == 6


@pytest.mark.parametrize("version", ["", "1.0", "v1.0.0", "1.0.0\n", "01.0.0", "1.0.0-01"])
async def test_versions_are_semantic(client: Client, version: str) -> None:
    with pytest.raises(MillraceError) as caught:
        await client.register(version)
    assert caught.value.metadata["field"] == "version.version"


TENSOR = R.TensorSpec(name="x", datatype="FP32", shape=[-1])
GOOD = R.Signature(inputs=[TENSOR], outputs=[TENSOR])


def ruled(**rule: object) -> R.Signature:
    rules = json_format.ParseDict({"features": [{"name": "a"} | rule]}, common_pb2.ValueRules())
    return R.Signature(inputs=[TENSOR], outputs=[TENSOR], feature_names=["a"], rules=rules)


async def test_rules_of_values_are_part_of_the_version(client: Client) -> None:
    signature = ruled(min=0, max=1, policy="VALUE_POLICY_CLIP")
    signature.rules.inputs.add(name="origin", allowed_texts=["JFK"], required=True)
    await client.register("1.0.0", signature=signature)
    assert (await client.version("1.0.0")).signature == signature
    await client.register("1.0.0", signature=signature)
    with pytest.raises(MillraceError, match="signature"):
        await client.register("1.0.0", signature=ruled(min=0, max=2))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": ""}, "version.model"),
        ({"model": "A b"}, "version.model"),
        ({"artifacts": []}, "version.artifacts"),
        ({"artifacts": [common_pb2.Artifact(path="../m", sha256=sha(b""))]}, "version.artifacts[0].path"),
        ({"artifacts": [common_pb2.Artifact(path="/m", sha256=sha(b""))]}, "version.artifacts[0].path"),
        ({"artifacts": [common_pb2.Artifact(path="a\nb", sha256=sha(b""))]}, "version.artifacts[0].path"),
        ({"artifacts": [common_pb2.Artifact(path="a/./b", sha256=sha(b""))]}, "version.artifacts[0].path"),
        ({"artifacts": [common_pb2.Artifact(path="m", sha256=sha(b""))] * 2}, "version.artifacts[1].path"),
        ({"artifacts": [common_pb2.Artifact(path="m", sha256="x")]}, "version.artifacts[0].sha256"),
        (
            {"artifacts": [common_pb2.Artifact(path="m", sha256=sha(b""), size_bytes=-1)]},
            "version.artifacts[0].size_bytes",
        ),
        ({"platform": ""}, "version.platform"),
        ({"platform": "a\0"}, "version.platform"),
        ({"signature": R.Signature()}, "version.signature.inputs"),
        ({"signature": R.Signature(inputs=[TENSOR])}, "version.signature.outputs"),
        (
            {"signature": R.Signature(inputs=[R.TensorSpec(name="x", datatype="float")], outputs=[TENSOR])},
            "version.signature.inputs[0].datatype",
        ),
        (
            {"signature": R.Signature(inputs=[R.TensorSpec(name="x", datatype="FP32", shape=[0])], outputs=[TENSOR])},
            "version.signature.inputs[0].shape",
        ),
        (
            {"signature": R.Signature(inputs=[TENSOR], outputs=[TENSOR], feature_names=["a", "a"])},
            "version.signature.feature_names",
        ),
        ({"signature": ruled(name="b")}, "version.signature.rules.features[0].name"),
        ({"signature": ruled(min=2, max=1)}, "version.signature.rules.features[0].min"),
        ({"signature": ruled(max="NaN")}, "version.signature.rules.features[0].max"),
        ({"signature": ruled(max=1, allowed=[1])}, "version.signature.rules.features[0].allowed"),
        ({"signature": ruled(allowed_texts=["x"])}, "version.signature.rules.features[0].allowed_texts"),
        ({"signature": ruled(policy="VALUE_POLICY_CLIP")}, "version.signature.rules.features[0].policy"),
        ({"lineage": R.Lineage(parent_version="x")}, "version.lineage.parent_version"),
        ({"lineage": R.Lineage(run_id="\0")}, "version.lineage.run_id"),
        (
            {"lineage": R.Lineage(table_versions=[common_pb2.TableVersion(table="t", version=-1)])},
            "version.lineage.table_versions[0].version",
        ),
        ({"metrics": {"auc": float("nan")}}, "version.metrics[auc]"),
        ({"metrics": {"": 1.0}}, "version.metrics"),
        ({"tags": {"a": "\0"}}, "version.tags[a]"),
        ({"tags": {str(n): "" for n in range(201)}}, "version.tags"),
    ],
)
async def test_what_is_wrong_with_a_version_is_named(client: Client, changes: dict, field: str) -> None:
    with pytest.raises(MillraceError) as caught:
        await client.register(**changes)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("CreateModel", R.CreateModelRequest(), "model.name"),
        ("CreateModel", R.CreateModelRequest(model=R.Model(name="a", description="\0")), "model.description"),
        (
            "CreateModel",
            R.CreateModelRequest(model=R.Model(name="a", outcome=R.OutcomeSpec())),
            "model.outcome.contract",
        ),
        (
            "CreateModel",
            R.CreateModelRequest(
                model=R.Model(
                    name="a",
                    outcome=R.OutcomeSpec(contract="c", subject_column="s", label_column="l", threshold=float("inf")),
                )
            ),
            "model.outcome.threshold",
        ),
        ("GetModel", R.GetModelRequest(), "name"),
        ("GetVersion", R.GetVersionRequest(), "model"),
        ("GetVersion", R.GetVersionRequest(model="m", version="1"), "version"),
        ("ListVersions", R.ListVersionsRequest(), "model"),
        ("Approve", R.ApproveRequest(model="m", version="1.0.0", actor="a"), "to_stage"),
        ("Approve", R.ApproveRequest(model="m", version="1.0.0", actor="a", to_stage=R.STAGE_ARCHIVED), "to_stage"),
        ("Approve", R.ApproveRequest(model="m", version="1.0.0", to_stage=R.STAGE_PRODUCTION), "actor"),
        ("TransitionStage", R.TransitionStageRequest(model="m", version="1.0.0", actor="a"), "to_stage"),
        ("TransitionStage", R.TransitionStageRequest(model="m", version="1.0.0", actor="a", to_stage=77), "to_stage"),
        (
            "TransitionStage",
            R.TransitionStageRequest(model="m", version="1.0.0", actor="a", to_stage=1, expected_revision=-1),
            "expected_revision",
        ),
        ("ListAudit", R.ListAuditRequest(page_size=-1), "page_size"),
        ("ListAudit", R.ListAuditRequest(page_token="x"), "page_token"),
        ("ListAudit", R.ListAuditRequest(model="\0"), "model"),
    ],
)
async def test_what_is_wrong_with_a_request_is_named(client: Client, method: str, request_: object, field: str) -> None:
    with pytest.raises(MillraceError) as caught:
        await client.call(method, request_)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("GetModel", R.GetModelRequest(name="none")),
        ("GetVersion", R.GetVersionRequest(model="none")),
        ("GetVersion", R.GetVersionRequest(model="m", version="9.9.9")),
        ("ListVersions", R.ListVersionsRequest(model="none")),
        ("Approve", R.ApproveRequest(model="m", version="9.9.9", to_stage=R.STAGE_PRODUCTION, actor="a")),
        (
            "TransitionStage",
            R.TransitionStageRequest(model="none", version="9.9.9", to_stage=R.STAGE_TESTING, actor="a"),
        ),
        ("RegisterVersion", R.RegisterVersionRequest(version=model_version(model="none"), actor="a")),
    ],
)
async def test_what_is_not_there(client: Client, method: str, request_: object) -> None:
    with pytest.raises(MillraceError) as caught:
        await client.call(method, request_)
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


async def test_a_file_that_is_not_there(client: Client) -> None:
    with pytest.raises(MillraceError) as caught:
        await client.get(sha(b"nothing"))
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


async def test_a_rollout_is_linked_to_its_version_with_its_evidence(client: Client, settings: RegistrySettings) -> None:
    registered = (await client.register()).version
    bundle = b'{"format": "millrace.rollout-evidence/1"}'
    record = R.RolloutRecord(
        deployment="d",
        decision="Promoted",
        against="0.9.0",
        evidence_sha256=sha(bundle),
        evidence_size_bytes=len(bundle),
    )
    record.ended_at.FromJsonString("2026-01-02T03:04:05Z")
    request = R.RecordRolloutRequest(model="m", version="1.0.0", rollout=record, actor="rollout-controller")
    with pytest.raises(MillraceError, match="not uploaded") as caught:
        await client.call("RecordRollout", request)
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    await client.put(bundle)
    first = await client.call("RecordRollout", request)
    again = await client.call("RecordRollout", request)
    assert (first.created, again.created) == (True, False)
    found = await client.version("1.0.0")
    assert list(found.rollouts) == [record]
    # Nobody who read the version before has to read it again.
    assert found.revision == registered.revision
    entries = (await client.audit(model="m")).entries
    assert [(e.action, e.actor) for e in entries][-1] == ("RecordRollout", "rollout-controller")
    assert sha(bundle) in entries[-1].detail
    record.evidence_size_bytes += 1
    for wrong, field in (
        (R.RecordRolloutRequest(model="m", version="1.0.0", rollout=record, actor="a"), "rollout.evidence_size_bytes"),
        (R.RecordRolloutRequest(model="m", version="1.0.0", rollout=R.RolloutRecord(), actor="a"), "rollout.ended_at"),
    ):
        with pytest.raises(MillraceError, match=field):
            await client.call("RecordRollout", wrong)
    record.evidence_size_bytes -= 1
    with pytest.raises(MillraceError) as caught:
        await client.call(
            "RecordRollout", R.RecordRolloutRequest(model="m", version="2.0.0", rollout=record, actor="a")
        )
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
