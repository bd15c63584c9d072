"""Versions of definitions over the service's API: history, rollback under a running stream, pins, rights and the audit."""

import asyncio
from datetime import timedelta
from typing import Any

import grpc
import pyarrow as pa
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1.common_pb2 import Value
from millrace_api.feature.v1 import feature_pb2 as pb
from millrace_api.feature.v1 import feature_pb2_grpc
from millrace_api.feature.v1 import versions_pb2 as vpb
from millrace_api.feature.v1.versions_pb2_grpc import DefinitionsServiceStub
from millrace_feature.app import build
from millrace_feature.catalog import Catalog
from millrace_feature.feast_import import import_feast
from millrace_feature.settings import AccessSettings
from millrace_feature.versioning.access import Access, AccessDeniedError, Audit, Caller, split_permissions
from millrace_kit.client import open_channel
from millrace_kit.clock import FakeClock
from millrace_kit.server import running
from millrace_kit.sql import open_engine


def events(clock: FakeClock, count: int) -> pa.Table:
    at = [clock.now() - timedelta(minutes=6)] * count
    return pa.table(
        {
            "user": ["ann"] * count,
            "shop": [7] * count,
            "at": pa.array(at, pa.timestamp("us", "UTC")),
            "amount": list(range(count)),
            "note": ["n"] * count,
        }
    )


def row() -> pb.EntityRow:
    values = {"user": Value(string_value="ann"), "shop": Value(int64_value=7), "limit": Value(double_value=1.0)}
    return pb.EntityRow(values={**values, "asked_at": Value(timestamp_value=Timestamp(seconds=1))})


async def read(stub: Any, digest: str = "") -> tuple[dict[str, float], str]:
    answer = await stub.GetOnlineFeatures(
        pb.GetOnlineFeaturesRequest(feature_service="main", rows=[row()], definitions_hash=digest)
    )
    return dict(zip(answer.feature_names, answer.vectors[0].values, strict=True)), answer.definitions_hash


async def not_served(stub: Any, digest: str) -> bool:
    try:
        await read(stub, digest)
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.FAILED_PRECONDITION
    return False


async def eventually(condition: Any, *arguments: Any) -> None:
    async with asyncio.timeout(60):
        while not await condition(*arguments):  # noqa: ASYNC110 - the condition is the service's
            await asyncio.sleep(0.05)


