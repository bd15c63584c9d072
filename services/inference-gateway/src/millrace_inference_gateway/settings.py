"""Settings of the gateway; the Envoy process and the Python process read the same file."""

from pathlib import Path
from typing import Literal, Self

from millrace_kit.settings import ServiceSettings, Settings
from pydantic import Field, model_validator

# A Unix socket's path has 108 bytes in Linux, one of them the final zero.
MAX_SOCKET_PATH_BYTES = 107
MAX_CLIENT_LIMITS = 1000
# The name of a claim, or the way to it.
_CLAIM = r"^[A-Za-z0-9_:/.-]{1,128}$"
# A DNS label, or a reference that a check away from the cluster leaves as it stands.
_LABEL_OR_REFERENCE = r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?|\$\{env:[A-Z0-9_]+\})$"


class AdaptiveSettings(Settings):
    """Limits of requests at once that are found for each version from what its answers take."""

    models: tuple[str, ...] = ()
    """Models that have such limits; empty is every model."""
    step_s: float = Field(default=0.5, ge=0.05, le=60)
    """How often limits move."""
    percentile: float = Field(default=50.0, ge=1, le=99)
    """Of the latencies of one step, the one that is compared with the version's latency without waiting."""
    tolerance_percent: float = Field(default=100.0, ge=0, le=10_000)
    """How much later than without waiting answers may come before the limit shrinks; 100 is twice the time."""
    min_requests: int = Field(default=4, ge=1, le=1_000_000)
    """Least limit. The largest, and the one before anything is known, is `max_requests`."""
    min_samples: int = Field(default=20, ge=1, le=4096)
    """Answers of a version needed for one step; with fewer the limit stays, and they count for the next one."""
    baseline_ms: float = Field(default=0.0, ge=0, le=600_000)
    """A version's latency without waiting, where it is known; 0 measures it."""
    measure_s: float = Field(default=300.0, ge=1, le=86_400)
    """How often it is measured anew. For two steps the limit is a little below what the servers work on then, so that nothing waits there."""
    jitter_percent: float = Field(default=20.0, ge=0, le=100)
    """How far the times of measuring spread, so that replicas do not measure together."""


