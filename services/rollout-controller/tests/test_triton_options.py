"""Batching, limits, cache and warm-up of the manifest: as text, in a cluster's pods, and in a real Triton."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as tritonclient
from millrace_kit.errors import InvalidArgumentError
from millrace_rollout_controller import repository, triton_options
from millrace_rollout_controller.executor import Wanted
from millrace_rollout_controller.kubernetes import objects, order
from millrace_rollout_controller.kubernetes.settings import KubernetesSettings
from millrace_rollout_controller.repository import Flavour
from millrace_rollout_controller.server_block import Server, check_server

from .support import Files, version_ref
from .test_executor import executor, infer, ready, want

TUNED: dict[str, Any] = {
    "maxBatchSize": 16, "instances": 2, "queueDelayUs": 500, "responseCacheMib": 4,
    "batching": {
        "preferredSizes": [4, 8], "priorityLevels": 2, "defaultPriority": 2, "maxQueueSize": 64, "queueTimeoutUs": 1_000_000,
    },
    "rateLimit": {"total": 1}, "modelWarmup": {"batchSizes": [1, 4], "count": 2},
}  # fmt: skip


def block(**fields: Any) -> Server:
    # The manifest comes as JSON, where a list is a tuple.
    made = Server.model_validate_json(json.dumps(fields))
    check_server(made)
    return made


def test_without_a_word_the_configuration_is_what_it_was() -> None:
    text = repository.config(version_ref("1.0.0", b"x"), Server(), Flavour())
    assert "dynamic_batching { max_queue_delay_microseconds: 0 }" in text
    assert "instance_group [ { count: 1 kind: KIND_CPU } ]" in text
    assert "response_cache" not in text
    assert "rate_limiter" not in text
    assert triton_options.arguments(Server()) == []


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"batching": {"preferredSizes": [8, 4]}}, "spec.server.batching.preferredSizes"),
        ({"batching": {"preferredSizes": [128]}}, "spec.server.batching.preferredSizes"),
        ({"batching": {"priorityLevels": 2}}, "spec.server.batching.defaultPriority"),
        ({"batching": {"priorityLevels": 2, "defaultPriority": 3}}, "spec.server.batching.defaultPriority"),
        ({"rateLimit": {"total": 1, "perInstance": 2}}, "spec.server.rateLimit.total"),
        ({"modelWarmup": {"batchSizes": [65]}}, "spec.server.modelWarmup.batchSizes"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        block(**fields)
    assert refused.value.field == path


def test_a_pod_is_told_all_of_it() -> None:
    settings = KubernetesSettings.model_validate(
        {"namespace": "ml", "fetch": {"image": "fetch:1", "config_map": "c"}, "servers": {"image": "triton:1"}}
    )
    server = block(**TUNED)
    wanted = Wanted("flights", version_ref("1.0.0", b"x"), 1, server)
    made = objects.build(wanted, {"metadata": {"name": "flights", "uid": "u"}}, settings)
    pod = next(item for item in made if item["kind"] == "Deployment")["spec"]["template"]["spec"]
    arguments = pod["containers"][0]["args"]
    assert "--cache-config=local,size=4194304" in arguments
    assert "--rate-limit-resource=millrace:1" in arguments
    (text,) = [each["value"] for each in pod["initContainers"][0]["env"] if each["name"] == order.ENVIRONMENT]
    told = order.Order.model_validate_json(text)
    flavour = Flavour(warmup=3)
    # The init container writes the very configuration that the controller means.
    assert repository.config(wanted.ref, told.server, flavour) == repository.config(wanted.ref, server, flavour)


async def test_a_real_server_has_all_of_it(tmp_path: Path, tiny: bytes) -> None:
    files = Files()
    files.add(tiny)
    async with executor(tmp_path, files) as made:
        (endpoint,) = await ready(made, want(tiny, server=block(**TUNED)), 1)
        async with tritonclient.InferenceServerClient(endpoint) as client:
            config = (await client.get_model_config("flight-delay")).config
            batching = config.dynamic_batching
            assert list(batching.preferred_batch_size) == [4, 8]
            assert (batching.priority_levels, batching.default_priority_level) == (2, 2)
            assert batching.default_queue_policy.max_queue_size == 64
            assert [(g.count, g.rate_limiter.resources[0].count) for g in config.instance_group] == [(2, 1)]
            assert [each.batch_size for each in config.model_warmup] == [1, 4]
            rows = np.ones((3, 4), np.float32)
            answers = [await infer(endpoint, rows) for _ in range(3)]
            np.testing.assert_allclose(answers, 1 / (1 + np.exp(-0.4)), rtol=1e-5)
            stats = (await client.get_inference_statistics("flight-delay")).model_stats[0].inference_stats
            assert stats.cache_hit.count >= 2
            tensor = tritonclient.InferInput("features", [1, 4], "FP32")
            tensor.set_data_from_numpy(np.zeros((1, 4), np.float32))
            urgent = await client.infer("flight-delay", [tensor], priority=1, client_timeout=10)
            np.testing.assert_allclose(urgent.as_numpy("probability"), 0.5)
