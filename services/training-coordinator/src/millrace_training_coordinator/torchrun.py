"""How a stage's command is started, alone or under torchrun; the same on one machine and in a pod."""

import sys
from collections.abc import Sequence
from pathlib import Path

from millrace_training_coordinator import ranks

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_MAX_THREADS")


def command_line(command: Sequence[str], workers: int, rendezvous: Sequence[str], scratch: Path) -> list[str]:
    """The command as it is started: `python` replaced by this interpreter, torchrun in front of a distributed one.

    Args:
        command: as in the manifest.
        workers: processes on this machine or in this pod; 0 starts the command itself.
        rendezvous: torchrun's options by which several machines meet.
        scratch: folder for torchrun's files.
    """
    own = [sys.executable, *command[1:]] if command[0] == "python" else list(command)
    if not workers:
        return own
    # Workers write to files of their own, which torchrun copies line by line with the rank in front: on one shared pipe
    # their lines would run into each other.
    own_logs = ["--tee", "3", "--log-dir", str(scratch / "torchrun")]
    start = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--max-restarts", "0", *own_logs]
    # torchrun makes every exit code 1; each worker's parent writes the true one down.
    return [*start, "--nproc-per-node", str(workers), "--no-python", sys.executable, "-I", ranks.__file__, *own]
