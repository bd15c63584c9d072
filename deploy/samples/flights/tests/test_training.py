"""The stages' own code on a small made-up set: figures, checks, networks, the ONNX graph, and same seed, same bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import encoding
import gate
import metrics
import network
import numpy as np
import pyarrow as pa
import pytest
import torch.distributed as dist
import validation
from common import Dataset, Stage, write_json
from export import run
from graph import build
from register import next_version
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

SAMPLE = Path(__file__).resolve().parents[1]
NAMES = [
    "schedule__carrier_code", "schedule__dest_code", "schedule__minute_of_day", "origin_weather__temp", "origin_weather__wind_gust",
    "origin_delays__arr_delay_mean_1h", "origin_delays__arr_delay_count_1h", "tail_delays__arr_delay_max_7d",
]  # fmt: skip


def made_up(rows: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    features = np.column_stack(
        [
            draw.integers(-1, 16, rows),
            draw.integers(-1, 105, rows),
            draw.integers(0, 1440, rows),
            draw.normal(60, 20, rows),
            np.where(draw.random(rows) < 0.7, np.nan, draw.normal(25, 5, rows)),
            np.where(draw.random(rows) < 0.1, np.nan, draw.normal(10, 30, rows)),
            draw.poisson(20, rows),
            draw.normal(50, 40, rows),
        ]
    ).astype(np.float32)
    score = 0.05 * np.nan_to_num(features[:, 5]) + 0.002 * features[:, 2] + (features[:, 0] % 3) - 3
    return features, (draw.random(rows) < 1 / (1 + np.exp(-score))).astype(np.float32)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fitted(seed: int, bins: int = 4) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    features, labels = made_up(3000)
    network.set_up(seed)
    fit = encoding.fit(features, NAMES, np.arange(len(NAMES)), bins)
    numbers, places = encoding.encode(fit, features)
    choice = network.Choice(5e-3, 0.1, 0.01)
    net = network.fit(fit, (16, 8), choice, network.Rows(numbers, places, labels), seed=seed, epochs=3, batch=100)
    arrays = {f"encoding.{name}": value for name, value in vars(fit).items()} | net.arrays()
    return arrays, features, network.predict(net, numbers, places)


def test_figures_agree_with_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    labels = (draw.random(2000) < 0.3).astype(np.float64)
    scores = np.round(np.clip(draw.normal(0.3 + 0.2 * labels, 0.2), 0.01, 0.99), 2)  # ties on purpose
    found = metrics.figures(labels, scores)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found["brier"] == pytest.approx(brier_score_loss(labels, scores))
    assert found["log_loss"] == pytest.approx(log_loss(labels, scores))
    assert found["accuracy"] == np.mean((scores >= 0.5) == labels)
    assert sum(row["weight"] for row in metrics.calibration(labels, scores)) == pytest.approx(1)


def test_the_network_learns_and_onnx_answers_as_torch(alone: None) -> None:
    arrays, features, scores = fitted(7)
    assert metrics.auc(made_up(3000)[1].astype(np.float64), scores) > 0.8
    answers = run(build([arrays], NAMES), features)
    assert np.max(np.abs(answers - scores)) < 1e-5


def test_two_members_are_the_mean_of_their_logits(alone: None) -> None:
    (first, features, a), (second, _, b) = fitted(7), fitted(8, bins=0)
    logits = (np.log(a / (1 - a)) + np.log(b / (1 - b))) / 2
    answers = run(build([first, second], NAMES), features)
    assert np.max(np.abs(answers - 1 / (1 + np.exp(-logits)))) < 1e-5


def test_onnx_takes_whatever_a_client_may_send(alone: None) -> None:
    arrays, features, _ = fitted(7)
    odd = np.repeat(features[:1], 6, axis=0)
    odd[0] = np.nan
    odd[1] = np.inf
    odd[2] = -np.inf
    odd[3] = np.finfo(np.float32).max
    odd[4, :2] = 1e9
    odd[5, :2] = -7.5
    answers = run(build([arrays], NAMES), odd)
    assert np.all((answers >= 0) & (answers <= 1))


def test_same_seed_same_bytes_and_another_seed_others(alone: None) -> None:
    first, again, other = (build([fitted(seed)[0]], NAMES) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def table(rows: int = 3000) -> pa.Table:
    features, labels = made_up(rows)
    columns = {"event_time": pa.array(np.arange(rows) * 60_000_000, pa.timestamp("us", tz="UTC"))}
    columns["flight_id"] = pa.array([str(i) for i in range(rows)])
    columns |= {name: pa.array(features[:, i], from_pandas=True) for i, name in enumerate(NAMES)}
    return pa.table(columns | {"late": labels.astype(bool)})


def test_validate_accepts_a_good_set_and_names_what_is_wrong_with_a_bad_one() -> None:
    good = table()
    labels = np.asarray(good["late"].to_numpy(), dtype=np.float32)
    features = validation.matrix(good, NAMES)
    assert np.isnan(features[:, 4]).any()
    assert validation.check(good, NAMES, features, labels, 2500) == []
    leaking = features.copy()
    leaking[:, 6] = labels * 10 + features[:, 6] * 0.1
    leaking[:, 3] = np.nan
    leaking[5, 7] = np.inf
    twice = good.set_column(1, "flight_id", pa.array(["same"] * good.num_rows))
    problems = "; ".join(validation.check(twice, NAMES, leaking, labels, 100))
    for part in ("100 of 3000 rows", "not unique", "count_1h alone", "temp is missing", "max_7d is infinite"):
        assert part in problems
    assert "are late" in validation.check(good, NAMES, features, np.zeros_like(labels), 2500)[0]


def test_the_gate_judges() -> None:
    good = {"auc": 0.8, "ece": 0.02}
    assert gate.judge(good, 0.76, 0.1, None) == []
    assert gate.judge(good, 0.76, 0.1, 0.82) == []
    assert len(gate.judge({"auc": 0.7, "ece": 0.2}, 0.76, 0.1, 0.82)) == 3


def test_a_retrained_model_is_the_next_free_patch() -> None:
    assert next_version([], "") == "1.0.0"
    assert next_version(["1.0.0"], "") == "1.0.1"
    assert next_version(["1.3.0", "1.2.0", "1.1.1", "1.1.0", "1.0.0"], "1.1.0") == "1.1.2"
    assert next_version(["1.2.0-rc.1", "1.1.0"], "1.1.0") == "1.1.1"


def environment(folder: Path, name: str, **parameters: str) -> dict[str, str]:
    output = folder / name
    output.mkdir(exist_ok=True)
    given = {"columns": "all", "epochs": "1", "trials": "2"} | parameters
    inputs = {done.name: str(done) for done in folder.iterdir() if done.is_dir()}
    return dict(
        os.environ,
        MILLRACE_RUN_ID="run", MILLRACE_STAGE=name, MILLRACE_ATTEMPT="1", MILLRACE_SEED="3", MILLRACE_OUTPUT_DIR=str(output),
        MILLRACE_INPUTS=json.dumps(inputs), MILLRACE_PARAMETERS=json.dumps(given), OMP_NUM_THREADS="1",
    )  # fmt: skip


def stage(monkeypatch: pytest.MonkeyPatch, folder: Path, **parameters: str) -> Stage:
    for name, value in environment(folder, "evaluate", **parameters).items():
        monkeypatch.setenv(name, value)
    return Stage.from_environment()


def test_a_stage_fails_once_when_told_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        stage(monkeypatch, tmp_path, fail_once="evaluate")
    assert ended.value.code == 75
    monkeypatch.setenv("MILLRACE_ATTEMPT", "2")
    assert Stage.from_environment().attempt == 2


def test_the_period_holds_out_the_last_days(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {"train_start": "2013-01-01T00:00:00Z", "train_end": "2013-07-01T00:00:00Z"}
    period = stage(monkeypatch, tmp_path, **given, holdout_days="14").period()
    assert (period.split.isoformat(), period.end.isoformat()) == (
        "2013-06-17T00:00:00+00:00",
        "2013-07-01T00:00:00+00:00",
    )
    assert period.known_at == period.end
    period = stage(monkeypatch, tmp_path, **given, test_end="2013-08-01T00:00:00Z").period()
    assert (period.split.month, period.end.month) == (7, 8)
    with pytest.raises(SystemExit) as ended:
        stage(monkeypatch, tmp_path, **(given | {"train_end": "tomorrow"})).period()
    assert ended.value.code == 78


@pytest.mark.slow
def test_two_workers_train_evaluate_and_export(tmp_path: Path) -> None:
    """The stages as the coordinator starts them, and the bytes of the model a second time."""
    features, labels = made_up(6000)
    ready = tmp_path / "validate"
    ready.mkdir()
    np.save(ready / "features.npy", features)
    np.save(ready / "labels.npy", labels)
    write_json(ready / "schema.json", {"feature_names": NAMES, "train_rows": 5000})
    assert list(Dataset.load(ready).columns("base")) == [0, 1, 2, 3, 4]

    def start(name: str, *command: str) -> None:
        env = environment(tmp_path, name)
        subprocess.run([sys.executable, *command], cwd=SAMPLE / "training", env=env, check=True, timeout=200)

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", "--variant")
    for variant in "ab":
        start(f"train_{variant}", *torchrun, variant)
    first = (tmp_path / "train_b" / "model.npz").read_bytes()
    start("train_b", *torchrun, "b")
    assert (tmp_path / "train_b" / "model.npz").read_bytes() == first
    start("evaluate", "evaluate.py")
    evaluation = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())
    assert evaluation["candidates"][evaluation["chosen"]]["auc"] > 0.75
    start("export", "export.py")
    predicted = np.load(tmp_path / "evaluate" / "predictions.npy")
    assert np.max(np.abs(run((tmp_path / "export" / "model.onnx").read_bytes(), features[5000:]) - predicted)) < 1e-4
