"""The network and its training, data-parallel over the processes that torchrun started."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from common import Doubles, Floats, Places
from encoding import Encoding
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

EMBEDDING = 8
# Share of the steps in which the learning rate rises.
WARM_UP = 0.15


@dataclass(frozen=True)
class Choice:
    """What the search decides."""

    learning_rate: float
    dropout: float
    weight_decay: float


@dataclass(frozen=True)
class Rows:
    """Encoded rows of one process."""

    numbers: Floats
    places: Places
    labels: Floats


class Network(nn.Module):  # type: ignore[misc]  # torch is not followed
    """Embeddings beside encoded numbers, then fully connected layers with SiLU; gives a logit a row."""

    def __init__(self, encoding: Encoding, hidden: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(int(rows), EMBEDDING) for rows in encoding.vocabulary])
        widths = [encoding.width + EMBEDDING * len(encoding.vocabulary), *hidden]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])
        self.last = nn.Linear(widths[-1], 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, numbers: Tensor, places: Tensor) -> Tensor:
        """Logits, shape (rows,), of numbers (rows, width) and places (rows, codes)."""
        embedded = [embedding(places[:, i]) for i, embedding in enumerate(self.embeddings)]
        state = torch.cat([numbers, *embedded], dim=1)
        for layer in self.layers:
            state = self.dropout(nn.functional.silu(layer(state)))
        logits: Tensor = self.last(state)[:, 0]
        return logits

    def arrays(self) -> dict[str, Floats]:
        """Weights by name: `embedding.<i>`, `layer.<i>.weight` (in, out), `layer.<i>.bias`; the last layer is the last."""
        named = {f"embedding.{i}": e.weight for i, e in enumerate(self.embeddings)}
        for i, layer in enumerate([*self.layers, self.last]):
            named |= {f"layer.{i}.weight": layer.weight.T, f"layer.{i}.bias": layer.bias}
        return {name: weight.detach().contiguous().numpy() for name, weight in named.items()}


def set_up(seed: int) -> None:
    """Make this process's arithmetic a function of `seed` alone."""
    torch.set_num_threads(1)
    # The same switch as `use_deterministic_algorithms(True)`, which would import the compiler (5 s) to tell it.
    torch.set_deterministic_debug_mode("error")
    torch.manual_seed(seed)


def fit(
    encoding: Encoding,
    hidden: tuple[int, ...],
    choice: Choice,
    rows: Rows,
    *,
    seed: int,
    epochs: int,
    batch: int,
    on_epoch: Callable[[int, float, Network], None] | None = None,
) -> Network:
    """Train on every process's rows: AdamW, one-cycle learning rate, gradients averaged by gloo.

    Args:
        encoding: gives the network's widths.
        hidden: widths of the hidden layers.
        choice: hyper-parameters.
        rows: this process's; all processes take as many steps as the one with the fewest rows allows.
        seed: of the first weights, the order of rows and the dropout.
        epochs: passes over the rows.
        batch: rows a step and process.
        on_epoch: told the epoch (from 1), this process's mean loss and the network.
    """
    torch.manual_seed(seed)
    network = Network(encoding, hidden, choice.dropout)
    parallel = DistributedDataParallel(network)
    rank = dist.get_rank()
    torch.manual_seed(seed * 1000 + rank + 1)  # each process drops out its own units
    fewest = torch.tensor(len(rows.labels))
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    batch = min(batch, int(fewest))
    steps = int(fewest) // batch
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=choice.learning_rate, weight_decay=choice.weight_decay, foreach=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, choice.learning_rate, total_steps=steps * epochs, pct_start=WARM_UP
    )
    loss_of = nn.BCEWithLogitsLoss()
    numbers, places, labels = (torch.from_numpy(part) for part in (rows.numbers, rows.places, rows.labels))
    for epoch in range(1, epochs + 1):
        parallel.train()
        order = torch.from_numpy(np.random.default_rng([seed, epoch, rank]).permutation(len(rows.labels)))
        total = 0.0
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            optimizer.zero_grad()
            loss = loss_of(parallel(numbers[chosen], places[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if on_epoch is not None:
            on_epoch(epoch, total / steps, network)
    return network


def predict(network: Network, numbers: Floats, places: Places) -> Doubles:
    """Probabilities, shape (rows,)."""
    network.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(numbers), 8192):
            part = slice(start, start + 8192)
            logits = network(torch.from_numpy(numbers[part]), torch.from_numpy(places[part]))
            parts.append(torch.sigmoid(logits.double()).numpy())
    return np.concatenate(parts)


def mean_over_processes(value: float, weight: float) -> float:
    """Weighted mean of every process's value."""
    sums = torch.tensor([value * weight, weight], dtype=torch.float64)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def since(began: float) -> str:
    """Seconds since a monotonic instant, to print."""
    return f"{time.monotonic() - began:.1f} s"
