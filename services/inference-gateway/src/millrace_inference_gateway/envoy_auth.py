"""Who may call the public port: API keys, of which only SHA-256 digests are known here, and JWTs; and how many calls it takes.

Both filters are given to Envoy as files it reads again when they change, so that keys come and go without a restart. Until the files
are there nobody is let in.
"""

import asyncio
import json
import logging
import re
import time
from importlib import resources
from pathlib import Path

from envoy.config.core.v3 import base_pb2, config_source_pb2, extension_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.http.jwt_authn.v3 import config_pb2 as jwt_pb2
from envoy.extensions.filters.http.lua.v3 import lua_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from millrace_inference_gateway.envoy_access import CLIENT_HEADER
from millrace_inference_gateway.envoy_clusters import file_source, packed
from millrace_inference_gateway.envoy_files import EnvoyFiles, write_resources
from millrace_inference_gateway.envoy_limits import all_clients_limit, each_client_limit
from millrace_inference_gateway.issuer_file import kept_keys
from millrace_inference_gateway.settings import AuthSettings, JwtSettings

log = logging.getLogger(__name__)

API_KEYS, JWT, GROUPS = "millrace.api_keys", "millrace.jwt", "millrace.groups"
LUA = "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua"
JWT_AUTHENTICATION = "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication"
# Health checks, which are for everybody.
OPEN = ("/grpc.health.v1.Health/", "/v2/health/")
CHECK_S = 1.0
MAX_KEYS = 10_000
_LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._@-]{0,62})\s+(?P<digest>[0-9a-fA-F]{64})")


class AuthFileError(Exception):
    """A file of keys cannot be used; the message names it and the line."""


def read_keys(path: Path) -> dict[str, str]:
    """Names by digest: one `name sha256` a line, `#` starts a comment.

    Raises:
        AuthFileError: the file is missing or a line is wrong.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise AuthFileError(f"{path}:{number}: is no name and SHA-256 digest")
        found[match["digest"].lower()] = match["name"]
    if len(found) > MAX_KEYS:
        raise AuthFileError(f"{path}: has more than {MAX_KEYS} keys")
    return found


def write_auth(files: EnvoyFiles, auth: AuthSettings) -> None:
    """Give Envoy the filters for what the files say now.

    Raises:
        AuthFileError: a file cannot be used; what Envoy has stays.
    """
    if auth.api_keys_file:
        _write(files, API_KEYS, _key_filter(read_keys(Path(auth.api_keys_file)), auth))
    if auth.jwt is not None:
        optional = bool(auth.api_keys_file)
        keys = _issuer_keys(files, auth.jwt)
        _write(files, JWT, _no_keys(optional) if keys is None else _jwt_filter(auth.jwt, keys, optional=optional))


def auth_filters(files: EnvoyFiles, auth: AuthSettings) -> list[hcm_pb2.HttpFilter]:
    """Filters of the public listener, in their order: the limit of all first, that of a client when it is known who it is."""
    filters = []
    if auth.calls_per_s:
        filters.append(all_clients_limit(auth))
    if auth.jwt is not None:
        # A script stands there while the issuer's keys are not known.
        filters.append(_discovered(files, JWT, JWT_AUTHENTICATION, LUA))
        if auth.jwt.groups_claim:
            groups = _script("groups.lua", claim=auth.jwt.groups_claim)
            filters.append(hcm_pb2.HttpFilter(name=GROUPS, typed_config=packed(groups)))
    if auth.api_keys_file:
        filters.append(_discovered(files, API_KEYS, LUA))
    if auth.each_client is not None or auth.clients:
        filters.append(each_client_limit(auth))
    return filters


async def watch_auth(files: EnvoyFiles, auth: AuthSettings, stop: asyncio.Event) -> None:
    """Follow the files until `stop`."""
    problem = ""
    while not stop.is_set():
        try:
            await asyncio.to_thread(write_auth, files, auth)
            problem = ""
        except (AuthFileError, OSError) as error:
            if str(error) != problem:
                log.error("keys stay as they were: %s", error)  # noqa: TRY400 - the message says all
            problem = str(error)
        try:
            await asyncio.wait_for(stop.wait(), CHECK_S)
        except TimeoutError:
            continue


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AuthFileError(f"{path}: {error}") from error


def _write(files: EnvoyFiles, name: str, message: Message) -> None:
    extension = extension_pb2.TypedExtensionConfig(name=name, typed_config=packed(message))
    write_resources(files.secret(name), [extension])


def _discovered(files: EnvoyFiles, name: str, *kinds: str) -> hcm_pb2.HttpFilter:
    source = config_source_pb2.ExtensionConfigSource(
        config_source=file_source(str(files.secret(name))), type_urls=kinds
    )
    return hcm_pb2.HttpFilter(name=name, config_discovery=source)


def _key_filter(keys: dict[str, str], auth: AuthSettings) -> lua_pb2.Lua:
    hashes = ", ".join(f'["{digest}"] = "{name}"' for digest, name in sorted(keys.items()))
    claim = auth.jwt.client_claim if auth.jwt is not None else ""
    return _script("api_keys.lua", hashes=hashes, header=auth.api_key_header, jwt=_lua(bool(claim)), claim=claim)


def _no_keys(optional: bool) -> lua_pb2.Lua:
    return _script("no_keys.lua", api_keys=_lua(optional))


def _script(name: str, **values: str) -> lua_pb2.Lua:
    source = resources.files(__package__).joinpath(name).read_text(encoding="utf-8").format(**values)
    return lua_pb2.Lua(default_source_code=base_pb2.DataSource(inline_string=source))


def _lua(value: bool) -> str:
    return "true" if value else "false"


def _issuer_keys(files: EnvoyFiles, jwt: JwtSettings) -> str | None:
    """The issuer's key set; None when it is to be asked and was not, or not lately."""
    if jwt.oidc is not None:
        return kept_keys(files, jwt, time.time())
    path = Path(jwt.jwks_file)
    keys = _text(path)
    try:
        json.loads(keys)["keys"]
    except (ValueError, KeyError, TypeError) as error:
        raise AuthFileError(f"{path}: is no JSON Web Key Set") from error
    return keys


def _jwt_filter(jwt: JwtSettings, keys: str, *, optional: bool) -> jwt_pb2.JwtAuthentication:
    provider = jwt_pb2.JwtProvider(
        issuer=jwt.issuer,
        audiences=jwt.audiences,
        require_expiration=True,
        local_jwks=base_pb2.DataSource(inline_string=keys),
        payload_in_metadata="jwt",
        claim_to_headers=[jwt_pb2.JwtClaimToHeader(header_name=CLIENT_HEADER, claim_name=jwt.client_claim)],
        clear_route_cache=True,
    )
    needed = jwt_pb2.JwtRequirement(provider_name="clients")
    if optional:
        missing = jwt_pb2.JwtRequirement(allow_missing=Empty())
        needed = jwt_pb2.JwtRequirement(requires_any=jwt_pb2.JwtRequirementOrList(requirements=[needed, missing]))
    return jwt_pb2.JwtAuthentication(
        providers={"clients": provider},
        rules=[
            *(jwt_pb2.RequirementRule(match=route_components_pb2.RouteMatch(prefix=path)) for path in OPEN),
            jwt_pb2.RequirementRule(match=route_components_pb2.RouteMatch(prefix="/"), requires=needed),
        ],
    )
