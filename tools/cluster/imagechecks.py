"""Runs images the way a pod does: read-only file system, no root, no network. What is missing in an image shows here, not in a cluster."""

import sys
import time
from collections.abc import Mapping

from cluster.builder import Builder, ImageError

ALIKE = ("--rm", "--network", "none", "--read-only", "--user", "65532:65532", "--tmpfs", "/tmp")  # noqa: S108 - the pod's /tmp
READY_TIMEOUT_S = 60.0
# Every module is imported, so that a delayed import cannot hide a missing package. Left out: files of another process, and Alembic's
# scripts, which only run inside Alembic.
IMPORTS = """
import importlib, os, pkgutil, shutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith((".triton_model", ".__main__")) and ".migrations." not in module.name:
        importlib.import_module(module.name)
assert os.getuid() == 65532, os.getuid()
for tool in ("pip", "pip3", "uv", "gcc", "cc"):
    assert shutil.which(tool) is None, f"{tool} is in the image"
assert "torch" not in sys.modules and importlib.util.find_spec("torch") is None, "torch is in the image"
"""
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "trainer": ("python", "-c", "import torch, onnx, onnxruntime, optuna, millrace, pandas, sklearn, getpass; print(torch.__version__, getpass.getuser())"),
    "kafka": ("sh", "-c", "/opt/kafka/bin/kafka-storage.sh random-uuid"),
    "postgres": ("sh", "-c", "initdb -D /tmp/data > /dev/null && postgres --version"),
    "redis": ("redis-server", "--version"),
    "versitygw": ("versitygw", "--version"),
}  # fmt: skip
USERS = {"postgres": "999:999"}


def check(builder: Builder, images: Mapping[str, str]) -> None:
    """Run each of `images` (short name to full name).

    Raises:
        ImageError: one lacks something; the message shows what it said.
    """
    for name, image in images.items():
        if name == "triton-cpu":
            _triton(builder, image)
        elif name in COMMANDS:
            first, *others = COMMANDS[name]
            user = ("--user", USERS[name]) if name in USERS else ()
            builder.run("run", *ALIKE, *user, "--entrypoint", first, image, *others)
        else:
            module = f"millrace_{name.replace('-', '_')}"
            builder.run("run", *ALIKE, "--entrypoint", "python", image, "-c", IMPORTS, module)
            builder.run("run", *ALIKE, image, "--help")
        print(f"images: {image} runs", file=sys.stderr, flush=True)


def _triton(builder: Builder, image: str) -> None:
    """Triton with an empty repository becomes healthy by its own health check."""
    command = ["tritonserver", "--model-repository=/tmp", "--model-control-mode=explicit"]
    container = builder.run("run", "-d", *ALIKE[1:], "--health-interval=1s", image, *command).strip()
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while (state := builder.run("inspect", "--format", "{{.State.Health.Status}}", container).strip()) != "healthy":
            if time.monotonic() > deadline:
                raise ImageError(f"{image} is {state}:\n{builder.run('logs', container)[-2000:]}")
            time.sleep(0.2)
    finally:
        builder.run("rm", "-f", container)
