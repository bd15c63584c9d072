"""Stage train_a, train_b: one variant of the network, searched and trained by two processes.

Rank 0 asks Optuna for hyper-parameters, both processes train each trial on a part of the rows, rank 0 tells Optuna the loss on the last
tenth of the training time. Then the whole training time is learnt with the best. Same seed, same rows, same machine: same bytes.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from common import Dataset, Floats, Places, Stage, write_json
from encoding import Encoding, encode, fit
from metrics import figures
from network import Choice, Network, Rows, mean_over_processes, predict, set_up, since
from network import fit as train

if TYPE_CHECKING:  # rank 0 alone imports it
    import optuna

BATCH = 512
TRIAL_ROWS = 20_000
TRIAL_TAIL_ROWS = 6_000
# The last share of the training time scores the trials.
TAIL = 0.1


@dataclass(frozen=True)
class Variant:
    """An architecture and where its search starts."""

    hidden: tuple[int, ...]
    bins: int
    """Quantile bins a number; 0 reads the numbers alone."""
    start: Choice


VARIANTS = {
    "a": Variant((192, 96), 6, Choice(3e-3, 0.3, 0.02)),
    "b": Variant((128, 64, 32), 4, Choice(3e-3, 0.2, 0.02)),
}


def main() -> None:
    """Search, train, and let rank 0 write the model, its metrics and its held-out predictions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    variant = VARIANTS[parser.parse_args().variant]
    stage = Stage.from_environment()
    dist.init_process_group("gloo")
    try:
        _run(stage, variant)
    finally:
        dist.destroy_process_group()


def _run(stage: Stage, variant: Variant) -> None:
    began = time.monotonic()
    set_up(stage.seed)
    data = Dataset.load(stage.inputs["validate"])
    columns = data.columns(stage.parameters.get("columns", "all"))
    encoding = fit(data.features[: data.split], data.names, columns, variant.bins)
    rows = _rows(encoding, data, np.arange(dist.get_rank(), data.split, dist.get_world_size()))
    _say(f"{data.split} rows, {len(columns)} features encoded to {encoding.width} numbers in {since(began)}")
    choice, trials = _search(stage, variant, encoding, rows)
    _say(f"chosen of {len(trials)} trials after {since(began)}: {asdict(choice)}")
    losses: list[float] = []

    def on_epoch(epoch: int, loss: float, network: Network) -> None:
        losses.append(mean_over_processes(loss, 1.0))
        if dist.get_rank() == 0:
            checkpoints = stage.output / "checkpoints"
            checkpoints.mkdir(exist_ok=True)
            _save(checkpoints / f"epoch-{epoch}.npz", encoding, network)
        _say(f"epoch {epoch}: loss {losses[-1]:.4f} after {since(began)}")

    epochs = int(stage.number("epochs", 4))
    network = train(
        encoding, variant.hidden, choice, rows, seed=stage.seed, epochs=epochs, batch=BATCH, on_epoch=on_epoch
    )
    if dist.get_rank() != 0:
        return
    held_out = _rows(encoding, data, np.arange(data.split, len(data.labels)))
    scores = predict(network, held_out.numbers, held_out.places)
    measured = figures(held_out.labels.astype(np.float64), scores)
    np.save(stage.output / "heldout.npy", scores)
    _save(stage.output / "model.npz", encoding, network)
    write_json(
        stage.output / "metrics.json",
        {"figures": measured, "losses": losses, "choice": asdict(choice), "trials": trials, "hidden": variant.hidden},
    )
    stage.result(auc=round(measured["auc"], 4), accuracy=round(measured["accuracy"], 4), **asdict(choice))


def _rows(encoding: Encoding, data: Dataset, chosen: Places) -> Rows:
    numbers, places = encode(encoding, data.features[chosen])
    labels: Floats = np.ascontiguousarray(data.labels[chosen], dtype=np.float32)
    return Rows(numbers, places, labels)


def _search(stage: Stage, variant: Variant, encoding: Encoding, rows: Rows) -> tuple[Choice, list[dict[str, float]]]:
    """The choice with the least loss on the tail; the variant's own start is always the first trial."""
    count = int(stage.number("trials", 4))
    if count < 1:
        return variant.start, []
    border = int(len(rows.labels) * (1 - TAIL))
    world = dist.get_world_size()
    part = _part(rows, 0, border, TRIAL_ROWS // world)
    tail = _part(rows, border, len(rows.labels), TRIAL_TAIL_ROWS // world)
    study = _study(stage.seed, variant.start) if dist.get_rank() == 0 else None
    trials: list[dict[str, float]] = []
    for _ in range(count):
        trial = study.ask() if study is not None else None
        asked = [_suggest(trial) if trial is not None else variant.start]
        dist.broadcast_object_list(asked)
        choice = asked[0]
        network = train(encoding, variant.hidden, choice, part, seed=stage.seed, epochs=1, batch=BATCH // 2)
        scores = predict(network, tail.numbers, tail.places)
        loss = mean_over_processes(figures(tail.labels.astype(np.float64), scores)["log_loss"], len(scores))
        if study is not None:
            study.tell(trial, loss)
        trials.append({**asdict(choice), "log_loss": loss})
    best = min(trials, key=lambda one: one["log_loss"])
    return Choice(best["learning_rate"], best["dropout"], best["weight_decay"]), trials


def _part(rows: Rows, start: int, end: int, most: int) -> Rows:
    """At most `most` rows at even distances."""
    step = slice(start, end, max(1, -(-(end - start) // max(1, most))))
    return Rows(rows.numbers[step], rows.places[step], rows.labels[step])


def _study(seed: int, start: Choice) -> "optuna.Study":
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=2))
    study.enqueue_trial(asdict(start))
    return study


def _suggest(trial: "optuna.Trial") -> Choice:
    return Choice(
        trial.suggest_float("learning_rate", 1.5e-3, 6e-3, log=True),
        trial.suggest_float("dropout", 0.1, 0.4),
        trial.suggest_float("weight_decay", 1e-4, 0.3, log=True),
    )


def _save(path: Path, encoding: Encoding, network: Network) -> None:
    arrays: dict[str, Any] = {f"encoding.{name}": value for name, value in asdict(encoding).items()}
    np.savez(path, **(arrays | network.arrays()))


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
