"""`values.schema.json` of the chart, made from `values.yaml`: `python -m chart.schema` writes it, `--check` says whether it is up to date.

Defaults give types, comments give descriptions, and `SHAPES` says what neither can: choices, ranges, and maps whose keys are people's own.
Everything else is closed. Services may set every key of `defaults`.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[2] / "charts" / "millrace"
DEFAULTS = "defaults"
SERVICES = (
    "ingestion",
    "feature",
    "registry",
    "trainingCoordinator",
    "gateway",
    "driftMonitor",
    "rolloutController",
    "console",
)
Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
LABELS: Schema = {"type": "object", "additionalProperties": TEXT}
NAMES: Schema = {"type": "array", "items": TEXT}
OBJECT: Schema = {"type": "object"}
OBJECTS: Schema = {"type": "array", "items": OBJECT}
PORTS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 65535}}
QUANTITY: Schema = {"type": ["string", "number"]}
SIZE: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$"}
RESOURCES: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "requests": {"type": "object", "additionalProperties": QUANTITY},
        "limits": {"type": "object", "additionalProperties": QUANTITY},
        "claims": OBJECTS,
    },
}
TOLERATIONS: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "key": TEXT,
            "operator": {"enum": ["Equal", "Exists"]},
            "value": TEXT,
            "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
            "tolerationSeconds": {"type": "integer"},
        },
    },
}
TOPIC: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "partitions": {"type": "integer", "minimum": 0, "maximum": 1024},
        "retentionHours": {"type": "integer", "minimum": 0},
    },
}
ISSUER: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": dict.fromkeys(("name", "kind", "group"), TEXT),
}


def _choice(*values: str) -> Schema:
    return {"enum": list(values)}


def _number(minimum: float, maximum: float | None = None, kind: str = "integer") -> Schema:
    return {"type": kind, "minimum": minimum} | ({} if maximum is None else {"maximum": maximum})


# By the end of the path; the longest that fits wins.
SHAPES: Mapping[str, Schema] = {
    "annotations": LABELS,
    "commonPodAnnotations": LABELS,
    "podAnnotations": LABELS,
    "podLabels": LABELS,
    "labels": LABELS,
    "nodeSelector": LABELS,
    "tolerations": TOLERATIONS,
    "affinity": OBJECT,
    "topologySpreadConstraints": OBJECTS,
    "resources": RESOURCES,
    "envoyResources": RESOURCES,
    "fetchResources": RESOURCES,
    "env": TEXTS,
    "settings": OBJECT,
    "size": SIZE,
    "tmpSize": SIZE,
    "shmSize": SIZE,
    "modelVolumeSize": SIZE,
    "pullSecrets": NAMES,
    "command": NAMES,
    "args": NAMES,
    "triggers": OBJECTS,
    "replicas": _number(0, 1000),
    "minReplicas": _number(0, 1000),
    "maxReplicas": _number(1, 1000),
    "targetCPUUtilizationPercentage": _number(1, 1000),
    "maxUnavailable": {"type": ["integer", "string"]},
    "shutdownDelaySeconds": _number(0, 600),
    "drainSeconds": _number(0, 600),
    "pullPolicy": _choice("Always", "IfNotPresent", "Never"),
    "service.type": _choice("ClusterIP", "NodePort", "LoadBalancer"),
    "publicService.type": _choice("ClusterIP", "NodePort", "LoadBalancer"),
    "publicService.port": _number(1, 65535),
    "publicService.nodePort": _number(0, 65535),
    "image.digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "ingestion.lake.order": _choice("none", "key", "event_time", "key_and_event_time"),
    "ingestion.lake.maintenanceEverySeconds": _number(1, 604_800),
    "ingestion.lake.vacuumRetentionHours": _number(0, 876_000),
    "deadLetters.retentionDays": _number(0, 36_500, "number"),
    "sources.connections": {"type": "object", "additionalProperties": OBJECT},
    "sources.locations": NAMES,
    "onlineCache.maxStalenessMs": _number(0, 3_600_000),
    "onlineCache.maxEntries": _number(1, 100_000_000),
    "onlineCache.views": NAMES,
    "consistency.sampleRate": _number(0, 1, "number"),
    "consistency.settleSeconds": _number(0, 2_592_000),
    "consistency.tolerance": _number(0, 1, "number"),
    "history.readBehindHours": _number(0, 87_600),
    "history.headBehindSeconds": _number(0, 315_360_000),
    "history.previousDefinitionsSeconds": _number(0, 31_536_000),
    "trainingSets.keepVersionsDays": _number(0, 36_500),
    "trainingSets.maxRows": _number(1, 1_000_000_000),
    "trainingSets.memoryMib": _number(256, 1_048_576),
    "trainingSets.threads": _number(1, 256),
    "trainingSets.maxConcurrent": _number(1, 64),
    "access.administrators": NAMES,
    "access.roles": {"type": "object", "additionalProperties": NAMES},
    "kafka.bootstrapServers": {"type": "array", "items": {"type": "string", "pattern": "^.+:[0-9]+$"}},
    "kafka.partitions": _number(1, 1024),
    "kafka.replicationFactor": _number(1, 7),
    "kafka.retentionHours": _number(1),
    "kafka.topics": {"type": "object", "additionalProperties": TOPIC},
    "kafka.security.protocol": _choice("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"),
    "kafka.security.saslMechanism": _choice("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
    "objectStorage.endpoint": {"type": "string", "pattern": "^(https?://.+)?$"},
    "objectStorage.bucket": {"type": "string", "pattern": "^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$"},
    "tls.issuer": _choice("builtin", "certManager"),
    "tls.certManager.issuerRef": ISSUER,
    "days": _number(1),
    "authorityDays": _number(1),
    "renewBeforeDays": _number(1),
    "jwt.audiences": NAMES,
    "jwt.clientClaim": {"type": "string", "pattern": "^[A-Za-z0-9_:/.-]{1,128}$"},
    "jwt.groupsClaim": {"type": "string", "pattern": "^[A-Za-z0-9_:/.-]{0,128}$"},
    "discovery.refreshSeconds": _number(1, 86_400),
    "discovery.maxAgeSeconds": _number(1, 31_536_000),
    "auth.callsPerSecondOfClients": {"type": "object", "additionalProperties": _number(1, 10_000_000)},
    "limits.maxRequests": _number(1, 1_000_000),
    "limits.maxPendingRequests": _number(1, 1_000_000),
    "limits.lowPriorityPercent": {"type": "number", "exclusiveMinimum": 0, "maximum": 100},
    "limits.retryAfterSeconds": {"type": "number", "exclusiveMinimum": 0, "maximum": 600},
    "limits.maxMemoryMib": _number(0, 1_048_576),
    "adaptive.models": NAMES,
    "adaptive.tolerancePercent": _number(0, 10_000),
    "adaptive.minRequests": _number(1, 1_000_000),
    "adaptive.measureSeconds": _number(1, 86_400),
    "balancing.slowStartSeconds": _number(0, 3600),
    "balancing.maxRetries": _number(0, 5),
    "balancing.retryBudgetPercent": _number(0, 100),
    "predict.timeoutSeconds": {"type": "number", "exclusiveMinimum": 0, "maximum": 300},
    "predict.featureTimeShare": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "predict.resultCacheEntries": _number(1, 1_000_000),
    "predictionLog.sampleRatio": _number(0, 1, "number"),
    "predictionLog.samplesPerSecond": _number(0, 1_000_000),
    "zeroHop.maxClients": _number(0, 100_000),
    "zeroHop.clients": OBJECTS,
    "prometheus.url": {"type": "string", "pattern": r"^(https?://[^\s?#]+)?$"},
    "gateway.tls.mode": _choice("none", "server", "mutual"),
    "networkPolicy.clients": OBJECTS,
    "networkPolicy.gatewayClients": OBJECTS,
    "networkPolicy.metricsClients": OBJECTS,
    "egress.kubernetesPorts": PORTS,
    "externalPorts.kafka": PORTS,
    "externalPorts.postgres": PORTS,
    "externalPorts.redis": PORTS,
    "externalPorts.objectStorage": PORTS,
    "egress.externalCidrs": NAMES,
    "egress.extra": OBJECTS,
    "telemetry.sampleRatio": _number(0, 1, "number"),
    "telemetry.logLevel": _choice("DEBUG", "INFO", "WARNING", "ERROR"),
    "modelServers.platform": _choice("onnxruntime", "pythonOnnx"),
    "trainingStages.cpuRequestShare": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
}


class SchemaError(Exception):
    """A value without a shape; the message names it."""


def descriptions(text: str) -> dict[str, str]:
    """The comment above each key of a values file, by the key's dotted path."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            comment.append(stripped.removeprefix("#").strip().removeprefix("--").strip())
            continue
        if match := re.match(r"( *)([A-Za-z0-9.-]+):", line):
            indent = len(match[1])
            path = [*(part for part in path if part[0] < indent), (indent, match[2])]
            if comment:
                found[".".join(name for _, name in path)] = " ".join(comment)
        comment = []
    return found


