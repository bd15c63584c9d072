"""The issuer's keys as `oidc` last fetched them, on disk: what Envoy starts with while the issuer is away."""

import json
from pathlib import Path

from millrace_inference_gateway.envoy_files import EnvoyFiles
from millrace_inference_gateway.settings import JwtSettings


def kept_path(files: EnvoyFiles) -> Path:
    """Where they are."""
    return files.folder / "issuer-keys.json"


def kept_keys(files: EnvoyFiles, jwt: JwtSettings, now_s: float) -> str | None:
    """The issuer's keys as last fetched, a JWK Set; None when there are none, or they are too old to be trusted."""
    assert jwt.oidc is not None
    try:
        kept = json.loads(kept_path(files).read_text(encoding="utf-8"))
        age_s = now_s - float(kept["fetched_s"])
        # A clock that was set back makes nothing younger.
        usable = kept["issuer"] == jwt.issuer and -jwt.oidc.refresh_s <= age_s <= jwt.oidc.max_age_s
        return json.dumps(kept["jwks"]) if usable else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