class EnvoySettings(Settings):
    """How Envoy carries traffic."""

    workers: int = Field(default=0, ge=0, le=256)
    """Worker threads; 0 takes one a core."""
    max_connections: int = Field(default=1024, ge=1, le=1_000_000)
    """Connections to one version's servers; more requests share what is there."""
    max_pending_requests: int = Field(default=1024, ge=1, le=1_000_000)
    """Requests of one version waiting for a connection; the next gets UNAVAILABLE."""
    max_requests: int = Field(default=4096, ge=1, le=1_000_000)
    """Requests of one version at once; the next gets UNAVAILABLE."""
    low_priority_percent: float = Field(default=25.0, gt=0, le=100)
    """Share of `max_requests` and `max_pending_requests` that calls with `x-millrace-priority: low` may fill; those above get UNAVAILABLE,
    so that they are the first to go when servers are busy."""
    adaptive: AdaptiveSettings | None = None
    """Find the limit of requests at once for each version, below `max_requests`. Calls of low priority then have what normal ones leave of it."""
    retry_after_s: float = Field(default=1.0, gt=0, le=600)
    """When callers that were turned away because of too much should come again; they are told so in the answer."""
    max_memory_mib: int = Field(default=0, ge=0, le=1 << 20)
    """Memory of Envoy near which (95 %) it turns new calls away, and (98 %) ends those that hold most of it; 0 knows no limit."""
    max_client_connections: int = Field(default=0, ge=0, le=10_000_000)
    """Connections of clients at once; further ones are closed at once. 0 knows no limit."""
    max_retries: int = Field(default=2, ge=0, le=5)
    """Further tries of one request on another server."""
    retry_budget_percent: float = Field(default=20.0, ge=0, le=100)
    """Retries at once, as a share of the requests at once; at least 10 are always allowed."""
    retry_lost_calls: bool = True
    """Also try a call again when its server went away in the middle of it. Right for models without state, where an answer
    changes nothing; turn it off for sequence models."""
    health_interval_s: float = Field(default=1.0, ge=0.05, le=60)
    """Time between two health checks of a model server (gRPC health protocol)."""
    health_timeout_s: float = Field(default=1.0, ge=0.05, le=60)
    """Longest wait for a health check's answer."""
    unhealthy_after: int = Field(default=2, ge=1, le=10)
    """Failed checks in a row that take a server out of the rotation; one good check brings it back."""
    ejection_s: float = Field(default=5.0, gt=0, le=600)
    """First time-out of a server that refuses or loses three calls in a row; grows with each repetition."""
    slow_start_s: float = Field(default=0.0, ge=0, le=3600)
    """A server that joins gets its full share only after so long, for models that warm up; not with ConsistentHash. 0 is at once."""
    stream_idle_s: float = Field(default=300.0, ge=1, le=86_400)
    """A stream on which nothing moves for so long is ended."""
    grace_s: float = Field(default=10.0, ge=0, le=600)
    """Time a version's servers stay known after no route names them, so that running calls end in peace."""
    connection_age_s: float = Field(default=300.0, ge=0, le=86_400)
    """A client's connection is asked to end after so long (GOAWAY; running calls finish), because behind a ClusterIP a gRPC client
    stays with one gateway for as long as its connection lives, and new replicas would get no load. 0 never asks."""
    goaway_s: float = Field(default=1.0, gt=0, le=60)
    """Time between the notice that a connection ends and its end for new calls, so that none is lost on the way."""
    deregister_s: float = Field(default=0.0, ge=0, le=600)
    """After SIGTERM, shortest time in which new connections are still taken, until kube-proxy and load balancers know that this
    gateway leaves. 5 is right in a cluster; one machine needs none. Running calls then have `drain_s` to end."""
    log_level: str = Field(default="warning", pattern="^(trace|debug|info|warning|error|critical|off)$")
    """Least severe line of Envoy's own log (standard error)."""


class PredictionLogSettings(Settings):
    """What is kept of answered predictions, and how much of it."""

    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of V2 requests whose payload is logged; their other fields are always logged."""
    samples_per_s: int = Field(default=500, ge=0, le=1_000_000)
    """Most V2 payloads a second and Envoy worker; what is above is logged without payload."""
    sample_max_bytes: int = Field(default=16_384, ge=0, le=262_144)
    """Largest V2 request or response body that is logged."""
    sample_max_rows: int = Field(default=64, ge=1, le=1024)
    """Most rows of one V2 request that become predictions of their own; larger batches are logged without payload."""
    flush_interval_s: float = Field(default=0.05, ge=0.01, le=10)
    """How often Envoy writes out its access log, and how soon it is read. A killed Envoy takes what it has not written with it, uncounted."""
    access_bytes: int = Field(default=16 << 20, ge=65_536, le=1 << 30)
    """Size at which Envoy's access log gets a new file."""
    access_files: int = Field(default=16, ge=2, le=1000)
    """Files of the access log that wait for a Python process that is away; of more, the oldest go, and their lines are counted as dropped."""
    segment_bytes: int = Field(default=8 << 20, ge=4096, le=1 << 30)
    """Size at which the journal starts a new file."""
    max_segments: int = Field(default=32, ge=2, le=10_000)
    """Files of the journal; when all are full of unpublished entries, new ones are dropped and counted."""
    batch_entries: int = Field(default=512, ge=1, le=10_000)
    """Most predictions in one message on the bus."""
    publish_interval_s: float = Field(default=0.2, gt=0, le=60)
    """Longest time an entry waits for others to share its message."""

    @property
    def samples_payloads(self) -> bool:
        """Whether any payload is logged."""
        return self.sample_ratio > 0 and self.samples_per_s > 0 and self.sample_max_bytes > 0