def shape(path: str) -> Schema | None:
    """What `SHAPES` says of a dotted path."""
    parts = path.split(".")
    for start in range(len(parts)):
        if found := SHAPES.get(".".join(parts[start:])):
            return dict(found)
    return None


def schema_of(value: object, path: str, about: Mapping[str, str]) -> Schema:
    """Schema of one value with its default.

    Raises:
        SchemaError: a list or an empty map that `SHAPES` does not know.
    """
    made = shape(path)
    if made is None:
        made = _inferred(value, path, about)
    if text := about.get(path):
        made["description"] = text
    return made


def _inferred(value: object, path: str, about: Mapping[str, str]) -> Schema:
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return _number(0)
    if isinstance(value, float):
        return {"type": "number"}
    if isinstance(value, str):
        return dict(TEXT)
    if isinstance(value, dict) and value:
        members = {str(key): schema_of(member, f"{path}.{key}", about) for key, member in value.items()}
        return {"type": "object", "additionalProperties": False, "properties": members}
    raise SchemaError(f"{path}: its default does not say what it may hold; add it to SHAPES")


def _service(name: str, values: Mapping[str, Any], about: Mapping[str, str]) -> Schema:
    """Schema of one service: every key of `defaults`, and its own."""
    own = schema_of(values[name], name, about)
    every = schema_of(values[DEFAULTS], DEFAULTS, about)
    return _merged(every, own)


