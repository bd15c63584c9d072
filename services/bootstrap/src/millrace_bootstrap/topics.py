"""Topics of Kafka: made, extended, their options set; partitions and messages are never taken away."""

import logging
from collections.abc import Mapping

from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from kafka.errors import TopicAlreadyExistsError, for_code
from millrace_kit.bus import records_topic
from millrace_kit.bus.kafka_bus import MAX_MESSAGE_BYTES, kafka_options
from millrace_kit.settings import BusSettings

from millrace_bootstrap.settings import TopicSettings

log = logging.getLogger(__name__)
HOUR_MS = 3_600_000


def bring_topics(bus: BusSettings, topics: Mapping[str, TopicSettings], records: TopicSettings | None) -> int:
    """Bring `topics`, and the records topics that exist, to what they should be.

    Returns:
        How many topics differ in a way that only a person can change (more partitions, other replicas).

    Raises:
        KafkaError: no broker answered, or one refused.
    """
    admin = KafkaAdminClient(**kafka_options(bus))
    try:
        there = set(admin.list_topics())
        wanted = dict(topics)
        if records is not None:
            prefix = records_topic("")
            wanted |= {topic: records for topic in sorted(there) if topic.startswith(prefix) and topic not in wanted}
        _create(admin, bus, {topic: one for topic, one in wanted.items() if topic not in there})
        existing = {topic: one for topic, one in wanted.items() if topic in there}
        return _extend(admin, bus, existing) if existing else 0
    finally:
        admin.close()


def _configs(wanted: TopicSettings) -> dict[str, str]:
    configs = {"max.message.bytes": str(MAX_MESSAGE_BYTES)}
    if wanted.retention_hours is not None:
        configs["retention.ms"] = str(round(wanted.retention_hours * HOUR_MS))
    return {**configs, **wanted.configs}


def _create(admin: KafkaAdminClient, bus: BusSettings, missing: Mapping[str, TopicSettings]) -> None:
    if not missing:
        return
    asked = {
        topic: {
            "num_partitions": one.partitions,
            "replication_factor": bus.replication_factor,
            "configs": _configs(one),
        }
        for topic, one in missing.items()
    }
    answer = admin.create_topics(asked, timeout_ms=int(bus.request_timeout_s * 1000), raise_errors=False)
    for topic in answer["topics"]:
        error = for_code(topic["error_code"])
        if error is TopicAlreadyExistsError:  # a service was faster; the next run extends it
            log.info("topic %s was made by somebody else just now", topic["name"])
        elif topic["error_code"]:
            raise error(f"{topic['name']}: {topic.get('error_message') or ''}")
        else:
            log.info("topic %s: made with %d partitions", topic["name"], missing[topic["name"]].partitions)


def _extend(admin: KafkaAdminClient, bus: BusSettings, existing: Mapping[str, TopicSettings]) -> int:
    drifted = 0
    for found in admin.describe_topics(list(existing)):
        topic, partitions = str(found["name"]), found["partitions"]
        wanted = existing[topic]
        if len(partitions) < wanted.partitions:
            admin.create_partitions({topic: wanted.partitions}, timeout_ms=int(bus.request_timeout_s * 1000))
            log.info("topic %s: %d partitions instead of %d", topic, wanted.partitions, len(partitions))
        elif len(partitions) > wanted.partitions:
            drifted += 1
            log.warning(
                "topic %s has %d partitions, not %d; partitions are never taken away",
                topic,
                len(partitions),
                wanted.partitions,
            )
        replicas = {len(partition.get("replica_nodes", partition.get("replicas", ()))) for partition in partitions}
        if replicas != {bus.replication_factor}:
            drifted += 1
            log.warning(
                "topic %s has %s replicas, not %d; move them with Kafka's own tool",
                topic,
                sorted(replicas),
                bus.replication_factor,
            )
    _set_configs(admin, existing)
    return drifted


def _set_configs(admin: KafkaAdminClient, existing: Mapping[str, TopicSettings]) -> None:
    resources = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in existing]
    found = next(iter(admin.describe_configs(resources, config_filter="all").values()))
    changed = []
    for topic, wanted in existing.items():
        different = {
            key: value
            for key, value in _configs(wanted).items()
            if str(found[topic].get(key, {}).get("value")) != value
        }
        if different:
            log.info("topic %s: %s", topic, ", ".join(f"{key}={value}" for key, value in sorted(different.items())))
            changed.append(ConfigResource(ConfigResourceType.TOPIC, topic, different))
    if changed:
        admin.alter_configs(changed)