async def test_rollback_under_a_running_stream(
    world: Any, small_objects: Any, make_registry: Any, wait_for_records: Any
) -> None:
    clock = FakeClock()
    first, second = make_registry(small_objects()), make_registry(small_objects((20, 60)))
    service = await build(world.settings, clock=clock)
    async with running(service, world.settings) as address, open_channel(address, timeout_s=120) as channel:
        stub, versions = feature_pb2_grpc.FeatureServiceStub(channel), DefinitionsServiceStub(channel)
        a = (
            await stub.ApplyDefinitions(pb.ApplyDefinitionsRequest(project="p", feast_registry=first))
        ).definitions_hash
        sent = 0

        async def publish(batches: int) -> None:
            nonlocal sent
            for _ in range(batches):
                await world.publish(world.land("events", events(clock, 3)))
                sent += 3

        await publish(2)
        diff = await versions.DiffDefinitions(vpb.DiffDefinitionsRequest(feast_registry=second, project="p"))
        changed = {(c.type, c.name): c for c in diff.changes}
        assert changed["StreamFeatureView", "by_user"].kind == vpb.CHANGE_KIND_CHANGED
        assert "aggregations" in changed["StreamFeatureView", "by_user"].fields
        assert ("StreamFeatureView", "by_both") not in changed
        busy = asyncio.ensure_future(publish(8))
        b = (
            await stub.ApplyDefinitions(pb.ApplyDefinitionsRequest(project="p", feast_registry=second))
        ).definitions_hash
        assert b == diff.to_hash
        await asyncio.sleep(0)
        # Until `previous_kept_s` is over the earlier version answers who names it, and it is kept up by the stream.
        assert (await read(stub, a))[1] == a
        back = await versions.RollbackDefinitions(vpb.RollbackDefinitionsRequest(definitions_hash=a))
        assert back.changed
        assert (await read(stub))[1] == a
        await busy
        await wait_for_records(stub, events=sent)
        for digest, window in ((a, "10m"), (b, "20m"), ("", "10m")):
            values, _digest = await read(stub, digest)
            assert values[f"by_user__amount_count_{window}"] == sent, digest
        history = await versions.ListDefinitions(vpb.ListDefinitionsRequest(page_size=2))
        assert [(h.definitions_hash, h.rollback, h.in_force) for h in history.applied] == [
            (a, True, True),
            (b, False, False),
        ]
        rest = await versions.ListDefinitions(vpb.ListDefinitionsRequest(page_token=history.next_page_token))
        assert [h.definitions_hash for h in rest.applied] == [a]
        # The pin of what was replaced runs out; then its hash is refused, and a pin of one's own brings it back.
        clock.advance(world.settings.previous_kept_s + 1)
        await eventually(not_served, stub, b)
        assert not (await versions.ListDefinitions(vpb.ListDefinitionsRequest())).pins
        await versions.PinDefinitions(vpb.PinDefinitionsRequest(definitions_hash=b, name="model m 1"))
        assert (await read(stub, b))[1] == b
        await versions.UnpinDefinitions(vpb.UnpinDefinitionsRequest(definitions_hash=b, name="model m 1"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await versions.UnpinDefinitions(vpb.UnpinDefinitionsRequest(definitions_hash=b, name="model m 1"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        audit = await versions.ListAudit(vpb.ListAuditRequest())
        assert [e.action for e in audit.entries] == ["unpin", "pin", "rollback", "apply", "apply"]


def permissions(objects: list[Any]) -> bytes:
    from feast import FeatureService, FeatureView
    from feast.permissions.action import AuthzedAction
    from feast.permissions.permission import Permission
    from feast.permissions.policy import RoleBasedPolicy
    from feast.protos.feast.core.Registry_pb2 import Registry

    rules = [
        Permission(
            "readers", types=[FeatureService], name_patterns=["main|public.*"],
            actions=[AuthzedAction.READ_ONLINE], policy=RoleBasedPolicy(roles=["reader", "writer.cluster"]),
        ),
        Permission(
            "tagged", types=[FeatureView], required_tags={"team": "fraud"},
            actions=[AuthzedAction.UPDATE], policy=RoleBasedPolicy(roles=["reader"]),
        ),
    ]  # fmt: skip
    registry = Registry()
    registry.permissions.extend(rule.to_proto() for rule in rules)
    return registry.SerializeToString()


def test_rights_are_feasts(tmp_path: Any, small_objects: Any, make_registry: Any) -> None:
    import_feast()
    engine, clock = open_engine(f"sqlite:///{tmp_path}/f.sqlite"), FakeClock()
    Catalog(engine)
    audit = Audit(engine, clock, 1000)
    settings = AccessSettings(administrators=("root.cluster",), roles={"reader": ("gateway.cluster",)})
    access = Access(engine, audit, settings, clock, lambda: make_registry(small_objects()))
    gateway, writer, nobody, root = (
        Caller((n,)) if n else Caller() for n in ("gateway.cluster", "writer.cluster", "", "root.cluster")
    )
    access.check(nobody, "read_online", "FeatureService", "main")  # nobody has said who may what
    assert access.is_open
    _stripped, rules = split_permissions(permissions([]))
    assert access.replace(nobody, rules)
    assert not access.is_open
    for caller in (gateway, writer, root):
        access.check(caller, "read_online", "FeatureService", "main")
    for caller, action, kind, name in (
        (nobody, "read_online", "FeatureService", "main"),
        (gateway, "read_offline", "FeatureService", "main"),
        (gateway, "read_online", "FeatureService", "other"),
        (gateway, "read_online", "FeatureView", "newest"),
        # Feast itself would allow this one: it looks for the tags in a place where no object has them.
        (gateway, "update", "FeatureView", "newest"),
    ):
        for _again in range(2):
            with pytest.raises(AccessDeniedError):
                access.check(caller, action, kind, name)
    with pytest.raises(AccessDeniedError):
        access.check_features(gateway, ["newest__amount"])
    with pytest.raises(AccessDeniedError):
        access.replace(gateway, b"")
    refused = audit.entries(before=None, limit=100, denied_only=True)
    assert len(refused) == 7  # equal ones are written down once a minute
    assert access.replace(root, b"")
    access.check(nobody, "read_online", "FeatureService", "main")


async def test_who_may_not_gets_nothing(world: Any, small_objects: Any, make_registry: Any) -> None:
    objects = small_objects()
    registry = make_registry(objects)
    service = await build(world.settings, clock=FakeClock())
    async with running(service, world.settings) as address, open_channel(address, timeout_s=120) as channel:
        stub, versions = feature_pb2_grpc.FeatureServiceStub(channel), DefinitionsServiceStub(channel)
        request = pb.ApplyDefinitionsRequest(project="p", feast_registry=registry + permissions(objects))
        digest = (await stub.ApplyDefinitions(request)).definitions_hash
        for call in (
            read(stub),
            stub.ApplyDefinitions(
                pb.ApplyDefinitionsRequest(project="p", feast_registry=make_registry(small_objects((30,))))
            ),
            stub.ApplyDefinitions(pb.ApplyDefinitionsRequest(project="p", feast_registry=registry)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert (await stub.GetDefinitions(pb.GetDefinitionsRequest())).definitions_hash == digest
        denied = await versions.ListAudit(vpb.ListAuditRequest(denied_only=True))
        assert {e.action for e in denied.entries} == {"read_online", "update"}