class KubernetesSettings(Settings):
    """How servers of a version are found in a cluster: from the EndpointSlices of the Service its route names."""

    namespace: str = Field(pattern=_LABEL_OR_REFERENCE)
    """Namespace of the Services; routes that name another are served from the endpoints they list."""
    label_selector: str = Field(default="kubernetes.io/service-name", max_length=1024)
    """EndpointSlices that are followed; the default is every one that belongs to a Service."""
    api_server: str = Field(default="", pattern="^(https?://.+)?$")
    """The API server; empty takes the one a pod is told by its environment."""
    token_file: str = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105 - a path
    """Bearer token, read again for every call because it is exchanged while the pod lives; empty sends none."""
    ca_file: str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
    """Authority of the API server's certificate; empty takes the system's."""
    prefer_own_zone: bool = False
    """Call servers of the gateway's own zone while that has its share of them; others get what those that are healthy cannot take. The zone is
    that of the pod `gateway_id` in the gateway's own EndpointSlice."""
    request_timeout_s: float = Field(default=10.0, gt=0, le=300)
    """Longest wait for a list, and for the start of a watch."""
    watch_s: int = Field(default=300, ge=1, le=3600)
    """The API server ends a watch after so long; the next one goes on where it ended."""
    silence_s: float = Field(default=90.0, ge=1, le=3600)
    """A watch that says nothing for so long is given up; the API server sends a bookmark each minute."""
    backoff_s: float = Field(default=0.2, gt=0, le=60)
    """Wait before asking again after a failure; doubles up to `backoff_max_s`."""
    backoff_max_s: float = Field(default=5.0, gt=0, le=300)
    """Longest wait before asking again."""


class PublicTlsSettings(Settings):
    """TLS of the port clients call; its files are watched and exchanged without a restart."""

    mode: Literal["none", "server", "mutual"] = "none"
    """`server` proves the gateway to clients, `mutual` clients to the gateway too."""
    cert_file: str = ""
    """Certificate chain, PEM."""
    key_file: str = ""
    """Private key, PEM."""
    ca_file: str = ""
    """Authority of the clients' certificates, PEM; with `mutual`."""

    @model_validator(mode="after")
    def _files(self) -> Self:
        needed = {"none": (), "server": ("cert_file", "key_file"), "mutual": ("cert_file", "key_file", "ca_file")}
        for name in needed[self.mode]:
            if not getattr(self, name):
                raise ValueError(f"{name}: is needed for mode {self.mode}")
        return self


class OidcSettings(Settings):
    """Find the issuer's keys by its discovery document (`<issuer>/.well-known/openid-configuration`)."""

    ca_file: str = ""
    """Authority of the issuer's certificate, PEM; empty takes the system's."""
    timeout_s: float = Field(default=5.0, gt=0, le=60)
    """Longest wait for the document and the keys together."""
    refresh_s: float = Field(default=300.0, ge=1, le=86_400)
    """How often they are fetched anew; at once when a token comes whose key is not known."""
    retry_s: float = Field(default=5.0, ge=0.1, le=3600)
    """Least time between two fetches, and the wait after a failure."""
    max_age_s: float = Field(default=86_400.0, ge=1, le=31_536_000)
    """How long keys are used while the issuer is away; after it nobody with a token is let in."""


class JwtSettings(Settings):
    """Callers that bring a JWT (`authorization: Bearer …`)."""

    issuer: str = Field(min_length=1)
    """`iss` the token must have."""
    audiences: tuple[str, ...] = ()
    """`aud` of which the token must have one; empty takes any."""
    jwks_file: str = ""
    """JSON Web Key Set of the issuer; read again when it changes. Either this or `oidc`."""
    oidc: OidcSettings | None = None
    """Ask the issuer for its keys."""
    client_claim: str = Field(default="sub", pattern=_CLAIM)
    """Claim that is the client's name, for rights, limits and the prediction log; dots lead into objects."""
    groups_claim: str = Field(default="", pattern=f"^$|{_CLAIM}")
    """Claim with the client's groups, a list or names with spaces between; `group:<name>` among a model's callers or testers means them."""

    @model_validator(mode="after")
    def _keys(self) -> Self:
        if bool(self.jwks_file) == (self.oidc is not None):
            raise ValueError("jwks_file: either this or oidc is needed")
        if self.oidc is not None and not self.issuer.startswith(("https://", "http://")):
            raise ValueError("issuer: must be an address where oidc asks it")
        return self


