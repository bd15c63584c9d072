"""The contestants of `features.py`: real server processes over one Redis, and cheap callers for them."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import hiredis
import pyarrow as pa
import redis
import yaml
from millrace_api.common.v1.common_pb2 import Value
from millrace_api.feature.v1 import feature_pb2 as pb
from millrace_api.feature.v1.feature_pb2_grpc import FeatureServiceStub
from millrace_feature.plan import LatestView
from millrace_feature.redis_layout import Keys, parse_groups

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from parts.server import free_port

BIN = Path(sys.executable).parent
PREFIX = "millrace:feature:"

Calls = Callable[[Sequence[list[int]]], list[float]]
"""Makes a call for each list of entities, one after the other or some at once; returns how long each took in milliseconds."""


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[int]:
    """A process while the context is open; yields its id."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            yield child.pid
        finally:
            child.terminate()


def wait_for(port: int, timeout_s: float = 120) -> None:
    """Wait until something listens on `port`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


@contextlib.contextmanager
def redis_server() -> Iterator[tuple[int, int]]:
    """A Redis without persistence; yields (port, process id)."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"]
    with process(command) as pid:
        wait_for(port)
        yield port, pid


@contextlib.contextmanager
def feature_service(
    folder: Path, registry: bytes, redis_port: int, reads_listen: str = ""
) -> Iterator[tuple[str, int, int]]:
    """The service's real process with the definitions applied and the lake filled in; yields (gRPC address, HTTP port, process id)."""
    address, http_port = f"127.0.0.1:{free_port()}", free_port()
    settings = {
        "listen": address,
        "state_dir": str(folder / "state"),
        "lake_url": str(folder / "lake"),
        "training_sets_url": str(folder / "sets"),
        "bus": {"path": str(folder / "bus.sqlite")},
        "online_store": {"kind": "redis", "redis": {"url": f"redis://127.0.0.1:{redis_port}/0"}},
        "feast": {"http_listen": f"127.0.0.1:{http_port}"},
        "reads_listen": reads_listen,
        "telemetry": {"log_level": "WARNING"},
    }
    config = folder / "feature.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-c", "from millrace_feature.app import main; main()", "--config", str(config)]
    with process(command) as pid, grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(120)
        stub = FeatureServiceStub(channel)
        stub.ApplyDefinitions(pb.ApplyDefinitionsRequest(project="perf", feast_registry=registry), timeout=300)
        deadline = time.monotonic() + 120
        while not stub.GetProgress(pb.GetProgressRequest(), timeout=30).contracts:
            if time.monotonic() > deadline:
                raise TimeoutError("the feature service did not fill its views")
            time.sleep(0.1)
        yield address, http_port, pid


