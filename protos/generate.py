"""Compile every `.proto` below `millrace_api/` into `src/millrace_api/` (messages, gRPC stubs, type stubs).

Run as `python protos/generate.py`; the wheel's build hook calls `generate` too, so there is one way to make the code.
"""

import os
import shutil
import sys
import sysconfig
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc


def generate(root: Path) -> None:
    """Generate code below `root/src/millrace_api`, replacing what was there.

    Raises:
        RuntimeError: when the compiler refuses a file; its message is on stderr.
    """
    out = root / "src"
    scratch = root / "src.new"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    sources = sorted(str(p.relative_to(root)) for p in (root / "millrace_api").rglob("*.proto"))
    well_known = str(files("grpc_tools") / "_proto")
    # protoc looks for its plugins on PATH; they are installed beside this interpreter.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={root}",
            f"--proto_path={well_known}",
            f"--python_out={scratch}",
            f"--grpc_python_out={scratch}",
            f"--mypy_out=quiet:{scratch}",
            f"--mypy_grpc_out=quiet:{scratch}",
            f"--descriptor_set_out={scratch / 'descriptors.binpb'}",
            "--include_imports",
            "--include_source_info",
            *sources,
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc exited with {status}")
    package = scratch / "millrace_api"
    shutil.move(scratch / "descriptors.binpb", package / "descriptors.binpb")
    for folder in [package, *(p for p in package.rglob("*") if p.is_dir())]:
        (folder / "__init__.py").touch()
    (package / "py.typed").touch()
    # Replaced as a whole, so that a removed .proto leaves no code behind.
    shutil.rmtree(out, ignore_errors=True)
    scratch.rename(out)


if __name__ == "__main__":
    generate(Path(__file__).resolve().parent)
    sys.stdout.write("generated protos/src/millrace_api\n")
