"""A folder of training code as the archive `RegisterPipeline` takes."""

import gzip
import io
import tarfile
from pathlib import Path


def pack_folder(folder: Path) -> bytes:
    """`folder` as tar.gz with sorted names and no times or owners, so that equal files give equal bytes.

    Byte code and hidden files are left out.
    """
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            if not path.is_file() or any(part.startswith(".") or part == "__pycache__" for part in relative.parts):
                continue
            entry = tarfile.TarInfo(relative.as_posix())
            entry.size = path.stat().st_size
            entry.mode = 0o644
            with path.open("rb") as content:
                archive.addfile(entry, content)
    return packed.getvalue()