def _merged(base: Schema, over: Schema) -> Schema:
    properties = dict(base["properties"])
    for key, schema in over["properties"].items():
        there = properties.get(key)
        closed = there is not None and "properties" in there and "properties" in schema
        properties[key] = _merged(there, schema) if there is not None and closed else schema
    return {**base, **over, "properties": properties}


def generate(text: str) -> Schema:
    """The schema of a values file."""
    values: dict[str, Any] = yaml.safe_load(text)
    about = descriptions(text)
    properties = {
        name: _service(name, values, about) if name in SERVICES else schema_of(value, name, about)
        for name, value in values.items()
    }
    # Helm puts `global` into every chart's values.
    properties["global"] = {"type": "object", "description": "Set by a parent chart; not used here."}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart millrace",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def rendered(chart: Path = CHART) -> str:
    """The file's text."""
    return json.dumps(generate((chart / "values.yaml").read_text(encoding="utf-8")), indent=1) + "\n"


def main() -> int:
    """Write the file, or check it."""
    parser = argparse.ArgumentParser(prog="python -m chart.schema", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the file is not up to date")
    arguments = parser.parse_args()
    target = CHART / "values.schema.json"
    text = rendered()
    if not arguments.check:
        target.write_text(text, encoding="utf-8")
        return 0
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        print(f"{target} is not what values.yaml says: run python -m chart.schema", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
