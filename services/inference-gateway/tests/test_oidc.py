"""OpenID Connect: keys found by discovery, rotated under load, kept while the issuer is away; groups as rights; by the real Envoy."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import models
from gateway import MODEL, arm, eventually, free_port, gateway, route
from load import infer
from test_access import predict_code
from test_auth import Issuer, code, line
from test_overload import metrics

OK, REFUSED, DENIED, UNAVAILABLE = (
    grpc.StatusCode.OK,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAVAILABLE,
)


class Provider:
    """A small OpenID Connect provider: discovery, a key set, tokens by the key of its choice."""

    def __init__(self, port: int) -> None:
        self.name = f"http://127.0.0.1:{port}/realms/shop"
        self.keys = [Issuer(self.name, "key-1")]
        self.asked: list[str] = []

    def token(self, **claims: object) -> str:
        return self.keys[-1].token(**claims)

    def page(self, path: str) -> dict[str, object] | None:
        self.asked.append(path)
        if path == "/realms/shop/.well-known/openid-configuration":
            return {
                "issuer": self.name,
                "jwks_uri": f"{self.name}/keys",
                "id_token_signing_alg_values_supported": ["ES256"],
            }
        if path == "/realms/shop/keys":
            encryption = {"kty": "RSA", "use": "enc", "kid": "e", "n": "AQAB", "e": "AQAB"}
            return {"keys": [encryption, *(key for each in self.keys for key in json.loads(each.jwks())["keys"])]}
        return None


@contextlib.contextmanager
def listening(provider: Provider) -> Iterator[None]:
    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = provider.page(self.path)
            body = json.dumps(page).encode()
            self.send_response(200 if page is not None else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    port = int(provider.name.split(":")[2].split("/")[0])
    server = ThreadingHTTPServer(("127.0.0.1", port), Pages)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def test_an_issuer_found_by_discovery(tmp_path) -> None:
    port = free_port()
    provider = Provider(free_port())
    keys = tmp_path / "keys"
    keys.write_text(line("nightly", "nightly-key"))
    auth = {
        "api_keys_file": str(keys),
        "jwt": {
            "issuer": provider.name,
            "audiences": ["millrace"],
            "client_claim": "azp",
            "groups_claim": "realm_access.roles",
            "oidc": {"retry_s": 0.2, "refresh_s": 3600},
        },
    }
    async with (
        gateway(auth=auth, telemetry={"metrics_listen": f"127.0.0.1:{port}"}) as (g, rollout),
        models.serving(model := models.Model("1.0.0")) as address,
    ):
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))

        def bearer(**claims: object) -> dict[str, str]:
            return {"authorization": provider.token(azp="shop", **claims)}

        async def becomes(wanted: grpc.StatusCode, **metadata: str) -> None:
            async def ask() -> bool:
                return await code(g, **metadata) is wanted

            await eventually(ask, f"{wanted} for {metadata}")

        # The issuer is away: tokens are not let in, and say why; API keys are.
        assert await code(g, **bearer()) is UNAVAILABLE
        assert await code(g, x_api_key="nightly-key") is OK
        assert await code(g) is REFUSED
        await eventually(lambda: _counts(port, "no_keys"), "the refusal counted")
        assert "stay as they were" in g.logs()
        with listening(provider):
            await becomes(OK, **bearer())
            assert model.metadata["x-millrace-client"] == "shop"
            assert await code(g, **bearer(aud="another")) is DENIED
            assert await code(g, **bearer(iss="http://127.0.0.1:1/realms/shop")) is REFUSED
            assert await code(g, **bearer(exp=1)) is REFUSED
            # Groups are rights.
            await rollout.in_force(rollout.set(route(arm("1.0.0", address), callers=["group:fraud", "nightly"])))
            assert await code(g, **bearer()) is DENIED
            assert await code(g, **bearer(realm_access={"roles": ["fraudulent", "a,fraud,b"]})) is DENIED
            assert await code(g, x_millrace_groups=",fraud,", **bearer()) is DENIED
            member = bearer(realm_access={"roles": ["sales", "fraud"]})
            assert await code(g, **member) is OK
            assert await code(g, x_api_key="nightly-key") is OK
            assert await predict_code(g, **member) is OK
            assert await predict_code(g, **bearer()) is DENIED
            await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
            # A new key under load: every token that is good goes through, those of the new key after the first was seen.
            old, failed, done = bearer(), [], asyncio.Event()

            async def call() -> None:
                while not done.is_set():
                    try:
                        await infer(g.public_channel, x_millrace_model=MODEL, **old)
                    except grpc.aio.AioRpcError as error:
                        failed.append(error)

            tasks = [asyncio.create_task(call()) for _ in range(4)]
            provider.keys.append(Issuer(provider.name, "key-2"))
            await becomes(OK, **bearer())
            done.set()
            await asyncio.gather(*tasks)
            assert failed == []
            # A key that the issuer took back.
            asked = len(provider.asked)
            provider.keys.pop(0)
            provider.keys.append(Issuer(provider.name, "key-3"))
            await becomes(OK, **bearer())
            await becomes(REFUSED, **old)
            assert len(provider.asked) > asked
        # It goes away, the gateway starts anew: the keys of the last run are enough.
        g.kill_envoy()
        g.kill_python()
        g.start_envoy()
        g.start_python()
        await becomes(OK, **bearer())


async def _counts(port: int, reason: str) -> bool:
    return any(f'reason="{reason}"' in name for name in await metrics(port))