class ClientLimit(Settings):
    """How often one client may call."""

    calls_per_s: int = Field(ge=1, le=10_000_000)
    """Calls a second this replica takes from it; more get RESOURCE_EXHAUSTED."""
    burst: int = Field(default=0, ge=0, le=10_000_000)
    """Calls it takes at once after a pause; 0 takes `calls_per_s`."""


class AuthSettings(Settings):
    """Who may call the public port, and how often; health checks are for everybody. By default everybody may."""

    api_keys_file: str = ""
    """One `name sha256-of-the-key` a line; read again when it changes. With `jwt` a caller needs one of both."""
    api_key_header: str = Field(default="x-api-key", pattern="^[a-z0-9][a-z0-9-]{0,62}$")
    """Metadata that carries the key."""
    jwt: JwtSettings | None = None
    """Take JWTs of one issuer."""
    calls_per_s: int = Field(default=0, ge=0, le=10_000_000)
    """Calls a second this replica takes from all clients together; more get RESOURCE_EXHAUSTED. 0 is no limit."""
    burst: int = Field(default=0, ge=0, le=10_000_000)
    """Calls it takes at once after a pause; 0 takes `calls_per_s`."""
    each_client: ClientLimit | None = None
    """Limit of every client by its name (of its API key, token or certificate)."""
    clients: dict[str, ClientLimit] = Field(default_factory=dict, max_length=MAX_CLIENT_LIMITS)
    """Limits of single clients by name, in the place of `each_client`."""


class WakeSettings(Settings):
    """Calls of versions that were put to sleep (`server.autoscaling.minReplicas: 0`): they are held while servers start."""

    max_held_calls: int = Field(default=256, ge=1, le=100_000)
    """Calls of all such versions that wait at once; more get UNAVAILABLE (503) with `retry-after`. Envoy keeps a held call's message, so
    this times `max_message_mib` is the most memory that they take."""
    max_wait_s: float = Field(default=120.0, ge=1, le=3600)
    """Longest wait of one call; then it gets UNAVAILABLE. A caller's own deadline ends it earlier, and the wake goes on."""
    retry_after_s: int = Field(default=5, ge=1, le=3600)
    """What refused calls are told to wait."""


