"""The index of headers: each version of a file is read once, whatever became of the index or of the file."""

import multiprocessing
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shira_diffusers.library.header_index as header_index
from shira_diffusers import AdapterLibrary, ShiraAdapter, SparseDelta, save_adapter
from tests import tiny

ALL = {"a1": 1, "a2": 2, "a3": 3}


def write(path: Path, count: int) -> None:
    """An adapter of so many entries, written an hour ago."""
    delta = SparseDelta(torch.arange(count), torch.ones(count), (4, 4))
    age(save_adapter(ShiraAdapter({"unet.a.weight": delta}, {"prompt": f"of {count}"}), path))


def age(path: Path) -> None:
    os.utime(path, (time.time() - 3600,) * 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "styles").mkdir()
    for name, count in ALL.items():
        write(tmp_path / "styles" / f"{name}.safetensors", count)
    return tmp_path / "styles"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose headers are read."""
    seen: list[str] = []
    real = header_index.open_adapter
    monkeypatch.setattr(header_index, "open_adapter", lambda path: (seen.append(path.stem), real(path))[1])
    return seen


def counts(library: AdapterLibrary) -> dict[str, int]:
    return {name: header.nnz for name, header in library.headers().items()}


def started(folder: Path, index: Path | None) -> dict[str, int]:
    """Entries by name, as a service that has just started lists them."""
    with AdapterLibrary(folder, device="cpu", index=index) as library:
        return counts(library)


def test_headers_are_read_once(folder: Path, index: Path, reads: list[str]) -> None:
    assert started(folder, index) == ALL and len(reads) == 3
    with AdapterLibrary(folder, device="cpu", index=index) as library:
        header = library.headers()["a2"]
    file = folder / "a2.safetensors"
    assert (header.metadata["prompt"], header.density, header.components) == ("of 2", 2 / 16, ["unet"])
    assert header.size == file.stat().st_size and len(header.sha256 or "") == 64 and len(reads) == 3


def test_without_an_index_memory_keeps_them(folder: Path, reads: list[str]) -> None:
    with AdapterLibrary(folder, device="cpu") as library:
        assert counts(library) == counts(library) == ALL and len(reads) == 3


def test_peft_folders_are_listed(folder: Path, index: Path, reads: list[str]) -> None:
    from peft import ShiraConfig, get_peft_model

    get_peft_model(tiny.unet(), ShiraConfig(r=2, target_modules=["to_q"])).save_pretrained(folder / "theirs")
    age(folder / "theirs" / "adapter_model.safetensors")
    with AdapterLibrary(folder, device="cpu", index=index) as library:
        first = library.headers()["theirs"]
    assert first.density is None and first.nnz > 0 and first.metadata["source"] == "peft"
    with AdapterLibrary(folder, device="cpu", index=index) as library:
        assert library.headers()["theirs"] == first and reads.count("theirs") == 1


# -------------------------------------------------------------------- files that change under the service


def test_replaced_and_deleted_files_are_noticed(folder: Path, index: Path, reads: list[str]) -> None:
    with AdapterLibrary(folder, device="cpu", index=index) as library:
        assert counts(library) == ALL
        write(folder / "a2.safetensors", 5)
        (folder / "a3.safetensors").unlink()
        write(folder / "b.safetensors", 4)
        assert counts(library) == {"a1": 1, "a2": 5, "b": 4} and reads[3:] == ["a2", "b"]
    assert started(folder, index) == {"a1": 1, "a2": 5, "b": 4} and len(reads) == 5
    with sqlite3.connect(index) as database:
        assert database.execute("SELECT count(*) FROM headers").fetchone() == (3,)  # what is gone takes no room
    database.close()


def test_a_young_file_is_read_again(folder: Path, index: Path, reads: list[str]) -> None:
    """On a file system with a coarse clock it may change without another time or size."""
    file = folder / "a1.safetensors"
    os.utime(file)
    assert started(folder, index) == started(folder, index) == ALL and reads.count("a1") == 2
    age(file)
    assert started(folder, index) == started(folder, index) == ALL and reads.count("a1") == 3


@pytest.mark.parametrize("spoil", [lambda content: content[: len(content) // 2], lambda content: b"damaged"])
def test_half_written_and_damaged_files_are_left_out_until_they_change(
    spoil: Callable[[bytes], bytes], folder: Path, index: Path, reads: list[str]
) -> None:
    file = folder / "a2.safetensors"
    content = file.read_bytes()
    with AdapterLibrary(folder, device="cpu", index=index) as library:
        assert counts(library) == ALL
        file.write_bytes(spoil(content))
        assert counts(library) == {"a1": 1, "a3": 3}
        age(file)
        assert counts(library) == counts(library) == {"a1": 1, "a3": 3} and reads.count("a2") == 3
        file.write_bytes(content)
        assert counts(library) == ALL
        assert library.get("a2").nnz == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_be_read_again_is_listed_again(folder: Path, index: Path) -> None:
    (folder / "a2.safetensors").chmod(0)
    with AdapterLibrary(folder, device="cpu", index=index) as library:
        assert counts(library) == {"a1": 1, "a3": 3}
        (folder / "a2.safetensors").chmod(0o644)
        assert counts(library) == ALL


# -------------------------------------------------------------------- the index


def cut(index: Path) -> None:
    index.write_bytes(index.read_bytes()[:5000])


def flip(index: Path) -> None:
    """Damage what a row says, which SQLite does not notice."""
    index.write_bytes(index.read_bytes().replace(b'{"metadata"', b'\xff"metadata"'))


def of_another_schema(index: Path) -> None:
    database = sqlite3.connect(index)
    database.executescript("DROP TABLE headers; CREATE TABLE headers (other TEXT); PRAGMA user_version = 99")
    database.close()


@pytest.mark.parametrize("spoil", [cut, flip, of_another_schema, Path.unlink, lambda index: index.write_bytes(b"")])
def test_an_index_that_is_damaged_is_built_anew(
    spoil: Callable[[Path], object], folder: Path, index: Path, reads: list[str]
) -> None:
    assert started(folder, index) == ALL
    spoil(index)
    assert started(folder, index) == ALL and len(reads) == 6
    assert started(folder, index) == ALL and len(reads) == 6


def test_a_file_that_is_no_index_is_left_alone(
    folder: Path, index: Path, caplog: pytest.LogCaptureFixture, reads: list[str]
) -> None:
    other = sqlite3.connect(index)
    other.execute("CREATE TABLE headers (mine TEXT)")
    other.close()
    shutil.copy(folder / "a1.safetensors", folder.parent / "precious")
    for file in (index, folder.parent / "precious"):
        before = file.read_bytes()
        with AdapterLibrary(folder, device="cpu", index=file) as library:
            assert counts(library) == counts(library) == ALL
        assert file.read_bytes() == before and f"not kept in {file}: it is not an index" in caplog.text
    assert len(reads) == 6


def test_an_index_that_cannot_be_written_is_done_without(
    folder: Path, index: Path, caplog: pytest.LogCaptureFixture, reads: list[str]
) -> None:
    missing = index / "no" / "such" / "folder"
    with AdapterLibrary(folder, device="cpu", index=missing) as library:
        assert counts(library) == counts(library) == ALL and len(reads) == 3
    assert f"not kept in {missing}: " in caplog.text


def test_an_index_that_is_only_read_serves(
    folder: Path, index: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert started(folder, index) == ALL
    write(folder / "a2.safetensors", 5)
    real = sqlite3.connect  # rights do not keep root from writing
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda file, **_: real(f"file:{file}?mode=ro", uri=True))
        assert started(folder, index) == {**ALL, "a2": 5} and reads[3:] == ["a2"]
    assert started(folder, index) == {**ALL, "a2": 5} and reads[4:] == ["a2"]


def test_several_processes_share_an_index(folder: Path, index: Path, reads: list[str]) -> None:
    for number in range(100):
        os.link(folder / "a1.safetensors", folder / f"b{number}.safetensors")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.starmap(started, [(folder, index)] * 6)
    assert all(each == found[0] for each in found) and len(found[0]) == 103
    assert started(folder, index) == found[0] and reads == []
