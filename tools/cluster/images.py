"""Makes every image: Millrace's own, and for machines without an image registry substitutes of what the chart names.

    python -m cluster.images [NAME…]                     build with the Docker of this machine, as a user does
    python -m cluster.images --own FOLDER [NAME…]        build in a daemon of our own below FOLDER, on a substitute base
    python -m cluster.images --own FOLDER --load SOCKET  build, then load into the containerd of that socket
    python -m cluster.images --cluster                   build as with --own and load into the cluster of `python -m cluster up`
    python -m cluster.images --own FOLDER --check        run each image as a pod would: read-only, without root, without network

What is up to date is left alone: an image carries the digest of everything it was made from as a label, in Docker and in containerd.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from parts import kafka, s3

from cluster import base, binaries, imagechecks, node
from cluster.__main__ import FOLDER
from cluster.base import LABEL
from cluster.builder import Builder, ImageError

ROOT = Path(__file__).parent.parent.parent
VERSION = "0.1.0"
DOCKER = binaries.CACHE / "docker"
"""Where the daemon for the throw-away cluster keeps its layers; outlives the cluster."""
KEPT_CACHE = "12GB"
"""Build cache that stays: the layers of every image once, and downloaded packages."""
NAMESPACE = "k8s.io"
TABLE = ROOT / "docs" / "reference" / "images.md"
SHARED = (
    "requirements.lock",
    ".dockerignore",
    "deploy/images/install.sh",
    "deploy/images/requirements.py",
    "deploy/images/overrides.txt",
)
SERVICES = {
    "ingestion": "Arrow, Delta Lake",
    "feature": "Feast, DuckDB, Arrow, Delta Lake",
    "registry": "SQLAlchemy, fsspec",
    "training-coordinator": "SQLAlchemy, Kubernetes client",
    "inference-gateway": "Envoy and its messages",
    "drift-monitor": "SciPy, Arrow",
    "rollout-controller": "Kubernetes client, Triton's client",
    "console": "Starlette",
    "bootstrap": "Kubernetes client, cryptography",
}  # fmt: skip
IGNORED = {"tests", "__pycache__", "node_modules"}
SUBSTITUTES = Path(__file__).parent / "substitutes"


@dataclass(frozen=True)
class Image:
    """One image."""

    name: str
    """`repository:tag`."""
    dockerfile: Path
    inputs: tuple[str, ...]
    """Files and folders of the repository that decide what it holds."""
    content: str = ""
    """What it is made of, for the table of sizes; empty for a substitute."""
    context: Callable[[], Path] = lambda: ROOT
    outside: str = ""
    """Version of what comes from outside the repository."""

    def key(self) -> str:
        """Changes when the image has to be built again."""
        digest = sha256(f"{self.name}\n{self.outside}\n{base.key()}".encode())
        for path in [self.dockerfile, *sorted(_files(ROOT / name for name in self.inputs))]:
            digest.update(f"\n{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
        return digest.hexdigest()


def _files(paths: Iterator[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_file():
            yield path
        for found in path.rglob("*"):
            generated = found.is_relative_to(ROOT / "protos" / "src")
            if found.is_file() and not IGNORED & set(found.parts) and not generated:
                yield found


def _own(name: str, content: str, folder: str, *inputs: str) -> Image:
    return Image(f"millrace/{name}:{VERSION}", ROOT / folder / "Dockerfile", (*SHARED, *inputs, folder), content)


def _jars() -> Path:
    return kafka.fetch()


def _versitygw() -> Path:
    """A folder with the program alone; its neighbours in the cache are no part of the build."""
    program = s3.fetch()
    folder = program.parent / "versitygw.image"
    folder.mkdir(exist_ok=True)
    target = folder / program.name
    if not target.exists() or not target.samefile(program):
        target.unlink(missing_ok=True)
        os.link(program, target)
    return folder


def _substitute(name: str, folder: str, context: Callable[[], Path] | None = None, outside: str = "") -> Image:
    place = SUBSTITUTES / folder
    return Image(name, place / "Dockerfile", (), context=context or (lambda: place), outside=outside)


IMAGES = {
    **{
        name: _own(name, content, f"services/{name}", "protos", "libs/kit")
        for name, content in SERVICES.items()
        if (ROOT / "services" / name / "pyproject.toml").exists()
    },
    "triton-cpu": _own(
        "triton-cpu", "Triton, its Python backend, ONNX Runtime", "deploy/images/triton-cpu", "requirements-triton.txt"
    ),
    "trainer": _own(
        "trainer", "torch with CUDA, ONNX, Optuna, the SDK", "deploy/images/trainer", "protos", "libs/kit", "libs/sdk", "charts/millrace-crds/templates",
        "services/training-coordinator",
    ),
}  # fmt: skip
"""Millrace's own, the largest last."""