class GatewaySettings(ServiceSettings):
    """The gateway."""

    gateway_id: str = Field(default="gateway-0", pattern=_LABEL_OR_REFERENCE)
    """Stable name of this replica (in a cluster its pod's name); names its journal on the bus."""
    advertise_address: str = ""
    """`host:port` at which the rollout controller asks for this replica's figures, in a cluster the pod's IP and the port of
    `listen`; empty where the controller's own settings name it."""
    public_listen: str = "127.0.0.1:7400"
    """Where Envoy takes clients' calls."""
    public_tls: PublicTlsSettings = PublicTlsSettings()
    auth: AuthSettings = AuthSettings()
    envoy_admin_listen: str = "127.0.0.1:7409"
    """Where Envoy answers questions about itself; never expose it."""
    stats_listen: str = ""
    """Where Envoy answers `/ready`, `/livez` and `/stats/prometheus` and nothing else, for the kubelet and Prometheus; empty opens none."""
    kubernetes: KubernetesSettings | None = None
    """Follow EndpointSlices; without it servers are those the routes list."""
    feature_address: str = "127.0.0.1:7402"
    """The feature service."""
    feature_reads_address: str = ""
    """Where it takes look-ups as HTTP/1.1 (its `reads_listen`), which costs both sides a fraction of gRPC; empty asks at `feature_address`
    alone, as is done while nobody listens there. Of a name with several addresses all are used."""
    rollout_address: str = "127.0.0.1:7407"
    """The rollout controller."""
    predict_timeout_s: float = Field(default=5.0, gt=0, le=300)
    """Deadline of a Predict whose caller set none."""
    feature_time_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of what is left of the deadline that the feature look-up may use."""
    predict_channels: int = Field(default=256, ge=1, le=4096)
    """Model calls of Predict at once, each on a connection of its own to Envoy; further ones wait, within their deadline."""
    feature_reads_at_once: int = Field(default=4, ge=1, le=64)
    """Calls of the feature service at once; look-ups that come meanwhile share the next one."""
    feature_rows_together: int = Field(default=64, ge=1, le=1000)
    """Most look-ups that share one call of the feature service."""
    max_inputs: int = Field(default=256, ge=1, le=10_000)
    """Inputs of one Predict."""
    max_batch_rows: int = Field(default=256, ge=1, le=10_000)
    """Rows of one PredictBatch."""
    batch_rows_together: int = Field(default=32, ge=1, le=1024)
    """Most rows of a PredictBatch in one call of the model. A model that takes fewer is asked row by row."""
    max_stream_calls: int = Field(default=32, ge=1, le=4096)
    """Predictions of one PredictStream at once; the next one is read when one of them is answered."""
    result_cache_entries: int = Field(default=10_000, ge=1, le=1_000_000)
    """Answers kept for models whose version declares a result cache; the one not used for longest goes."""
    max_zero_hop_clients: int = Field(default=0, ge=0, le=100_000)
    """gRPC clients that may follow the routes by xDS (at `listen`) and call model servers themselves. 0 offers it to nobody: what goes
    around Envoy is in no figure and in no log, so gates hold."""
    apply_timeout_s: float = Field(default=10.0, gt=0, le=300)
    """Longest wait for Envoy to have new routes in force before it is tried again."""
    reconnect_s: float = Field(default=0.5, gt=0, le=60)
    """Wait before calling the rollout controller again; doubles up to ten times itself."""
    envoy: EnvoySettings = EnvoySettings()
    wake: WakeSettings = WakeSettings()
    prediction_log: PredictionLogSettings = PredictionLogSettings()

    @property
    def folder(self) -> Path:
        """Where this gateway keeps what survives a restart; absolute."""
        return Path(self.state_dir).absolute()

    @property
    def access_log(self) -> Path:
        """Envoy's access log, in files that grow one after the other."""
        return self.folder / "access"

    @property
    def socket(self) -> Path:
        """Envoy's inner listener, for Predict's model calls only."""
        return self.folder / "envoy.sock"

    @property
    def door_socket(self) -> Path:
        """Where Envoy brings the Python process the unary calls that have to be cheap."""
        return self.folder / "door.sock"

    @property
    def mirror_socket(self) -> Path:
        """Envoy's listener for the copies of requests that it makes itself."""
        return self.folder / "mirror.sock"

    @property
    def wake_socket(self) -> Path:
        """Where Envoy asks for versions that are asleep."""
        return self.folder / "wake.sock"

    @property
    def python_socket(self) -> Path:
        """Where Envoy reaches the Python process: inside the pod, so without TLS even when `listen` has it."""
        return self.folder / "python.sock"

    @model_validator(mode="after")
    def _addresses(self) -> Self:
        for name in ("public_listen", "envoy_admin_listen", "feature_address", "rollout_address"):
            split_address(str(getattr(self, name)), name)
        for name in ("advertise_address", "stats_listen", "feature_reads_address"):
            # An address from the environment is not known yet when a file is only checked.
            if (text := str(getattr(self, name))) and "${" not in text:
                split_address(text, name)
        for path in (self.socket, self.python_socket, self.mirror_socket, self.door_socket, self.wake_socket):
            if len(str(path).encode()) > MAX_SOCKET_PATH_BYTES:
                raise ValueError(f"state_dir: {path} is longer than {MAX_SOCKET_PATH_BYTES} bytes")
        return self


def split_address(address: str, name: str) -> tuple[str, int]:
    """Host and port of `host:port` (`[::1]:80` for IPv6).

    Raises:
        ValueError: it is none; the message starts with `name`.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
        raise ValueError(f"{name}: {address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)
