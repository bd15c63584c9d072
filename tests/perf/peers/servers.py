"""The contestants' servers, each its own processes, while a context is open."""

import contextlib
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from parts.server import free_port

from tests.perf.peers.environments import HERE, environment

READY_S = 180.0


@contextlib.contextmanager
def process(command: Sequence[str], log: Path, env: dict[str, str], folder: Path | None = None) -> Iterator[int]:
    """A process while the context is open; yields its id."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env={**clean, **env}, cwd=folder) as child,
    ):
        try:
            yield child.pid
        finally:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


def ready(url: str, log: Path) -> None:
    """Wait until that page is there."""
    deadline = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url}\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)


@contextlib.contextmanager
def mlserver(folder: Path, kind: str, env: dict[str, str]) -> Iterator[tuple[str, str, int]]:
    """MLServer with one model of `mlserver_models` in its own process, no pool of workers; yields HTTP and gRPC address and process id."""
    home = folder / f"mlserver-{kind}"
    home.mkdir()
    http, rpc = free_port(), free_port()
    settings = {
        "host": "127.0.0.1", "http_port": http, "grpc_port": rpc, "metrics_port": free_port(), "parallel_workers": 0, "debug": False,
        "access_log": False, "logging_settings": None,
    }  # fmt: skip
    (home / "settings.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    model = {"name": "peer", "implementation": f"mlserver_models.{kind}"}
    (home / "model-settings.json").write_text(json.dumps(model))
    (home / "mlserver_models.py").write_bytes((HERE / "mlserver_models.py").read_bytes())
    log = folder / f"mlserver-{kind}.log"
    command = [str(environment("mlserver") / "mlserver"), "start", str(home)]
    with process(command, log, {**env, "PYTHONPATH": str(home)}) as pid:
        ready(f"http://127.0.0.1:{http}/v2/models/peer/ready", log)
        yield f"127.0.0.1:{http}", f"127.0.0.1:{rpc}", pid


@contextlib.contextmanager
def bentoml(folder: Path, env: dict[str, str]) -> Iterator[tuple[str, int]]:
    """BentoML with the model; yields address and process id."""
    port, log = free_port(), folder / "bentoml.log"
    home = folder / "bentoml-home"
    home.mkdir()
    command = [
        str(environment("bentoml") / "bentoml"),
        "serve",
        "bentoml_service:Onnx",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    quiet = {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "1"}
    with process(command, log, {**env, **quiet}, HERE) as pid:
        ready(f"http://127.0.0.1:{port}/readyz", log)
        yield f"127.0.0.1:{port}", pid


@contextlib.contextmanager
def kserve(folder: Path, predictor: str, model: str, env: dict[str, str]) -> Iterator[tuple[str, int]]:
    """KServe's transformer before a V2 server at its HTTP address; yields address and process id."""
    port, log = free_port(), folder / "kserve.log"
    command = [
        str(environment("kserve") / "python"), str(HERE / "kserve_transformer.py"), "--model_name", model, "--predictor_host", predictor,
        "--predictor_protocol", "v2", "--http_port", str(port), "--enable_grpc", "false",
    ]  # fmt: skip
    with process(command, log, env) as pid:
        ready(f"http://127.0.0.1:{port}/v2/models/{model}/ready", log)
        yield f"127.0.0.1:{port}", pid
