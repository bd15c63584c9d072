"""Steps 1 to 4: records, features, training, registry."""

import json

import flights as data
import yaml
from millrace.contracts import load_contract
from millrace.feast_repo import registry_from_repo
from millrace.packing import pack_folder
from millrace_api.ingestion.v1.ingestion_pb2 import RecordBatch
from millrace_api.registry.v1 import registry_pb2
from millrace_api.training.v1 import training_pb2

from loop.common import ACTOR, HISTORY_START, PIPELINE, SAMPLE, SERVING_START, Loop, wait_for_features
from loop.replay import CONTRACTS, FEATURE_SERVICE, MODEL, months

STAGES = (registry_pb2.STAGE_TESTING, registry_pb2.STAGE_STAGING, registry_pb2.STAGE_PRODUCTION)


def ingest(loop: Loop) -> None:
    """Step 1: contracts, half a year of records, and some broken ones."""
    client, story = loop.client, loop.story
    for path in sorted((SAMPLE / "contracts").glob("*.yaml")):
        contract = client.ingestion.register_contract(load_contract(path))
        story.say(
            f"contract {contract.name} version {contract.version}",
            f"{len(contract.columns)} columns, checked row by row",
        )
    landed = write_months(loop, 1, 6)
    expected: dict[tuple[str, str], int] = {}
    for contract_name, lines, reasons in data.malformed():
        payload = "\n".join(lines).encode()
        answer = client.ingestion.write(
            RecordBatch(contract=contract_name, source="broken", offset=1, json_lines=payload)
        )
        story.expect(answer.accepted == 0, f"none of the broken {contract_name} rows lands")
        for reason in reasons:
            expected[contract_name, reason] = expected.get((contract_name, reason), 0) + 1
    counted = {(c.contract, c.reason): c.count for c in client.ingestion.count_dead_letters()}
    story.expect(counted == expected, f"dead letters {expected}, counted {counted}")
    said = ", ".join(f"{contract} {reason} {count}" for (contract, reason), count in sorted(counted.items()))
    story.say(
        f"{sum(counted.values())} broken rows are in dead letters: {said}",
        "each with its reason; none is lost, none is in the lake",
    )
    story.keep("data", "records landed, January to June", f"{landed:,}")
    story.keep("data", "dead letters", said)


def write_months(loop: Loop, first: int, last: int) -> int:
    """Write whole months of every contract in bulk; returns how many records landed."""
    landed = 0
    with loop.story.progress("ingest", (last - first + 1) * len(CONTRACTS)) as bar:
        for begin, end in months(first, last):
            for contract in CONTRACTS:
                table = getattr(data, contract)(begin, end)
                source = f"bulk-{begin:%Y-%m-%d}"
                accepted = sum(a.accepted for a in loop.client.ingestion.write_table(contract, table, source=source))
                loop.story.expect(accepted == table.num_rows, f"every {contract} record of {begin:%B} lands")
                landed += accepted
                bar.advance()
    for contract in CONTRACTS:
        table_info = loop.client.ingestion.table(contract)
        loop.story.say(f"{contract}: {table_info.rows:,} rows at Delta version {table_info.table.version}")
    return landed


def define_features(loop: Loop) -> None:
    """Step 2: definitions, online values, a point-in-time training set."""
    client, story = loop.client, loop.story
    project, registry = registry_from_repo(SAMPLE / "feature_repo")
    applied = client.features.apply(project, registry)
    service = next(s for s in client.features.definitions().feature_services if s.name == FEATURE_SERVICE)
    story.say(
        f"feature service {service.name}: {len(service.features)} features",
        f"definitions {applied.definitions_hash[:16]}",
    )
    wait_for_features(client)
    progress = client.features.progress()
    records = sum(contract.records for contract in progress.contracts)
    story.say(f"online store follows {records:,} records, {progress.entities:,} entities")
    with story.progress("training set", None):
        made = client.features.build_training_set(
            feature_service=FEATURE_SERVICE, entity_contract="flights", label_contract="outcomes", join_column="flight_id",
            label_column="late", start=HISTORY_START, end=SERVING_START, known_at=SERVING_START,
        )  # fmt: skip
    versions = ", ".join(f"{t.table}@{t.version}" for t in made.table_versions)
    story.say(f"training set {made.digest[:16]}: {made.rows:,} rows", f"point in time, from {versions}")
    story.keep(
        "data", "training set", f"{made.rows:,} rows x {len(made.feature_names)} features, digest {made.digest[:16]}"
    )