OTHERS = {
    "kafka": _substitute(f"apache/kafka:{kafka.VERSION}", "kafka", _jars, kafka.VERSION),
    "postgres": _substitute("postgres:15-bookworm", "postgres"),
    "redis": _substitute("redis:7-bookworm", "redis"),
    "versitygw": _substitute(f"versity/versitygw:{s3.VERSION}", "versitygw", _versitygw, s3.VERSION),
}
"""Substitutes, only for machines that cannot pull."""


def build(builder: Builder, names: Sequence[str], *, substitutes: bool) -> None:
    """Build what is not up to date, one after the other.

    Raises:
        ImageError: a build failed.
    """
    if substitutes and builder.label(base.NAME, LABEL) != base.key():
        base.make(builder, builder.folder)
    known = {**IMAGES, **OTHERS} if substitutes else IMAGES
    for name in names or known:
        image, began = known[name], time.monotonic()
        if builder.label(image.name, LABEL) == image.key():
            continue
        command = ["build", "-q", "--network", "host", "--label", f"{LABEL}={image.key()}", "-f", str(image.dockerfile)]
        builder.run(*command, "-t", image.name, str(image.context()))
        _say(f"built {image.name}", began)
    if substitutes:  # our own daemon; what was replaced would fill the disk, the trainer alone with 6 GB a time
        for words in (("image", "prune", "-f"), ("builder", "prune", "-f", "--keep-storage", KEPT_CACHE)):
            try:
                builder.run(*words)
            except ImageError as error:
                # The images are there; a cache that cannot be thinned out costs disk and nothing else.
                print(f"images: {error}", file=sys.stderr, flush=True)


def load(builder: Builder, socket: Path, names: Sequence[str]) -> None:
    """Bring images into a containerd, except those it has.

    Raises:
        ImageError: an import failed.
    """
    known = {**IMAGES, **OTHERS}
    there = _loaded(socket)
    for name in names or known:
        image, began = known[name], time.monotonic()
        reference = full_name(image.name)
        key = builder.label(image.name, LABEL)
        if there.get(reference) == key:
            continue
        builder.pipe(["save", image.name], [*_ctr(socket), "images", "import", "-"])
        _call([*_ctr(socket), "images", "label", reference, f"{LABEL}={key}"])
        _say(f"loaded {image.name}", began)
    _drop_replaced(socket)


def _drop_replaced(socket: Path) -> None:
    """Forget images that no name leads to any more: Kubernetes' plugin keeps each under its digest, 12 GB for a trainer."""
    rows = [line.split() for line in _call([*_ctr(socket), "images", "ls"]).splitlines()[1:]]
    named = {row[2] for row in rows if not row[0].startswith("sha256:")}
    replaced = [row[0] for row in rows if row[0].startswith("sha256:") and row[2] not in named]
    if replaced:
        _call([*_ctr(socket), "images", "rm", "--sync", *replaced])


def full_name(name: str) -> str:
    """The name containerd knows an image by."""
    return f"docker.io/{name if '/' in name else f'library/{name}'}"


