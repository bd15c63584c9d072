"""The manifest's batching, limits and cache in Triton's words: parts of `config.pbtxt`, and arguments of the server. Pure."""

from millrace_rollout_controller.server_block import Server

RESOURCE = "millrace"
"""Name of the rate limiter's one resource."""


def batching(server: Server) -> str:
    """The block `dynamic_batching`."""
    block = server.batching
    parts = [f"max_queue_delay_microseconds: {server.queue_delay_us}"]
    if block.preferred_sizes:
        parts.append(f"preferred_batch_size: [ {', '.join(map(str, block.preferred_sizes))} ]")
    if block.priority_levels:
        parts.append(f"priority_levels: {block.priority_levels} default_priority_level: {block.default_priority}")
    policy = []
    if block.max_queue_size:
        policy.append(f"max_queue_size: {block.max_queue_size}")
    if block.queue_timeout_us:
        policy.append(f"timeout_action: REJECT default_timeout_microseconds: {block.queue_timeout_us}")
    if policy:
        parts.append(f"default_queue_policy {{ {' '.join(policy)} }}")
    return f"dynamic_batching {{ {' '.join(parts)} }}"


def instances(server: Server, *, gpu: bool) -> str:
    """The block `instance_group`."""
    parts = [f"count: {server.instances}", f"kind: {'KIND_GPU' if gpu else 'KIND_CPU'}"]
    if (limit := server.rate_limit) is not None:
        resources = f'resources [ {{ name: "{RESOURCE}" count: {limit.per_instance} }} ]'
        parts.append(f"rate_limiter {{ {resources} priority: {limit.priority} }}")
    return f"instance_group [ {{ {' '.join(parts)} }} ]"


def caching(server: Server) -> list[str]:
    """The block `response_cache`, where there is a cache."""
    return ["response_cache { enable: true }"] if server.response_cache_mib else []


def arguments(server: Server) -> list[str]:
    """What the server's command line needs for it."""
    found = []
    if server.response_cache_mib:
        found.append(f"--cache-config=local,size={server.response_cache_mib * 1024 * 1024}")
    if server.rate_limit is not None:
        found += ["--rate-limit=execution_count", f"--rate-limit-resource={RESOURCE}:{server.rate_limit.total}"]
    return found