def feast_store(folder: Path, objects: list[Any], tables: list[pa.Table], redis_port: int) -> Any:
    """Feast's store with the rows written to Redis; its repository is `folder`/feast_repo."""
    from feast import FeatureStore

    repo = folder / "feast_repo"
    repo.mkdir()
    config = {
        "project": "perf",
        "provider": "local",
        "registry": str(repo / "registry.db"),
        "online_store": {"type": "redis", "connection_string": f"127.0.0.1:{redis_port}"},
        "offline_store": {"type": "file"},
        "entity_key_serialization_version": 3,
    }
    (repo / "feature_store.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    store = FeatureStore(repo_path=str(repo))
    store.apply(objects)
    for number, table in enumerate(tables):
        store.write_to_online_store(f"view{number}", table.to_pandas())
    return store


@contextlib.contextmanager
def feast_servers(
    folder: Path, objects: list[Any], tables: list[pa.Table], redis_port: int
) -> Iterator[tuple[Any, int, int, int, int]]:
    """Feast's own HTTP and gRPC servers over Redis; yields (store, HTTP port, its process, gRPC port, its process)."""
    store = feast_store(folder, objects, tables, redis_port)
    http_port, grpc_port = free_port(), free_port()
    feast = [str(BIN / "feast"), "-c", str(folder / "feast_repo")]
    serve = [*feast, "serve", "-h", "127.0.0.1", "-p", str(http_port), "--no-access-log"]
    listen = [*feast, "listen", "-a", f"127.0.0.1:{grpc_port}"]
    with process(serve) as http_pid, process(listen) as grpc_pid:
        wait_for(http_port)
        wait_for(grpc_port)
        yield store, http_port, http_pid, grpc_port, grpc_pid


def one_by_one(read: Callable[[list[int]], object]) -> Calls:
    """Calls one after the other."""

    def run(chosen: Sequence[list[int]]) -> list[float]:
        latencies = []
        for entities in chosen:
            at = time.perf_counter()
            read(entities)
            latencies.append((time.perf_counter() - at) * 1000)
        return latencies

    return run


def http_calls(port: int, what: dict[str, object], callers: int) -> Calls:
    """Feast's HTTP API over kept connections, the bodies ready-made.

    Args:
        port: of the server.
        what: feature service or features.
        callers: connections, each of which asks again as soon as it has its answer.
    """

    def request(entities: list[int]) -> bytes:
        body = json.dumps({**what, "entities": {"user": [f"u{i}" for i in entities]}}).encode()
        head = f"POST /get-online-features HTTP/1.1\r\nHost: perf\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def caller(waiting: list[bytes], latencies: list[float]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        while waiting:
            content = waiting.pop()
            at = time.perf_counter()
            writer.write(content)
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            body = await reader.readexactly(size)
            if b" 200 " not in head.split(b"\r\n", 1)[0] or b'"PRESENT"' not in body:
                raise RuntimeError(f"a read failed: {head!r} {body[:300]!r}")
            latencies.append((time.perf_counter() - at) * 1000)
        writer.close()

    async def all_callers(chosen: Sequence[list[int]]) -> list[float]:
        waiting, latencies = [request(entities) for entities in chosen], []
        await asyncio.gather(*(caller(waiting, latencies) for _ in range(callers)))
        return latencies

    return lambda chosen: asyncio.run(all_callers(chosen))


def grpc_calls(address: str, method: str, request_of: Callable[[list[int]], bytes], callers: int) -> Calls:
    """A gRPC method whose requests are ready-made bytes and whose answers are left as they come.

    Args:
        address: of the server.
        method: its full name.
        request_of: the request for some entities.
        callers: calls at once; each asks again as soon as it has its answer.
    """

    async def caller(call: Any, waiting: list[bytes], latencies: list[float]) -> None:
        while waiting:
            content = waiting.pop()
            at = time.perf_counter()
            if len(await call(content, timeout=30)) < 400:
                raise RuntimeError("a read came back short")
            latencies.append((time.perf_counter() - at) * 1000)

    async def all_callers(chosen: Sequence[list[int]]) -> list[float]:
        waiting, latencies = [request_of(entities) for entities in chosen], []
        async with grpc.aio.insecure_channel(address) as channel:
            await channel.channel_ready()
            call = channel.unary_unary(method)
            await asyncio.gather(*(caller(call, waiting, latencies) for _ in range(callers)))
        return latencies

    return lambda chosen: asyncio.run(all_callers(chosen))


def feast_grpc(address: str, method: str, service: str, callers: int = 1) -> Calls:
    """Feast's gRPC API."""
    from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesRequest

    def request_of(entities: list[int]) -> bytes:
        request = GetOnlineFeaturesRequest(feature_service=service)
        for i in entities:
            request.entities["user"].val.add(string_val=f"u{i}")
        return bytes(request.SerializeToString())

    return grpc_calls(address, method, request_of, callers)


def native_grpc(address: str, service: str, callers: int = 1) -> Calls:
    """The feature service's own RPC."""

    def request_of(entities: list[int]) -> bytes:
        rows = [pb.EntityRow(values={"user": Value(string_value=f"u{i}")}) for i in entities]
        return pb.GetOnlineFeaturesRequest(feature_service=service, rows=rows).SerializeToString()

    return grpc_calls(address, "/millrace_api.feature.v1.FeatureService/GetOnlineFeatures", request_of, callers)


def raw_by_hand(port: int, tables: list[pa.Table], names: Sequence[Sequence[str]]) -> Calls:
    """redis-py: one hash per view and entity, ten fields of each made floats."""
    client = redis.Redis(port=port)
    with client.pipeline(transaction=False) as pipe:
        for number, table in enumerate(tables):
            for i, record in enumerate(table.select(names[number]).to_pylist()):
                pipe.hset(f"{number}:u{i}", mapping=record)
        pipe.execute()

    def read(entities: list[int]) -> object:
        with client.pipeline(transaction=False) as pipe:
            for i in entities:
                for number, fields in enumerate(names):
                    pipe.hmget(f"{number}:u{i}", fields)
            return [[float(v) for v in values] for values in pipe.execute()]

    return one_by_one(read)


def raw_commands(port: int, views: Sequence[LatestView]) -> Calls:
    """The service's own commands over a bare socket, packed and parsed by hiredis."""
    keys = Keys(PREFIX)
    standing = parse_groups(redis.Redis(port=port).hgetall(keys.groups))
    ids = [standing[view.group].id for view in views]
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    parser = hiredis.Reader()

    def read(entities: list[int]) -> None:
        commands = [hiredis.pack_command(("HMGET", keys.newest(f"u{i}"), *ids)) for i in entities]
        connection.sendall(b"".join(commands))
        replies = 0
        while replies < len(commands):
            parser.feed(connection.recv(1 << 20))
            while (reply := parser.gets()) is not False:
                if None in reply:
                    raise RuntimeError("a raw read came back empty")
                replies += 1

    return one_by_one(read)
