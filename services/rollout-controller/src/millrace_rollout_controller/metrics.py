"""Prometheus metrics of the controller."""

from prometheus_client import Counter, Gauge, Histogram

SERVER_RESTARTS = Counter(
    "millrace_rollout_server_restarts_total", "Model servers that had to be restarted.", ["model", "version"]
)
SERVERS_READY = Gauge("millrace_rollout_servers_ready", "Ready model servers.", ["deployment", "version"])
WEIGHT = Gauge("millrace_rollout_weight_percent", "Percent of traffic a version should get.", ["deployment", "version"])
PHASE = Gauge("millrace_rollout_phase", "1 for the phase a deployment is in.", ["deployment", "phase"])
VERDICTS = Counter(
    "millrace_rollout_gate_verdicts_total", "Changes of a gate's verdict.", ["deployment", "gate", "verdict"]
)
ASLEEP = Gauge(
    "millrace_rollout_asleep", "1 for a version that has no servers because nobody asks it.", ["deployment", "version"]
)
WAKE_SECONDS = Histogram(
    "millrace_rollout_wake_seconds",
    "From the wish that a version wakes to its first ready server.",
    ["deployment"],
    buckets=(0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600),
)
POOL_MODELS = Gauge("millrace_rollout_pool_models", "Versions in a pool by what they do there.", ["pool", "state"])
POOL_BYTES = Gauge(
    "millrace_rollout_pool_bytes",
    "Memory of a pool: what its models may take together (capacity), what is set aside for them and what they really take.",
    ["pool", "kind"],
)
POOL_LOADS = Counter("millrace_rollout_pool_loads_total", "Loads of a model into its pool's server.", ["pool", "model"])
POOL_LOAD_SECONDS = Histogram(
    "millrace_rollout_pool_load_seconds",
    "Duration of a load into a pool's server: files, the load itself, warm-up.",
    ["pool"],
    buckets=(0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300),
)
POOL_EVICTIONS = Counter(
    "millrace_rollout_pool_evictions_total", "Models that gave way to others in their pool.", ["pool", "model"]
)
POOL_WAIT_SECONDS = Histogram(
    "millrace_rollout_pool_wait_seconds",
    "From the wish for a place in a pool to the place.",
    ["pool"],
    buckets=(0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300, 600),
)
TICK_SECONDS = Gauge("millrace_rollout_tick_seconds", "Duration of the last look at everything.")
TICK_FAILURES = Counter(
    "millrace_rollout_tick_failures_total", "Looks at a deployment that ended with an error.", ["deployment"]
)
POLL_FAILURES = Counter(
    "millrace_rollout_poll_failures_total", "Questions for figures or outcomes without answer.", ["source"]
)
GATEWAYS = Gauge("millrace_rollout_gateways", "Gateways that count.")
GENERATION = Gauge("millrace_rollout_routes_generation", "Generation of the routes published last.")