def register_pipeline(loop: Loop, *, retrain: bool) -> None:
    """Hand the pipeline and its code to the coordinator, with or without its policy of retraining on drift."""
    folder = SAMPLE / "training"
    manifest = yaml.safe_load((folder / "pipeline.yaml").read_text())
    if not retrain:
        del manifest["retrain"]
    registered = loop.client.training.register_pipeline(yaml.safe_dump(manifest, sort_keys=False), pack_folder(folder))
    policy = "retrains on drift" if retrain else "retraining on drift is switched on in step 8"
    loop.story.say(f"pipeline {registered.name}: {policy}", f"manifest and code {registered.pipeline_hash[:16]}")


def train(loop: Loop, version: str, columns: str, *, fail_once: str = "") -> training_pb2.Run:
    """Run the pipeline for one version and tell what its stages do."""
    client, story = loop.client, loop.story
    parameters = {"version": version, "columns": columns, "fail_once": fail_once}
    handle = client.training.start(PIPELINE, parameters, cause=f"demo: train {version}")
    run = follow(loop, handle.id)
    story.expect(run.state == training_pb2.RUN_STATE_SUCCEEDED, f"the run for {version} succeeds ({_failures(run)})")
    made = client.registry.version(MODEL, version)
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in sorted(made.metrics.items()))
    story.say(
        f"{MODEL} {version} is registered: {metrics}",
        f"digest {made.digest[:16]}, training set {made.lineage.training_set_digest[:16]}",
    )
    story.keep("versions", f"{version} ({columns} features)", metrics)
    return run


def follow(loop: Loop, run_id: str) -> training_pb2.Run:
    """Watch a run and print every change of a stage; returns it as it ended."""
    seen: dict[str, tuple[int, int]] = {}
    with loop.story.progress("training", None) as bar:
        for event in loop.client.training.handle(run_id).watch():
            if event.HasField("log"):
                bar.show(f"{event.log.stage}: {event.log.text[:70]}")
                continue
            for stage in event.run.stages:
                if seen.get(stage.name) == (stage.state, stage.attempts):
                    continue
                seen[stage.name] = (stage.state, stage.attempts)
                _tell_stage(loop, stage)
    return loop.client.training.run(run_id)


def _tell_stage(loop: Loop, stage: training_pb2.StageRun) -> None:
    match stage.state:
        case training_pb2.STAGE_STATE_RETRYING:
            loop.story.say(f"stage {stage.name}: attempt {stage.attempts} failed, tries again", stage.failure)
        case training_pb2.STAGE_STATE_SUCCEEDED:
            seconds = stage.finished_at.ToNanoseconds() - stage.started_at.ToNanoseconds()
            result = json.loads(stage.result_json or "{}")
            said = ", ".join(
                f"{k} {v}" for k, v in result.items() if isinstance(v, str | int | float) and len(str(v)) < 40
            )
            loop.story.say(f"stage {stage.name}: done in {seconds / 1e9:.1f} s (attempt {stage.attempts})", said[:160])
        case training_pb2.STAGE_STATE_FAILED:
            loop.story.say(f"stage {stage.name}: failed", stage.failure)


def _failures(run: training_pb2.Run) -> str:
    return "; ".join(f"{stage.name}: {stage.failure}" for stage in run.stages if stage.failure) or "no reason given"


def train_first(loop: Loop) -> None:
    """Step 3: the first version, with a stage that fails once on purpose."""
    register_pipeline(loop, retrain=False)
    run = train(loop, "1.0.0", "base", fail_once="evaluate")
    retried = next(stage for stage in run.stages if stage.name == "evaluate")
    loop.story.expect(retried.attempts == 2, "the stage that failed once was tried a second time")


def promote_in_registry(loop: Loop, version: str) -> None:
    """Testing, Staging, Production, with an approval on record for the last."""
    client, story = loop.client, loop.story
    client.registry.approve(
        MODEL, version, registry_pb2.STAGE_PRODUCTION, actor="reviewer", comment="metrics and lineage looked at"
    )
    for stage in STAGES:
        moved = client.registry.transition(MODEL, version, stage, actor=ACTOR)
    approvals = ", ".join(f"{a.actor}: {a.comment}" for a in moved.approvals)
    story.say(f"{MODEL} {version}: Development → Testing → Staging → Production", f"approved by {approvals}")


def register_first(loop: Loop) -> None:
    """Step 4: the registry's record of 1.0.0 and its way to Production."""
    made = loop.client.registry.version(MODEL, "1.0.0")
    loop.story.expect(made.stage == registry_pb2.STAGE_DEVELOPMENT, "a new version starts in Development")
    loop.story.expect(bool(made.lineage.run_id and made.lineage.training_set_digest), "the version has its lineage")
    promote_in_registry(loop, "1.0.0")
    loop.story.expect(loop.client.registry.version(MODEL).version == "1.0.0", "1.0.0 is the version in Production")
