"""Who may call: API keys and JWTs, checked by a real Envoy."""

import asyncio
import base64
import hashlib
import json
import time
from pathlib import Path

import grpc.aio
import models
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from gateway import MODEL, arm, eventually, gateway, route
from grpc_health.v1 import health_pb2, health_pb2_grpc
from load import infer
from millrace_inference_gateway.envoy_auth import AuthFileError, read_keys

KEY = "mlr_0123456789abcdef"


def line(name: str, key: str) -> str:
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n"


async def code(g, **metadata: str) -> grpc.StatusCode:
    try:
        await infer(g.public_channel, x_millrace_model=MODEL, **metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


class Issuer:
    """Signs tokens (ES256)."""

    def __init__(self, name: str = "https://issuer.example", kid: str = "1") -> None:
        self.name = name
        self.kid = kid
        self.key = ec.generate_private_key(ec.SECP256R1())

    def jwks(self) -> str:
        numbers = self.key.public_key().public_numbers()
        point = {axis: _b64(getattr(numbers, axis).to_bytes(32, "big")) for axis in ("x", "y")}
        return json.dumps(
            {"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.kid, **point}]}
        )

    def token(self, **claims: object) -> str:
        given = {"iss": self.name, "aud": "millrace", "sub": "an-app", "exp": int(time.time()) + 600} | claims
        text = ".".join(_b64(json.dumps(part).encode()) for part in ({"alg": "ES256", "kid": self.kid}, given))
        r, s = decode_dss_signature(self.key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
        return f"Bearer {text}.{_b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _b64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


async def test_api_keys(tmp_path: Path) -> None:
    ok, refused = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED
    file = tmp_path / "keys"
    # Lengths around the borders of SHA-256's blocks of 64 bytes.
    keys = {f"app-{size}": "k" * size for size in (1, 54, 55, 56, 63, 64, 65, 119, 120, 128, 500)}
    file.write_text("# all apps\n" + "".join(line(name, key) for name, key in keys.items()) + line("first", KEY))
    async with (
        gateway(auth={"api_keys_file": str(file)}) as (g, rollout),
        models.serving(model := models.Model("1.0.0")) as address,
    ):
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        for name, key in keys.items():
            assert await code(g, x_api_key=key) is ok, name
            assert model.metadata["x-millrace-client"] == name
        assert await code(g, x_api_key=KEY, x_millrace_client="somebody-else") is ok
        assert (model.metadata["x-millrace-client"], "x-api-key" in model.metadata) == ("first", False)
        calls = model.calls
        for wrong in ("", "x", KEY + "x", KEY[:-1], KEY.upper(), hashlib.sha256(KEY.encode()).hexdigest(), "k" * 600):
            assert await code(g, x_api_key=wrong) is refused, wrong
        assert await code(g) is refused
        assert await code(g, authorization=f"Bearer {KEY}") is refused
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await g.predict("flight", a=1.0)
        assert caught.value.code() is refused
        assert model.calls == calls
        health = health_pb2_grpc.HealthStub(g.public_channel)
        assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=5)).status
        # One key goes, another comes; a broken file changes nothing.
        file.write_text(line("second", "another"))
        await eventually(lambda: _is(g, refused, x_api_key=KEY), "the old key refused")
        assert await code(g, x_api_key="another") is ok
        file.write_text("second not-a-digest\n")
        await eventually(lambda: asyncio.sleep(0, "keys stay as they were" in g.logs()), "a word about it")
        assert await code(g, x_api_key="another") is ok


async def _is(g, wanted: grpc.StatusCode, **metadata: str) -> bool:
    return await code(g, **metadata) is wanted


@pytest.mark.parametrize("with_keys", [False, True])
async def test_jwt(tmp_path: Path, with_keys: bool) -> None:
    ok, refused = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED
    issuer, other = Issuer(), Issuer()
    keys, jwks = tmp_path / "keys", tmp_path / "jwks"
    keys.write_text(line("first", KEY))
    jwks.write_text(issuer.jwks())
    auth = {"jwt": {"issuer": issuer.name, "audiences": ["millrace"], "jwks_file": str(jwks)}}
    if with_keys:
        auth["api_keys_file"] = str(keys)
    async with gateway(auth=auth) as (g, rollout), models.serving(model := models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        assert await code(g, authorization=issuer.token()) is ok
        if with_keys:
            assert model.metadata["x-millrace-client"] == "an-app"
            assert await code(g, x_api_key=KEY) is ok
            assert await code(g, x_api_key="wrong", authorization=issuer.token()) is refused
        assert await code(g) is refused
        assert await code(g, authorization=other.token()) is refused
        for wrong in ({"iss": "https://other.example"}, {"exp": int(time.time()) - 3600}, {"exp": None}):
            assert await code(g, authorization=issuer.token(**wrong)) is refused, wrong
        assert await code(g, authorization=issuer.token(aud="something")) is not ok
        jwks.write_text(other.jwks())
        await eventually(lambda: _is(g, ok, authorization=other.token()), "the new issuer's key")
        assert await code(g, authorization=issuer.token()) is refused


async def test_a_limit_of_calls() -> None:
    async with (
        gateway(auth={"calls_per_s": 5, "burst": 10}) as (g, rollout),
        models.serving(models.Model("1.0.0")) as address,
    ):
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        codes = await asyncio.gather(*(code(g) for _ in range(60)))
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert 10 <= codes.count(grpc.StatusCode.OK) <= 30
        await eventually(lambda: _is(g, grpc.StatusCode.OK), "calls again")


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# none\n\n a 0" + "A" * 63 + "  # of a\n")
    assert read_keys(file) == {"0" + "a" * 63: "a"}
    for wrong in ("a", "a b", "a " + "0" * 63, "a b " + "0" * 64, 'a"] = os.exit() -- ' + "0" * 64):
        file.write_text(f"\n{wrong}\n")
        with pytest.raises(AuthFileError, match=":2: is no name"):
            read_keys(file)
    with pytest.raises(AuthFileError, match="nowhere"):
        read_keys(tmp_path / "nowhere")
