"""Archives from strangers."""

import contextlib
import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest
from millrace_kit.content import ContentStore, sha256_tree
from millrace_kit.errors import InvalidArgumentError
from millrace_training_coordinator import codetrees
from millrace_training_coordinator.codetrees import CodeTrees

from .conftest import archive

LIMIT = 1 << 20


def made(*entries: tarfile.TarInfo, content: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for entry in entries:
            entry.size = len(content) if entry.isreg() else 0
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def trees(tmp_path: Path) -> CodeTrees:
    return CodeTrees(tmp_path / "code", ContentStore((tmp_path / "content").as_uri()), LIMIT)


BAD = {
    "empty": (b"", "must not be empty"),
    "no gzip": (b"x" * 100, "not gzip"),
    "cut": (archive({"a.py": "x" * 5000})[:-20], "not gzip"),
    "no tar": (gzip.compress(b"hello" * 300), "not a tar"),
    "parent": (made(entry("../a.py")), "points outside"),
    "inner parent": (made(entry("a/../../b.py")), "points outside"),
    "absolute": (made(entry("/etc/a.py")), "points outside"),
    "symlink": (made(entry("a", tarfile.SYMTYPE, "/etc")), "no regular file"),
    "hard link": (made(entry("a", tarfile.LNKTYPE, "/etc/passwd")), "no regular file"),
    "device": (made(entry("a", tarfile.CHRTYPE)), "no regular file"),
    "pipe": (made(entry("a", tarfile.FIFOTYPE)), "no regular file"),
    "twice": (made(entry("a.py"), entry("a.py")), "stands twice"),
    "file as folder": (made(entry("a"), entry("a/b")), "cannot be unpacked|stands twice"),
    "only hidden": (made(entry(".git/config"), entry("__pycache__/a.pyc")), "holds no files"),
    "deep": (made(entry("/".join("d" * 40))), "nested deeper"),
    "bomb": (made(entry("a"), content=b"\0" * (20 << 20)), "unpacks to more than 1 MiB"),
    "too large": (b"\x1f\x8b" + b"x" * (16 << 20), "larger than 16 MiB"),
    "long name": (made(entry("n" * 300)), "cannot be unpacked"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(trees: CodeTrees, tmp_path: Path, name: str) -> None:
    content, problem = BAD[name]
    with pytest.raises(InvalidArgumentError, match=problem) as caught:
        trees.add(content)
    assert caught.value.field == "code_tar_gz"
    assert not list((tmp_path / "code").glob("*")), "something was left behind"


def test_too_many_entries(trees: CodeTrees, monkeypatch) -> None:
    monkeypatch.setattr(codetrees, "MAX_FILES", 3)
    with pytest.raises(InvalidArgumentError, match="more than 3 entries"):
        trees.add(made(*(entry(f"f{n}") for n in range(4))))


def test_equal_trees_share_a_folder(trees: CodeTrees, tmp_path: Path) -> None:
    first, _ = trees.add(archive({"a.py": "1", "b/c.py": "2"}))
    second, _ = trees.add(archive({"b/c.py": "2", "a.py": "1", ".hidden": "x", "__pycache__/a.pyc": "y"}))
    assert first == second
    folder = trees.open(first, "unused")
    assert sorted(p.name for p in folder.rglob("*")) == ["a.py", "b", "c.py"]
    assert [p.name for p in (tmp_path / "code").iterdir()] == [first]


def test_a_changed_or_lost_tree_is_unpacked_again(trees: CodeTrees) -> None:
    code_hash, digest = trees.add(archive({"a.py": "1"}))
    folder = trees.open(code_hash, digest)
    (folder / "extra.py").write_text("x")
    assert sha256_tree(trees.open(code_hash, digest)) == code_hash
    folder.rename(folder.with_name("elsewhere"))
    assert sha256_tree(trees.open(code_hash, digest)) == code_hash


def test_damaged_archives_never_crash(trees: CodeTrees) -> None:
    source = random.Random(3)
    good = gzip.decompress(archive({"a.py": "print(1)\n" * 50, "b/c.py": "2"}))
    for _ in range(200):
        damaged = bytearray(good)
        for _ in range(source.randint(1, 6)):
            damaged[source.randrange(1200)] = source.randrange(256)
        # Only this error, or none where the damage did not matter.
        with contextlib.suppress(InvalidArgumentError):
            trees.add(gzip.compress(bytes(damaged), 1))
