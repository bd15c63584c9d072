"""Stage validate: builds the training set, looks at it, and leaves it as arrays for the stages that follow.

A run that is made again reads the same table versions and definitions as the first one and must get the same digest.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from common import FEATURE_SERVICE, LABEL, Floats, Period, Stage, write_json
from metrics import auc
from millrace import Client
from millrace_api.feature.v1.feature_pb2 import TrainingSet

ENTITY_CONTRACT = "flights"
SUBJECT = "flight_id"
FEWEST_ROWS = 2_000
LABEL_RATES = (0.05, 0.6)
# A single feature that tells late flights from punctual ones this well knows the answer.
LEAK_AUC = 0.9
LEAK_ROWS = 20_000


def main() -> None:
    """Build or rebuild, check, write."""
    stage = Stage.from_environment()
    period = stage.period()
    with Client.from_environment() as client:
        made = _rebuilt(stage, client) if stage.reproduction_of else _built(client, period)
        table = client.features.load_training_set(made)
    names = list(made.feature_names)
    table = table.sort_by([("event_time", "ascending"), (SUBJECT, "ascending")])
    labels = np.asarray(pc.cast(table[LABEL], pa.float32()).to_numpy(), dtype=np.float32)
    features = matrix(table, names)
    split = int(np.searchsorted(_instants(table), np.datetime64(period.split.replace(tzinfo=None), "us")))
    problems = check(table, names, features, labels, split)
    if problems:
        stage.refuse("; ".join(problems))
    np.save(stage.output / "features.npy", features)
    np.save(stage.output / "labels.npy", labels)
    (stage.output / "training_set.binpb").write_bytes(made.SerializeToString(deterministic=True))
    write_json(
        stage.output / "schema.json",
        {"feature_names": names, "train_rows": split, "rows": len(labels), "training_set_digest": made.digest},
    )
    rate = float(labels.mean())
    print(
        f"{len(labels)} rows x {len(names)} features, {rate:.1%} late, {np.isnan(features).mean():.1%} missing",
        flush=True,
    )
    stage.result(
        rows=len(labels),
        train_rows=split,
        features=len(names),
        label_rate=round(rate, 4),
        training_set_digest=made.digest,
        definitions_hash=made.definitions_hash,
        table_versions=[{"table": t.table, "version": t.version} for t in made.table_versions],
    )


def _built(client: Client, period: Period) -> TrainingSet:
    return client.features.build_training_set(
        feature_service=FEATURE_SERVICE,
        entity_contract=ENTITY_CONTRACT,
        label_contract="outcomes",
        join_column=SUBJECT,
        label_column=LABEL,
        start=period.start,
        end=period.end,
        known_at=period.known_at,
    )


def _rebuilt(stage: Stage, client: Client) -> TrainingSet:
    wanted = client.training.run(stage.reproduction_of).record.training_set_digest
    first = client.features.training_set(wanted)
    request = type(first.request)()
    request.CopyFrom(first.request)
    del request.table_versions[:]
    request.table_versions.extend(first.table_versions)
    request.definitions_hash = first.definitions_hash
    made = client.features.rebuild_training_set(request)
    if made.digest != wanted:
        stage.refuse(f"the training set built again is {made.digest}, the first was {wanted}")
    print(f"built again from the same tables and definitions: {made.digest}", flush=True)
    return made


def matrix(table: pa.Table, names: list[str]) -> Floats:
    """The features as an array of shape (rows, N), NaN for null."""
    features = np.empty((table.num_rows, len(names)), dtype=np.float32)
    for place, name in enumerate(names):
        column = pc.cast(table[name], pa.float64(), safe=False)
        features[:, place] = column.fill_null(float("nan")).to_numpy()
    return features


def check(table: pa.Table, names: list[str], features: Floats, labels: Floats, split: int) -> list[str]:
    """What is wrong with the rows; empty when nothing is."""
    problems = []
    if not FEWEST_ROWS <= split < len(labels):
        problems.append(f"{split} of {len(labels)} rows are before the split, needed are {FEWEST_ROWS} and some after")
    if pc.count_distinct(table[SUBJECT]).as_py() != table.num_rows:
        problems.append(f"{SUBJECT} is not unique")
    rate = float(labels.mean()) if len(labels) else 0.0
    if not LABEL_RATES[0] <= rate <= LABEL_RATES[1]:
        problems.append(
            f"{rate:.1%} of the rows are late, which is outside {LABEL_RATES[0]:.0%} to {LABEL_RATES[1]:.0%}"
        )
    problems.extend(
        f"{name} is infinite somewhere" for name in _named(names, np.asarray(np.isinf(features).any(axis=0)))
    )
    problems.extend(
        f"{name} is missing in every row" for name in _named(names, np.asarray(np.isnan(features).all(axis=0)))
    )
    problems.extend(
        f"{name} alone has AUC {value:.3f}: it knows the answer" for name, value in leaks(names, features, labels)
    )
    return problems


def leaks(names: list[str], features: Floats, labels: Floats) -> list[tuple[str, float]]:
    """Features that alone separate the labels better than anything known at departure can."""
    step = max(1, len(labels) // LEAK_ROWS)
    sample, truth = features[::step], labels[::step].astype(np.float64)
    found = []
    for place, name in enumerate(names):
        values = sample[:, place].astype(np.float64)
        known = ~np.isnan(values)
        if 0 < truth[known].sum() < known.sum():
            # Over every row, with the unknown in the middle: a feature that is rarely known may well be sure when it is (an
            # aircraft that landed far away within the hour cannot be back in time); one that leaks is known everywhere.
            value = auc(truth, np.where(known, values, np.median(values[known])))
            if max(value, 1 - value) > LEAK_AUC:
                found.append((name, value))
    return found


def _named(names: list[str], which: npt.NDArray[np.bool_]) -> list[str]:
    return [name for name, chosen in zip(names, which, strict=True) if chosen]


def _instants(table: pa.Table) -> npt.NDArray[np.datetime64]:
    return np.asarray(pc.cast(table["event_time"], pa.timestamp("us")).to_numpy(), dtype="datetime64[us]")


if __name__ == "__main__":
    main()
