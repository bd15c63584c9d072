"""A substitute for the public Python image, for machines without an image registry: Debian 12 with its own Python 3.11.

Built images stay ordinary: what differs is only the base their `FROM` finds under the public name.
"""

import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from cluster.builder import Builder, ImageError

NAME = "python:3.11-slim-bookworm"
SUITE = "bookworm"
PACKAGES = ("ca-certificates", "python3", "python3-venv", "libpython3.11")
"""python3-venv brings pip for building; libpython is what Triton's Python backend loads."""
BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
LABEL = "dev.millrace.inputs"
UNUSED = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man", "var/log")
TIMEOUT_S = 900.0


def key() -> str:
    """Changes when the base has to be made again."""
    digest = sha256(Path(__file__).read_bytes())
    if BUNDLE.exists():
        digest.update(BUNDLE.read_bytes())
    return digest.hexdigest()


def make(builder: Builder, folder: Path) -> None:
    """Make the base in the daemon, in `folder` for scratch.

    Raises:
        ImageError: Debian's packages cannot be had here.
    """
    if shutil.which("debootstrap") is None:
        raise ImageError("needs debootstrap (Debian: debootstrap)")
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root)],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        raise ImageError(f"debootstrap failed:\n{done.stdout[-2000:]}{done.stderr[-1000:]}")
    for name in UNUSED:
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir()
    # Where the public image has its Python.
    for link, target in (("python3", "/usr/bin/python3"), ("python", "python3")):
        (root / "usr/local/bin" / link).symlink_to(target)
    environment = ""
    if BUNDLE.exists():
        # Builds reach package registries with the certificates this machine trusts.
        shutil.copyfile(BUNDLE, root / BUNDLE.relative_to("/"))
        environment = f"ENV SSL_CERT_FILE={BUNDLE} PIP_CERT={BUNDLE}"
    command = builder.command("import", "--change", f"LABEL {LABEL}={key()}", "--change", 'CMD ["python3"]')
    command += ["--change", environment] if environment else []
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
        imported = subprocess.run(
            [*command, "-", NAME], check=False, stdin=tar.stdout, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        if imported.returncode or tar.wait():
            raise ImageError(f"docker import failed:\n{imported.stderr[-2000:]}")
    shutil.rmtree(root)
    print(f"images: made {NAME} from Debian's packages", file=sys.stderr, flush=True)