def build_and_load(state_dir: Path, containerd_socket: Path, names: Sequence[str] | None = None) -> None:
    """Build every image (or `names`) in a daemon below `state_dir`, load them into a containerd, end the daemon.

    Raises:
        ImageError: what is needed is not here, or a step failed; the message shows why.
    """
    with Builder(state_dir) as builder:
        build(builder, names or (), substitutes=True)
        load(builder, containerd_socket, names or ())


def table(sizes: dict[str, int], shared: int) -> str:
    """The page of sizes; `sizes` and `shared` (the layers every service's image begins with) in bytes."""
    lines = [
        "# Images",
        "",
        "Made by `make images`; this page by the same script. Sizes are unpacked, base included. Services share their first layers (the base",
        f"and what the kit needs, {shared / 1e6:.0f} MB), which a node keeps once.",
        "",
        "| image | size, MB | its own, MB | most of it |",
        "|---|---:|---:|---|",
    ]
    for name, size in sizes.items():
        own = size - shared if name in SERVICES else size
        lines.append(f"| `millrace/{name}` | {size / 1e6:.0f} | {own / 1e6:.0f} | {IMAGES[name].content} |")
    return "\n".join(lines) + "\n"


def write_table(builder: Builder) -> None:
    """Write the page of sizes from the images that were built."""
    sizes, layers = {}, {}
    for name, image in IMAGES.items():
        sizes[name] = int(builder.run("image", "inspect", "--format", "{{.Size}}", image.name))
        history = builder.run(
            "history", "--human=false", "--no-trunc", "--format", "{{.Size}}\t{{.CreatedBy}}", image.name
        )
        layers[name] = [line.split("\t", 1) for line in history.splitlines()][::-1]
    first = layers["registry"]
    count = next(
        number for number, (_, step) in enumerate(first) if step.endswith("install.sh protos libs/kit # buildkit")
    )
    TABLE.write_text(table(sizes, sum(int(size) for size, _ in first[: count + 1])), encoding="utf-8")


def _loaded(socket: Path) -> dict[str, str]:
    """Images of a containerd and what they were made from."""
    found = {}
    for line in _call([*_ctr(socket), "images", "ls"]).splitlines()[1:]:
        words = line.split()
        labels = dict(pair.partition("=")[::2] for word in words for pair in word.split(",") if "=" in pair)
        found[words[0]] = labels.get(LABEL, "")
    return found


def _ctr(socket: Path) -> list[str]:
    return ["ctr", "-a", str(socket), "-n", NAMESPACE]


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ImageError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return done.stdout


def _say(text: str, began: float) -> None:
    print(f"images: {text} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m cluster.images", description="Build, load and check images.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join([*IMAGES, *OTHERS])}; all when none is given"
    )
    parser.add_argument(
        "--own", type=Path, metavar="FOLDER", help="use a daemon of our own below FOLDER, on a substitute base"
    )
    parser.add_argument("--load", type=Path, metavar="SOCKET", help="then load into this containerd")
    parser.add_argument("--check", action="store_true", help="then run each image as a pod would")
    parser.add_argument(
        "--cluster", action="store_true", help="--own and --load for the throw-away cluster of this machine"
    )
    arguments = parser.parse_args()
    if arguments.cluster:
        arguments.own, arguments.load = DOCKER, node.containerd_socket(FOLDER)
    known = {**IMAGES, **OTHERS} if arguments.own else IMAGES
    if unknown := set(arguments.names) - set(known):
        parser.error(f"no image is called {', '.join(sorted(unknown))}")
    try:
        with Builder(arguments.own) as builder:
            build(builder, arguments.names, substitutes=arguments.own is not None)
            if not arguments.names and not arguments.cluster:
                write_table(builder)
            if arguments.load:
                load(builder, arguments.load, arguments.names)
            if arguments.check:
                imagechecks.check(builder, {name: known[name].name for name in arguments.names or known})
    except ImageError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
