"""The peers' own Python environments, made once under build/perf/peers: their pins contradict each other's and ours."""

import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = Path("build/perf/peers")


def environment(name: str) -> Path:
    """The `bin` folder of that peer's environment."""
    requirements = HERE / f"{name}-requirements.txt"
    version = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = (FOLDER / f"{name}-{version}").resolve()
    if not (folder / ".installed").exists():
        print(f"installing {name} into {folder}", file=sys.stderr)
        uv = str(Path(sys.executable).parent / "uv")
        subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, str(folder)], check=True)
        install = [uv, "pip", "install", "-q", "--python", str(folder / "bin" / "python"), "-r", str(requirements)]
        subprocess.run(install, check=True)
        (folder / ".installed").touch()
    return folder / "bin"
