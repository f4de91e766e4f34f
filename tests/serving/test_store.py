"""Adapters in an object store, read through copies; fsspec's store in memory stands for S3 and the Hub."""

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import httpx
import pytest

from shira_diffusers import ShiraError, load_adapter, save_adapter
from shira_diffusers.formats.find import PEFT_WEIGHTS, WEIGHTS_NAME
from shira_diffusers.serving import store as stores
from shira_diffusers.serving.errors import ServiceError
from shira_diffusers.serving.store import FolderStore, open_store
from tests import tiny


@pytest.fixture
def source() -> str:
    return f"memory://{uuid.uuid4().hex}/styles"


@pytest.fixture
def file(tmp_path: Path) -> bytes:
    save_adapter(tiny.adapter_for(tiny.linears(), 0, only=("0",)), tmp_path / "a.safetensors")
    return (tmp_path / "a.safetensors").read_bytes()


def add(store: FolderStore, name: str, content: bytes, *, replace: bool = False) -> int:
    async def chunks() -> AsyncIterator[bytes]:
        yield content

    return asyncio.run(store.add(name, chunks(), 10**6, replace=replace))


def test_uploads_reach_the_store_and_copies_follow_it(
    source: str, file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (open_store(source, str(tmp_path / name)) for name in ("one", "other"))
    assert one.sizes() == {}
    assert add(one, "blue", file) == len(file)
    assert other.sizes() == {"blue": len(file)} and not other.has("blue")
    other.fetch(["blue", "none", "../x"])
    assert (other.folder / "blue.safetensors").read_bytes() == file and not other.has("none")

    save_adapter(tiny.adapter_for(tiny.linears(), 1, only=("0",)), tmp_path / "b.safetensors")
    newer = (tmp_path / "b.safetensors").read_bytes()
    add(one, "blue", newer, replace=True)
    other.fetch(["blue"])
    assert (other.folder / "blue.safetensors").read_bytes() == file  # looked at a moment ago
    monkeypatch.setattr(stores, "FRESH", 0.0)
    other.fetch(["blue"])
    assert (other.folder / "blue.safetensors").read_bytes() == newer

    one.remove("blue")
    other.fetch(["blue"])
    assert not other.has("blue")
    with pytest.raises(ServiceError, match="no adapter named 'blue'"):
        other.remove("blue")


def test_an_adapter_that_two_requests_name_at_once_is_downloaded_once(
    source: str, file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, memory, downloads = open_store(source, str(tmp_path)), fsspec.get_filesystem_class("memory"), list[str]()
    add(store, "blue", file)
    get_file, began, again = memory.get_file, threading.Event(), threading.Event()

    def slow(self: fsspec.AbstractFileSystem, path: str, *rest: object) -> None:
        downloads.append(path)
        (again if began.is_set() else began).set()
        again.wait(1)  # a second download has the time to begin
        get_file(self, path, *rest)

    monkeypatch.setattr(memory, "get_file", slow)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(store.fetch, ["blue"])
        assert began.wait(60)
        second = threads.submit(store.fetch, ["blue"])
        first.result(60), second.result(60)
    assert len(downloads) == 1
    assert (store.folder / "blue.safetensors").read_bytes() == file


def test_copies_are_used_while_the_store_is_out_of_reach(
    source: str, file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(source, str(tmp_path))
    add(store, "blue", file)
    store.fetch(["blue"])
    monkeypatch.setattr(stores, "FRESH", 0.0)

    def unreachable(*_: object) -> None:
        raise httpx.ConnectError("no route")  # which is no OSError

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "ukey", unreachable)
    store.fetch(["blue"])
    assert load_adapter(store.folder / "blue.safetensors")
    with pytest.raises(ServiceError, match=r"cannot use the adapters at .*: no route \(ConnectError\)") as caught:
        store.fetch(["gold"])
    assert (caught.value.type, caught.value.status) == ("storage", 503)


def test_a_cache_that_is_not_there_is_made(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    index = open_store(str(tmp_path / "adapters"), str(tmp_path / "new" / "cache")).index
    assert index.parent == tmp_path / "new" / "cache" and index.parent.is_dir()


def test_what_arrives_damaged_is_no_copy_and_is_fetched_again(source: str, file: bytes, tmp_path: Path) -> None:
    store = open_store(source, str(tmp_path / "copies"))
    fsspec.filesystem("memory").pipe(f"{source}/blue.safetensors", file[:-1] + bytes([file[-1] ^ 1]))
    with pytest.raises(ServiceError, match="blue is not a valid SHiRA adapter") as caught:
        store.fetch(["blue"])
    assert (caught.value.type, caught.value.status) == ("invalid_adapter", 422)
    assert not list(store.folder.iterdir())
    fsspec.filesystem("memory").pipe(f"{source}/blue.safetensors", file)
    store.fetch(["blue"])
    assert (store.folder / "blue.safetensors").read_bytes() == file


def test_a_hub_that_does_not_answer_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    store = open_store(f"hf://owner/{uuid.uuid4().hex}", str(tmp_path))
    for use in (store.sizes, lambda: store.fetch(["blue"])):
        with pytest.raises(ServiceError, match=r"cannot use the adapters at owner/.* refused .*credentials"):
            use()


def test_a_damaged_upload_does_not_reach_the_store(source: str, file: bytes, tmp_path: Path) -> None:
    store = open_store(source, str(tmp_path / "copies"))
    with pytest.raises(ServiceError, match="blue"):
        add(store, "blue", file[:-1])
    assert store.sizes() == {} and not list(store.folder.iterdir())


@pytest.fixture
def local(tmp_path: Path) -> FolderStore:
    (tmp_path / "styles").mkdir()
    return open_store(str(tmp_path / "styles"), str(tmp_path))


def no_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")  # as FAT says it


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("is_local", [True, False])
def test_of_two_uploads_of_one_new_name_one_is_refused(
    local: FolderStore, source: str, file: bytes, monkeypatch: pytest.MonkeyPatch, links: bool, is_local: bool
) -> None:
    store, both_began = local if is_local else open_store(source, str(local.folder)), asyncio.Barrier(2)
    if not links:
        monkeypatch.setattr("os.link", no_links)

    async def chunks() -> AsyncIterator[bytes]:
        await both_began.wait()
        yield file

    async def upload_both() -> list[object]:
        adding = [store.add("blue", chunks(), 10**6, replace=False) for _ in range(2)]
        return await asyncio.gather(*adding, return_exceptions=True)

    stored, refused = sorted(asyncio.run(upload_both()), key=lambda outcome: isinstance(outcome, ServiceError))
    assert stored == len(file) and isinstance(refused, ServiceError)
    assert (refused.type, refused.status) == ("conflict", 409)
    assert store.sizes() == {"blue": len(file)}


def test_a_name_is_free_again_where_its_file_could_not_be_put_there(
    local: FolderStore, file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", no_links)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(ServiceError, match="cannot store 'blue': No space left"):
            add(local, "blue", file)
    assert not list(local.folder.iterdir())
    assert add(local, "blue", file) == len(file)
    assert (local.folder / "blue.safetensors").read_bytes() == file


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("content", [(WEIGHTS_NAME,), (PEFT_WEIGHTS, "adapter_config.json")], ids=["ours", "PEFT's"])
def test_an_upload_takes_no_name_of_a_sub_folder(
    local: FolderStore, file: bytes, replace: bool, content: tuple[str, ...]
) -> None:
    (local.folder / "sub").mkdir()
    for name in content:
        (local.folder / "sub" / name).write_bytes(file)
    message = "the adapter 'sub' is a sub-folder, which an upload cannot replace; expected another name"
    with pytest.raises(ServiceError, match=f"^{message}$") as caught:
        add(local, "sub", file, replace=replace)
    assert (caught.value.type, caught.value.status) == ("conflict", 409)
    assert [path.name for path in local.folder.iterdir()] == ["sub"]
    add(local, "other", file, replace=replace)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, file: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    (tmp_path / "styles").mkdir()
    store = open_store(str(tmp_path / "styles"))
    with pytest.raises(ServiceError, match="cannot store 'blue': No space left on device") as caught:
        add(store, "blue", file)
    assert (caught.value.type, caught.value.status) == ("storage", 507)
    assert not list(store.folder.iterdir())


def test_what_cannot_be_opened_is_one_error(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none"), "nonsense://styles", "sftp://host/styles"):
        with pytest.raises(ShiraError, match="adapters at"):
            open_store(source)
