"""Mutual TLS between real servers and clients: who is refused, and certificates that change under running calls."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from millrace_api.registry.v1 import registry_pb2, registry_pb2_grpc
from millrace_kit.client import open_channel, open_sync_channel
from millrace_kit.server import Service, running
from millrace_kit.settings import ServiceSettings, SettingsError, TlsSettings, parse_settings
from millrace_kit.tls import RECHECK_S, CertificateError, CertificateFiles
from parts.certificates import Authority, write

DEADLINE_S = 20.0
REQUEST = registry_pb2.GetModelRequest(name="m")


class Servicer(registry_pb2_grpc.RegistryServiceServicer):
    """Answers with the client's names; the model `hold` waits for `release`."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def GetModel(self, request, context):
        if request.name == "hold":
            await self.release.wait()
        names = context.auth_context().get("x509_subject_alternative_name", [b""])
        return registry_pb2.GetModelResponse(model=registry_pb2.Model(name=request.name, description=names[0].decode()))


def service(servicer: Servicer | None = None) -> Service:
    made = servicer or Servicer()
    return Service("test", [lambda server: registry_pb2_grpc.add_RegistryServiceServicer_to_server(made, server)])


def settings(tls: TlsSettings, **more: object) -> ServiceSettings:
    return ServiceSettings(listen="localhost:0", tls=tls, drain_s=0, **more)  # type: ignore[arg-type]


async def ask(channel: grpc.aio.Channel, name: str = "m") -> registry_pb2.Model:
    request = registry_pb2.GetModelRequest(name=name)
    return (await registry_pb2_grpc.RegistryServiceStub(channel).GetModel(request, timeout=DEADLINE_S)).model


async def refused(channel: grpc.aio.Channel) -> str:
    async with channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(caught.value.details())


async def until(what: str, ask: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not ask():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.02)


async def test_who_has_no_certificate_of_the_authority_is_refused(tmp_path: Path) -> None:
    ours, theirs = Authority.new(), Authority.new("another")
    server = write(tmp_path / "server", ours, "localhost")
    client = write(tmp_path / "client", ours, "millrace-registry")
    stranger = write(tmp_path / "stranger", theirs, "millrace-registry", trusted=ours.pem)
    async with running(service(), settings(server)) as address:
        async with open_channel(address, tls=client) as channel:
            assert (await ask(channel)).description == "millrace-registry"
        await refused(open_channel(address))
        await refused(grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ours.pem)))
        await refused(open_channel(address, tls=stranger))


async def test_a_client_refuses_another_authority_and_another_name(tmp_path: Path) -> None:
    ours, theirs = Authority.new(), Authority.new("another")
    client = write(tmp_path / "client", ours, "client")
    false = write(tmp_path / "false", theirs, "localhost", trusted=ours.pem)
    async with running(service(), settings(false)) as address:
        assert "CERTIFICATE_VERIFY_FAILED" in await refused(open_channel(address, tls=client))
    other = write(tmp_path / "other", ours, "millrace-registry")
    async with running(service(), settings(other)) as address:
        await refused(open_channel(address, tls=client))


async def test_only_named_clients_are_admitted_and_the_others_are_named(tmp_path: Path) -> None:
    authority = Authority.new()
    server = write(tmp_path / "server", authority, "localhost")
    gateway = write(tmp_path / "gateway", authority, "millrace-gateway", "millrace-gateway.ns.svc")
    stage = write(tmp_path / "stage", authority, "millrace-stage")
    admitted = settings(server, allowed_clients=("millrace-gateway.ns.svc", "millrace-console"))
    async with running(service(), admitted) as address:
        async with open_channel(address, tls=gateway) as channel:
            assert (await ask(channel)).name == "m"
        async with open_channel(address, tls=stage) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(channel)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "millrace-stage" in str(caught.value.details())
    assert "RegistryService/GetModel" in str(caught.value.details())


async def test_a_unix_socket_is_inside(tmp_path: Path) -> None:
    tls = write(tmp_path / "tls", Authority.new(), "localhost")
    servicer, socket = Servicer(), f"unix:{tmp_path / 's.sock'}"

    def add(server: grpc.aio.Server) -> None:
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, server)
        server.add_insecure_port(socket)

    guarded = settings(tls, allowed_clients=("nobody",))
    async with running(Service("test", [add]), guarded), open_channel(socket) as channel:
        assert (await ask(channel)).name == "m"


def test_names_of_clients_need_certificates() -> None:
    with pytest.raises(SettingsError, match="allowed_clients"):
        parse_settings(ServiceSettings, {"allowed_clients": ["a"]}, "here")


