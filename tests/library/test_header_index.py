"""The index of headers: each version of a file is read once, whatever became of the index."""

import multiprocessing
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shira_diffusers.library.header_index as header_index
from shira_diffusers import AdapterLibrary, ShiraAdapter, SparseDelta, save_adapter


def adapter(count: int = 1) -> ShiraAdapter:
    delta = SparseDelta(torch.arange(count), torch.ones(count), (4, 4))
    return ShiraAdapter({"unet.a.weight": delta}, {"prompt": f"of {count}"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "styles").mkdir()
    for count in (1, 2, 3):
        save_adapter(adapter(count), tmp_path / "styles" / f"a{count}.safetensors")
    return tmp_path / "styles"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose headers are read."""
    seen: list[str] = []
    real = header_index.open_adapter
    monkeypatch.setattr(header_index, "open_adapter", lambda path: (seen.append(path.stem), real(path))[1])
    return seen


def counts(folder: Path, index: Path) -> dict[str, int]:
    """Entries by name, as a service that has just started tells them."""
    with AdapterLibrary(folder, device="cpu") as library:
        return {name: header.nnz for name, header in library.headers(index).items()}


ALL = {"a1": 1, "a2": 2, "a3": 3}


def test_headers_are_read_once(folder: Path, tmp_path: Path, reads: list[str]) -> None:
    assert counts(folder, tmp_path / "index") == ALL and len(reads) == 3
    with AdapterLibrary(folder, device="cpu") as library:
        header = library.headers(tmp_path / "index")["a2"]
        assert header.decoded_nbytes == library.get("a2").nbytes and header.metadata["prompt"] == "of 2"
    save_adapter(adapter(5), folder / "a2.safetensors")
    (folder / "a3.safetensors").unlink()
    assert counts(folder, tmp_path / "index") == {"a1": 1, "a2": 5} and reads[3:] == ["a2"]


def test_a_damaged_file_is_left_out(folder: Path, tmp_path: Path) -> None:
    assert counts(folder, tmp_path / "index") == ALL
    (folder / "a2.safetensors").write_bytes(b"damaged")
    for _ in range(2):
        assert counts(folder, tmp_path / "index") == {"a1": 1, "a3": 3}


def cut(index: Path) -> None:
    index.write_bytes(index.read_bytes()[:5000])


def of_another_version(index: Path) -> None:
    database = sqlite3.connect(index)
    database.executescript("DROP TABLE headers; CREATE TABLE headers (other TEXT); PRAGMA user_version = 99")
    database.close()


@pytest.mark.parametrize(
    "spoil",
    [cut, of_another_version, lambda index: index.write_bytes(b"no database" * 99), lambda i: i.write_bytes(b"")],
)
def test_an_index_that_is_damaged_is_built_anew(
    spoil: Callable[[Path], object], folder: Path, tmp_path: Path, reads: list[str]
) -> None:
    assert counts(folder, tmp_path / "index") == ALL
    spoil(tmp_path / "index")
    assert counts(folder, tmp_path / "index") == ALL and len(reads) == 6
    assert counts(folder, tmp_path / "index") == ALL and len(reads) == 6


def test_an_index_that_cannot_be_written_is_done_without(folder: Path, tmp_path: Path) -> None:
    assert counts(folder, tmp_path / "no" / "such" / "folder") == ALL


def test_several_processes_share_an_index(folder: Path, tmp_path: Path, reads: list[str]) -> None:
    for number in range(100):
        os.link(folder / "a1.safetensors", folder / f"b{number}.safetensors")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.starmap(counts, [(folder, tmp_path / "index")] * 6)
    assert all(each == found[0] for each in found) and len(found[0]) == 103
    assert counts(folder, tmp_path / "index") == found[0] and reads == []
