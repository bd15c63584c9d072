"""The content store refuses what is not what its address says, on every kind of file system."""

import hashlib
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from millrace_kit.content import CHUNK_BYTES, ContentStore, open_files, sha256_file, sha256_tree
from millrace_kit.errors import DataLossError, NotFoundError
from parts import s3


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ContentStore:
    if request.param == "s3":
        return ContentStore(request.getfixturevalue("s3_url"))
    return ContentStore(tmp_path.as_uri() if request.param == "file" else f"memory://{uuid4().hex}")


def stored_path(store: ContentStore, digest: str) -> tuple[fsspec.AbstractFileSystem, str]:
    fs, root = open_files(store.url)
    return fs, f"{root}/sha256/{digest[:2]}/{digest}"


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 7])
def test_what_goes_in_comes_out(store: ContentStore, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    file = tmp_path / "in"
    file.write_bytes(content)
    digest = store.put_file(file)
    assert digest == sha256_file(file) == store.put_bytes(content) == hashlib.sha256(content).hexdigest()
    assert store.read(digest) == content
    assert store.size(digest) == size
    assert store.fetch(digest, tmp_path / "out" / "copy").read_bytes() == content
    assert all(len(chunk) <= CHUNK_BYTES for chunk in store.chunks(digest))


@pytest.mark.parametrize("position", [0, CHUNK_BYTES + 5, 3 * CHUNK_BYTES - 1])
def test_one_changed_byte_is_refused_and_the_last_chunk_held_back(
    store: ContentStore, tmp_path: Path, position: int
) -> None:
    content = bytearray(os.urandom(3 * CHUNK_BYTES))
    digest = store.put_bytes(bytes(content))
    content[position] ^= 1
    fs, path = stored_path(store, digest)
    fs.pipe_file(path, bytes(content))
    received = []
    with pytest.raises(DataLossError) as caught:
        received.extend(store.chunks(digest))
    assert caught.value.reason == "DIGEST_MISMATCH"
    assert len(received) == 2
    target = tmp_path / "model.onnx"
    with pytest.raises(DataLossError):
        store.fetch(digest, target)
    assert [p.name for p in tmp_path.iterdir() if "model.onnx" in p.name] == []
    with pytest.raises(DataLossError):
        store.verify(digest)


def test_unknown_content(store: ContentStore) -> None:
    digest = hashlib.sha256(b"nothing").hexdigest()
    for call in (store.read, store.size, store.verify):
        with pytest.raises(NotFoundError):
            call(digest)
    assert not store.has(digest)


def test_a_writer_keeps_only_what_has_the_digest(store: ContentStore) -> None:
    digest = hashlib.sha256(b"whole content").hexdigest()
    with store.write() as writer:
        writer.add(b"whole ")
        with pytest.raises(DataLossError):
            writer.keep(digest)
    assert not store.has(digest)
    with store.write() as writer:
        writer.add(b"whole ")
        writer.add(b"content")
        writer.keep(digest)
        assert writer.size_bytes == 13
    assert store.read(digest) == b"whole content"


def test_an_abandoned_writer_leaves_nothing_and_a_killed_one_is_swept(tmp_path: Path) -> None:
    store = ContentStore(tmp_path.as_uri())
    with store.write() as writer:
        writer.add(b"half")
    assert list((tmp_path / "incoming").iterdir()) == []
    (tmp_path / "incoming" / "killed").write_bytes(b"half")
    now = datetime.now(tz=UTC)
    assert store.sweep(older_than=now - timedelta(days=1)) == 0
    assert store.sweep(older_than=now + timedelta(minutes=1)) == 1
    assert list((tmp_path / "incoming").iterdir()) == []


def test_a_trees_digest_names_paths_and_content(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "a.py").write_text("a")
    before = sha256_tree(tmp_path)
    (tmp_path / "pkg" / "__pycache__").mkdir()
    (tmp_path / "pkg" / "__pycache__" / "a.pyc").write_bytes(b"x")
    (tmp_path / ".git").write_text("x")
    assert sha256_tree(tmp_path) == before
    (tmp_path / "pkg" / "a.py").rename(tmp_path / "pkg" / "b.py")
    renamed = sha256_tree(tmp_path)
    (tmp_path / "pkg" / "b.py").write_text("b")
    assert len({before, renamed, sha256_tree(tmp_path)}) == 3


@pytest.mark.s3
def test_an_s3_that_goes_away_is_an_os_error_in_time(tmp_path: Path) -> None:
    server = s3.start_s3(tmp_path / "s3")
    try:
        with s3.in_environment(server.address):
            store = ContentStore(f"s3://{s3.BUCKET}/store")
            digest = store.put_bytes(b"x" * 10)
            server.kill()
            started = time.monotonic()
            for call in (store.has, store.read, store.size):
                with pytest.raises(OSError, match="did not answer"):
                    call(digest)
            with pytest.raises(OSError, match="did not answer"):
                store.put_bytes(b"y")
            assert time.monotonic() - started < 60
            port = int(server.address.rpartition(":")[2])
            server = s3.start_s3(tmp_path / "s3", port=port)
            assert store.read(digest) == b"x" * 10
    finally:
        server.stop()