async def test_certificates_and_authority_change_under_calls_and_none_fails(tmp_path: Path) -> None:
    """The whole rotation: both trust both authorities, then both get certificates of the new one, then the old is forgotten."""
    old, new = Authority.new("old"), Authority.new("new")
    both = old.pem + new.pem
    folders = {"server": ("localhost",), "client": ("before",)}
    tls = {folder: write(tmp_path / folder, old, *names) for folder, names in folders.items()}
    failures: list[grpc.aio.AioRpcError] = []
    owners: list[str] = []
    stop = asyncio.Event()

    async def load(channel: grpc.aio.Channel) -> None:
        while not stop.is_set():
            try:
                owners.append((await ask(channel)).description)
            except grpc.aio.AioRpcError as error:
                failures.append(error)
            await asyncio.sleep(0.001)

    def sync_load(channel: grpc.Channel) -> None:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        while not stop.is_set():
            try:
                stub.GetModel(REQUEST, timeout=DEADLINE_S)
            except grpc.RpcError as error:
                failures.append(error)

    servicer = Servicer()
    async with running(service(servicer), settings(tls["server"])) as address:
        channel, blocking = open_channel(address, tls=tls["client"]), open_sync_channel(address, tls["client"])
        thread = threading.Thread(target=sync_load, args=(blocking,))
        thread.start()
        held = asyncio.create_task(ask(channel, "hold"))
        tasks = [asyncio.create_task(load(channel)) for _ in range(4)]
        await until("calls are answered", lambda: len(owners) > 20)
        for signer, trusted in ((old, both), (new, both), (new, new.pem)):
            for folder, names in folders.items():
                await asyncio.to_thread(write, tmp_path / folder, signer, *names, trusted=trusted)
            await asyncio.sleep(2 * RECHECK_S)  # both sides look again within RECHECK_S
        write(tmp_path / "client", new, "after")
        await until("calls carry the new certificate", lambda: "after" in owners)
        assert not held.done()  # started under the first certificates, it still runs
        servicer.release.set()
        assert (await held).description == "before"
        stop.set()
        await asyncio.gather(*tasks)
        await asyncio.to_thread(thread.join)
        assert not failures, failures[:3]
        # Who still has a certificate of the old authority is out.
        await refused(open_channel(address, tls=write(tmp_path / "late", old, "late", trusted=both)))
        await channel.close()
        blocking.close()


async def test_streams_of_both_kinds_of_channel(tmp_path: Path) -> None:
    authority = Authority.new()
    tls = write(tmp_path / "tls", authority, "localhost")

    async def count(request, context):
        for number in range(3):
            yield bytes([number])

    async def total(requests, context):
        return bytes([sum([r[0] async for r in requests])])

    handlers = {
        "Count": grpc.unary_stream_rpc_method_handler(count),
        "Total": grpc.stream_unary_rpc_method_handler(total),
    }
    generic = grpc.method_handlers_generic_handler("test.S", handlers)
    counted = Service("test", [lambda server: server.add_generic_rpc_handlers((generic,))])
    async with running(counted, settings(tls)) as address:
        async with open_channel(address, tls=tls) as channel:
            assert [n async for n in channel.unary_stream("/test.S/Count")(b"")] == [b"\0", b"\1", b"\2"]
            assert await channel.stream_unary("/test.S/Total")(iter([b"\1", b"\2"])) == b"\3"

        def blocking() -> None:
            with open_sync_channel(address, tls) as sync:
                answers = sync.unary_stream("/test.S/Count")(b"", timeout=DEADLINE_S)
                assert list(answers) == [b"\0", b"\1", b"\2"]
                assert sync.stream_unary("/test.S/Total")(iter([b"\1", b"\2"]), timeout=DEADLINE_S) == b"\3"
                assert sync.stream_unary("/test.S/Total").future(iter([b"\1"])).result(DEADLINE_S) == b"\1"

        await asyncio.to_thread(blocking)


def test_files_that_cannot_be_used_are_named_at_the_start_and_survived_later(tmp_path: Path) -> None:
    now = [0.0]
    authority = Authority.new()
    with pytest.raises(CertificateError, match=r"no/such\.crt"):
        CertificateFiles(TlsSettings(cert_file="no/such.crt", key_file="b", ca_file="c"))
    tls = write(tmp_path, authority, "localhost")
    files = CertificateFiles(tls, monotonic=lambda: now[0])
    first = files.current()
    chain, key = authority.sign("localhost")
    data = tmp_path / "..data"
    (data / "tls.crt").write_bytes(chain)  # half of a pair
    now[0] += RECHECK_S
    assert files.current() is first
    (data / "tls.key").write_bytes(key)
    assert files.current() is first  # not looked at again yet
    now[0] += RECHECK_S
    assert files.current().chain == chain
    (data / "ca.crt").unlink()
    now[0] += RECHECK_S
    assert files.current().chain == chain


async def test_calls_go_round_over_every_address_of_a_name(tmp_path: Path) -> None:
    """`localhost` has two addresses here as a headless Service has one a replica; each server says who it is."""

    class Named(registry_pb2_grpc.RegistryServiceServicer):
        def __init__(self, name: str) -> None:
            self.name = name

        async def GetModel(self, request, context):
            return registry_pb2.GetModelResponse(model=registry_pb2.Model(name=self.name))

    def named(name: str) -> Service:
        return Service("t", [lambda s: registry_pb2_grpc.add_RegistryServiceServicer_to_server(Named(name), s)])

    plain = ServiceSettings(drain_s=0)
    async with running(named("a"), plain) as a, running(named("b"), plain) as b:
        # An ipv4: target is a list of addresses as DNS would give it; the option is what a dns:/// target gets.
        from millrace_kit.client import target_options

        options = target_options("dns:///name:1")
        async with grpc.aio.insecure_channel(f"ipv4:{a},{b}", options=options) as channel:
            seen = {(await ask(channel)).name for _ in range(20)}
    assert seen == {"a", "b"}
