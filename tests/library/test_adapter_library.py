"""AdapterLibrary: the same bits as load_shira, budgets that hold, nothing evicted that is in use, nothing leaked."""

import copy
import gc
import os
import re
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

import shira_diffusers.formats.adapter_file
import shira_diffusers.library.two_tier_cache
from benchmarks.measure import python_calls
from shira_diffusers import (
    AdapterFormatError,
    AdapterLibrary,
    AdapterMismatchError,
    Resident,
    ShiraAdapter,
    ShiraError,
    load_adapter,
    save_adapter,
)
from shira_diffusers.formats.gpu_decoder import DeviceDecoder
from shira_diffusers.formats.opened_adapter import open_adapter
from shira_diffusers.formats.peft import load_peft_adapter
from shira_diffusers.library.packed_adapter import PackedAdapter
from tests import reference, tiny

NAMES = [f"a{number}" for number in range(6)]
SOON = 10.0  # seconds in which what is loaded in the background must have been


@pytest.fixture
def model() -> nn.Sequential:
    return tiny.linears()


@pytest.fixture
def adapters(model: nn.Sequential) -> dict[str, ShiraAdapter]:
    return {name: tiny.adapter_for(model, seed, only=("",)) for seed, name in enumerate(NAMES)}


@pytest.fixture
def folder(adapters: dict[str, ShiraAdapter], tmp_path: Path) -> Path:
    for name, adapter in adapters.items():
        save_adapter(adapter, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.fixture
def open_library(folder: Path) -> Iterator[Callable[..., AdapterLibrary]]:
    """Makes libraries of the folder; budgets in so many adapters."""
    made: list[AdapterLibrary] = []
    packed, decoded = (folder / "a0.safetensors").stat().st_size, load_adapter(folder / "a0.safetensors").nbytes

    def make(ram: float = 100, device: float = 100, *, exceed: bool = False) -> AdapterLibrary:
        budgets = {"ram_bytes": int(ram * packed), "device_bytes": int(device * decoded)}
        made.append(AdapterLibrary(folder, **budgets, exceed=exceed, device="cpu", threads=1))
        return made[-1]

    yield make
    for library in made:
        library.close()


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list["weakref.ref[ShiraAdapter]"]:
    """All adapters that libraries decode."""
    seen: list[weakref.ref[ShiraAdapter]] = []
    real = PackedAdapter.unpack

    def unpack(self: PackedAdapter, decoder: object = None) -> tuple[ShiraAdapter, tuple[Tensor, ...]]:
        found = real(self, decoder)
        seen.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(PackedAdapter, "unpack", unpack)
    return seen


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that libraries read."""
    seen: list[str] = []
    real = shira_diffusers.library.two_tier_cache.open_adapter

    def read(file: Path, *args: object) -> object:
        seen.append(file.stem)
        return real(file, *args)

    monkeypatch.setattr(shira_diffusers.library.two_tier_cache, "open_adapter", read)
    return seen


def decoded_names(library: AdapterLibrary) -> list[str]:
    """Of the adapters that are decoded, in the order in which they are evicted."""
    return [version.name for version, _ in library._store.device]


def packed_names(library: AdapterLibrary) -> list[str]:
    return [version.name for version, _ in library._store.ram]


def fetch(library: AdapterLibrary, *names: str) -> None:
    """Prefetch with one thread, and wait until it is done."""
    library.prefetch(names)
    library._pool.submit(lambda: None).result(SOON)


def assert_budgets(library: AdapterLibrary) -> None:
    stats = library.stats()
    assert stats.ram.nbytes <= stats.ram.budget and stats.device.nbytes <= stats.device.budget


# -------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_weights_are_those_after_load_shira(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs, ours = tiny.pipeline(dtype), tiny.pipeline(dtype)
    base = tiny.snapshot(ours)
    save_adapter(tiny.adapter_for(ours, 1, dtype=dtype), tmp_path / "file.safetensors")
    save_adapter(tiny.adapter_for(ours, 2, dtype=torch.float16), tmp_path / "folder")
    theirs.load_shira(tmp_path / "file.safetensors", "file")
    theirs.load_shira(tmp_path / "folder", "folder")
    with AdapterLibrary(tmp_path, device="cpu") as library:
        assert library.names == ["file", "folder"]
        for mix in ({"file": 1.0}, {"folder": 0.7}, {"file": 0.3, "folder": {"unet": {"down": 0.5}}}, {"file": None}):
            theirs.set_shira(list(mix), list(mix.values()))
            with library.use(ours, mix) as used:
                assert used is ours
                tiny.assert_same_bits(ours, tiny.snapshot(theirs))
            tiny.assert_same_bits(ours, base)
            library.set(ours, mix)
            tiny.assert_same_bits(ours, tiny.snapshot(theirs))
            library.set(ours, {})
            tiny.assert_same_bits(ours, base)


def test_a_peft_folder_and_a_peft_file(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    from peft import ShiraConfig, get_peft_model

    model = get_peft_model(tiny.unet(), ShiraConfig(r=2, target_modules=["to_q", "to_v"], init_weights=False))
    model.save_pretrained(tmp_path / "peft")
    (tmp_path / "lone.safetensors").write_bytes((tmp_path / "peft" / "adapter_model.safetensors").read_bytes())
    other = tiny.pipeline()
    other.load_shira(tmp_path / "peft", "peft")
    with AdapterLibrary(tmp_path, device="cpu", threads=1) as library:
        fetch(library, "peft", "lone")
        assert library.stats().device.adapters == 0  # without a model nothing is known of them
        assert library.get("lone", pipe).nnz == library.get("peft", pipe).nnz > 0
        assert pipe.list_shira() == {}
        for name in ("peft", "lone"):
            library.set(pipe, {name: 1.0})
            tiny.assert_same_bits(pipe, tiny.snapshot(other))
        library.set(pipe, {})
        assert_budgets(library)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_adapter_of_peft_is_fitted_to_each_kind_of_model(kind: str, tmp_path: Path) -> None:
    """PEFT stores no shapes: on a model that it is not for it may be refused, or fit by chance."""
    from peft import ShiraConfig, get_peft_model

    own, larger, smaller = (tiny.unet(cross_attention_dim=size) for size in (32, 64, 16))
    config = ShiraConfig(r=2, target_modules=["attn2.to_k"], init_weights=False)
    get_peft_model(tiny.unet(), config).save_pretrained(tmp_path / "peft")
    expected = Resident(tiny.unet())
    expected.add(load_peft_adapter(tmp_path / "peft", own), "peft")
    expected.set({"peft": 1.0})
    if kind == "file":
        (tmp_path / "peft" / "adapter_model.safetensors").rename(tmp_path / "peft.safetensors")
        shutil.rmtree(tmp_path / "peft")
    base = tiny.snapshot(own)
    with AdapterLibrary(tmp_path, device="cpu") as library:
        with pytest.raises(AdapterFormatError, match="out of range"):
            library.set(smaller, {"peft": 1.0})
        library.set(larger, {"peft": 1.0})
        library.set({"unet": own}, {"peft": 1.0})
        tiny.assert_same_bits(own, tiny.snapshot(expected.models[""]))
        library.set({"unet": own}, {})
        tiny.assert_same_bits(own, base)
        library.set(own, {"peft": 1.0})  # with another name of the component
        tiny.assert_same_bits(own, tiny.snapshot(expected.models[""]))
        assert library.broken == {}
        with pytest.raises(ShiraError, match=r"is PEFT's: expected a model with one of unet, transformer.* got none"):
            library.get("peft")


def test_a_pipeline_a_resident_a_module_and_components(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential, adapters: dict[str, ShiraAdapter], tmp_path: Path
) -> None:
    base, library = tiny.snapshot(model), open_library()
    for target in (Resident(model), model):
        with library.use(target, {"a1": 0.5}) as used:
            assert used is target
            tiny.assert_same_bits(model, reference.apply(base, adapters, {"a1": 0.5}))
        tiny.assert_same_bits(model, base)
    save_adapter(adapters["a1"].prefixed("net"), tmp_path / "net.safetensors")
    with library.use({"net": model}, {"net": 0.5}):
        tiny.assert_same_bits(model, reference.apply(base, adapters, {"a1": 0.5}))


@pytest.mark.parametrize("how", ["shared", "replaced"])
def test_an_adapter_that_a_part_of_the_model_has_is_put_on_the_others(how: str, tmp_path: Path) -> None:
    first, second = tiny.pipeline(), tiny.pipeline()
    adapter = tiny.adapter_for(first, 1)
    save_adapter(adapter, tmp_path / "a.safetensors")
    second.unet = tiny.unet(seed=5)
    base = tiny.snapshot(second)
    with AdapterLibrary(tmp_path, device="cpu") as library:
        library.set(first, {"a": 1.0})
        library.set(first, {})
        if how == "replaced":
            first.unet = second.unet
        second.text_encoder = first.text_encoder
        with library.use(first if how == "replaced" else second, {"a": 1.0}):
            tiny.assert_same_bits(second, reference.apply(base, {"a": adapter}, {"a": 1.0}))
        tiny.assert_same_bits(second, base)


def test_generations_of_others_wait_while_a_mix_is_used(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    """Also when nothing has ever been loaded by load_shira: no picture is torn."""
    save_adapter(tiny.adapter_for(pipe, 1), tmp_path / "a.safetensors")
    plain = tiny.picture(pipe)
    with AdapterLibrary(tmp_path, device="cpu") as library, ThreadPoolExecutor(1) as pool:
        with library.use(pipe, {"a": 1.0}):
            styled = tiny.picture(pipe)
            other = pool.submit(tiny.picture, pipe)
            with pytest.raises(TimeoutError):
                other.result(timeout=0.5)
        assert torch.equal(other.result(), plain)
    assert not torch.equal(styled, plain)


def test_the_examples_of_the_document(
    pipe: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
    for seed, name in enumerate(("bluefire", "gold")):
        save_adapter(tiny.adapter_for(pipe, seed), tmp_path / "styles" / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    base = tiny.snapshot(pipe)
    namespace: dict[str, object] = {"pipe": pipe}
    for program in re.findall(r"```python\n(.*?)```", document, re.DOTALL):
        exec(program.replace("num_inference_steps=20", "num_inference_steps=1"), namespace)
    assert namespace["picture"].size == (tiny.SIZE, tiny.SIZE)
    assert namespace["stats"].device.adapters == 2
    tiny.assert_same_bits(pipe, base)


# -------------------------------------------------------------------- budgets


def test_bytes_are_counted_exactly(
    open_library: Callable[..., AdapterLibrary],
    model: nn.Sequential,
    folder: Path,
    unpacked: list["weakref.ref[ShiraAdapter]"],
) -> None:
    library = open_library(ram=3.5, device=4.5)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        mix = {NAMES[number]: 1.0 for number in torch.randint(6, (2,), generator=generator).tolist()}
        if step % 3:
            library.set(model, {})
            library.set(model, mix)
        else:
            with library.use(model, mix):
                assert_budgets(library)
        assert_budgets(library)
        stats = library.stats()
        assert stats.ram.nbytes == sum(
            (folder / f"{name}.safetensors").stat().st_size for name in packed_names(library)
        )
        alive = [adapter for ref in unpacked if (adapter := ref()) is not None]
        assert stats.device.nbytes == sum(adapter.nbytes for adapter in alive)
        assert stats.device.adapters == len(alive) <= 4
        assert stats.ram.adapters == 3 or step < 3
        del alive
    assert library.stats().device.evictions > 20


def test_the_least_recently_used_leaves(open_library: Callable[..., AdapterLibrary], model: nn.Sequential) -> None:
    library = open_library(ram=100, device=3)
    for name in ("a0", "a1", "a2", "a0", "a3"):
        with library.use(model, {name: 1.0}):
            pass
    assert decoded_names(library) == ["a2", "a0", "a3"]
    small = open_library(ram=2, device=100)
    for name in ("a0", "a1", "a0", "a2"):
        small.get(name)
    assert packed_names(small) == ["a1", "a2"]  # a0 was found decoded, its bytes were not looked at again


def test_hits_and_misses(open_library: Callable[..., AdapterLibrary], model: nn.Sequential, reads: list[str]) -> None:
    library = open_library(ram=100, device=1)
    for name in ("a0", "a0", "a1", "a0"):
        with library.use(model, {name: 1.0}):
            pass
    stats = library.stats()
    assert (stats.device.hits, stats.device.misses, stats.device.evictions) == (1, 3, 2)
    assert (stats.ram.hits, stats.ram.misses) == (1, 2)
    assert reads == ["a0", "a1"]


def test_what_is_used_often_outlasts_what_is_used_once(open_library: Callable[..., AdapterLibrary]) -> None:
    library = open_library(ram=3, device=2)
    for name in ["a0"] * 6 + ["a1", "a2", "a3", "a4"]:
        library.get(name)
    assert sorted(decoded_names(library)) == ["a0", "a4"]
    for name in ("a1", "a2", "a3", "a4") * 5:  # but not for ever
        library.get(name)
    assert "a0" not in decoded_names(library) + packed_names(library)


def test_what_is_prefetched_is_there_when_it_is_used(open_library: Callable[..., AdapterLibrary]) -> None:
    library = open_library(device=4)
    for name in ("a0", "a1", "a0", "a1", "a0", "a1"):
        library.get(name)
    fetch(library, "a2", "a3", "a4")
    assert {"a2", "a3", "a4"} < set(decoded_names(library))
    for name in ("a0", "a1", "a5", "a0", "a1", "a5", "a0", "a1", "a5"):  # the clients of a2 to a4 have left
        library.get(name)
    assert {"a0", "a1", "a5"} < set(decoded_names(library))


def test_a_queue_that_is_longer_than_the_cache_finds_its_first_prefetched(
    open_library: Callable[..., AdapterLibrary], reads: list[str]
) -> None:
    library = open_library(device=3)
    fetch(library, *NAMES)
    for name in NAMES:
        library.get(name)
    stats = library.stats()
    assert (stats.device.hits, stats.device.misses, stats.ram.hits) == (3, 3, 3) and reads == NAMES


def test_what_is_active_is_never_put_out(open_library: Callable[..., AdapterLibrary]) -> None:
    library = open_library(device=2)
    first, second, third = tiny.linears(), tiny.linears(), tiny.linears()
    library.set(first, {"a0": 1.0})
    library.set(second, {"a1": 1.0})
    active = tiny.snapshot(first)
    with pytest.raises(
        ShiraError, match=r"no room for adapter 'a2'.*in use, or on a model that is, are 'a0', 'a1'; raise device_bytes"
    ):
        library.set(third, {"a2": 1.0})
    fetch(library, "a3")
    assert "a3" in packed_names(library) and sorted(decoded_names(library)) == ["a0", "a1"]
    tiny.assert_same_bits(first, active)
    Resident(first).disable()  # put aside is not given up
    with pytest.raises(ShiraError, match="no room"):
        library.set(third, {"a2": 1.0})
    Resident(first).enable()
    tiny.assert_same_bits(first, active)
    with pytest.raises(ShiraError, match="no room"):  # the mix before is there until the switch
        library.set(first, {"a2": 1.0})
    tiny.assert_same_bits(first, active)
    library.set(first, {})
    library.set(first, {"a2": 1.0})
    assert sorted(decoded_names(library)) == ["a1", "a2"]


def test_prefetching_leaves_to_waiting_clients_what_they_want(open_library: Callable[..., AdapterLibrary]) -> None:
    library = open_library(device=2)
    for name in ("a0", "a1"):
        library.get(name)
    with library._store.wanting([library._find("a0")]):
        fetch(library, "a2", "a3")
        assert decoded_names(library) == ["a0", "a2"]
    fetch(library, "a3")
    assert decoded_names(library) == ["a2", "a3"]


def test_half_of_the_device_is_left_for_prefetching(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential
) -> None:
    library, resident = open_library(device=6), Resident(model)
    for name in NAMES:
        with library.use(resident, {name: 1.0}):
            pass
    assert resident.names == ["a3", "a4", "a5"]
    assert len(decoded_names(library)) == 6


def test_what_is_idle_on_another_model_makes_room_unless_that_is_busy(
    open_library: Callable[..., AdapterLibrary],
) -> None:
    library, first, second = open_library(device=2), tiny.linears(), tiny.linears()
    with library.use(first, {"a0": 1.0}):
        pass
    library.set(second, {"a1": 1.0})
    with ThreadPoolExecutor(1) as busy, ExitStack() as left:
        hold = Resident(first).reading()
        busy.submit(hold.__enter__).result(SOON)
        left.callback(lambda: busy.submit(hold.__exit__, None, None, None).result(SOON))
        with pytest.raises(ShiraError, match="in use, or on a model that is, are 'a0', 'a1'"):
            library.set(second, {"a1": 1.0, "a2": 1.0})
        assert (Resident(first).names, Resident(second).active) == (["a0"], {"a1": 1.0})
    library.set(second, {"a1": 1.0, "a2": 1.0})
    assert (Resident(first).names, Resident(second).active) == ([], {"a1": 1.0, "a2": 1.0})
    assert_budgets(library)
    library.set(second, {})


def test_what_is_active_on_another_model_makes_no_room(open_library: Callable[..., AdapterLibrary]) -> None:
    library, first, second = open_library(device=1), tiny.linears(), tiny.linears()
    library.set(first, {"a0": 1.0})
    for act in (lambda: None, Resident(first).disable):
        act()
        with pytest.raises(ShiraError, match="in use, or on a model that is, are 'a0'; raise device_bytes"):
            library.set(second, {"a1": 1.0})


def test_an_idle_adapter_leaves_its_model_at_once_where_half_of_the_budget_is_none(
    open_library: Callable[..., AdapterLibrary],
) -> None:
    library, first, second = open_library(device=1), tiny.linears(), tiny.linears()
    with library.use(first, {"a4": 1.0}):
        pass
    library.set(second, {"a5": 1.0})  # half of one is none: a4 was taken off at once


def test_without_room_in_ram_files_are_mapped(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential, adapters: dict[str, ShiraAdapter]
) -> None:
    library, base = open_library(ram=0), tiny.snapshot(model)
    library.set(model, {"a3": 1.0})
    tiny.assert_same_bits(model, reference.apply(base, adapters, {"a3": 1.0}))
    assert (library.stats().ram.adapters, library.stats().ram.nbytes) == (0, 0)


def test_a_mix_that_never_fits(open_library: Callable[..., AdapterLibrary], model: nn.Sequential) -> None:
    base = tiny.snapshot(model)
    with pytest.raises(ShiraError, match="device_bytes is 1,111, and in use, or on a model that is, are none"):
        open_library(device=0.9999).set(model, {"a0": 1.0})
    with pytest.raises(ShiraError, match="no room"), open_library(device=1).use(model, {"a0": 1.0, "a1": 1.0}):
        pytest.fail("it was used")
    tiny.assert_same_bits(model, base)
    with pytest.raises(ShiraError, match="budgets must be 0 bytes or more"):
        AdapterLibrary(".", ram_bytes=-1)


# -------------------------------------------------------------------- what is in use stays


def test_a_budget_that_what_is_used_may_exceed(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential, adapters: dict[str, ShiraAdapter]
) -> None:
    library = open_library(device=1, exceed=True)
    with library.use(model, {"a0": 1.0, "a1": 1.0}):
        assert Resident(model).active == {"a0": 1.0, "a1": 1.0}
        assert torch.equal(library.get("a2").deltas["0.weight"].values, adapters["a2"].deltas["0.weight"].values)
    library.set(model, {"a3": 1.0})
    assert decoded_names(library) == ["a3"]  # all others are evicted
    library.prefetch("a4")
    library.close()
    assert library.stats().device.nbytes == adapters["a3"].nbytes


def test_no_room_is_lost_where_an_adapter_cannot_be_taken_off_a_model(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    library = open_library(device=2)
    with library.keep(model, ["a0", "a1"]):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(Resident, "remove", refuse)
        with pytest.raises(KeyboardInterrupt):
            library.set(model, {"a2": 1.0, "a3": 1.0})
    assert Resident(model).names == ["a1", "a2"] and decoded_names(library) == ["a1", "a2"]
    assert_budgets(library)
    library.set(model, {"a2": 1.0, "a3": 1.0})
    assert Resident(model).names == ["a2", "a3"] and sorted(decoded_names(library)) == ["a2", "a3"]


def test_adapters_are_kept_on_a_model_without_being_active(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential, reads: list[str]
) -> None:
    bits, library = tiny.snapshot(model), open_library(device=2)
    with library.keep(model, ["a0", "a1"]) as kept:
        assert kept is model and Resident(model).names == ["a0", "a1"] and Resident(model).active == {}
        tiny.assert_same_bits(model, bits)
        with pytest.raises(ShiraError, match="no room"):
            library.get("a2")
        reads.clear()
        with Resident(model).using({"a0": 1.0}):
            assert Resident(model).active == {"a0": 1.0}
        assert reads == []
    tiny.assert_same_bits(model, bits)
    library.get("a2")
    with pytest.raises(ShiraError, match="no adapter named 'nobody'"), library.keep(model, ["nobody"]):
        pass


def test_several_folders_and_a_list_of_files(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, ShiraAdapter]
) -> None:
    other = tmp_path_factory.mktemp("other")
    save_adapter(adapters["a5"], other / "b.safetensors")
    with AdapterLibrary([folder, str(other)], device="cpu") as library:
        assert library.names == [*NAMES, "b"]
        tiny.assert_same_adapter(library.get("b"), library.get("a5"))
        save_adapter(adapters["a0"], other / "a1.safetensors")
        clash = rf"two adapters in .* and .*: {folder}/a1\.safetensors and {other}/a1\.safetensors; rename one"
        assert re.search(clash, library.broken["a1"])
    with pytest.raises(FileNotFoundError, match="expected one of adapters"):
        AdapterLibrary([folder, other / "nowhere"])

    files = {"mine": other / "b.safetensors"}
    with AdapterLibrary(lambda: files.items(), device="cpu") as library:
        assert library.names == ["mine"]
        tiny.assert_same_adapter(library.get("mine"), adapters["a5"])
        files["other"] = files.pop("mine").rename(other / "c.safetensors")
        tiny.assert_same_adapter(library.get("other"), adapters["a5"])
        with pytest.raises(ShiraError, match="no adapter named 'mine' in the list of adapters; there are 'other'"):
            library.get("mine")
        files["other"].unlink()
        with pytest.raises(ShiraError, match=r"the file of adapter 'other' is gone: .*c\.safetensors"):
            library.get("other")


def test_a_client_waits_for_room_that_others_take_for_a_moment(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, real = open_library(device=1), PackedAdapter.unpack
    begun, go_on = threading.Event(), threading.Event()

    def unpack(self: PackedAdapter, decoder: object = None) -> object:
        if "a0" in self.opened.path.name:
            begun.set()
            assert go_on.wait(SOON)
        return real(self, decoder)

    monkeypatch.setattr(PackedAdapter, "unpack", unpack)
    library.prefetch("a0")
    assert begun.wait(SOON)
    threading.Timer(0.2, go_on.set).start()
    library.set(model, {"a1": 1.0})
    assert decoded_names(library) == ["a1"]


def test_mixes_inside_each_other(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential, adapters: dict[str, ShiraAdapter]
) -> None:
    library, base = open_library(device=3), tiny.snapshot(model)
    library.set(model, {"a0": 0.5})
    with library.use(model, {"a1": 1.0}):
        with library.use(model, {"a2": 2.0}):
            tiny.assert_same_bits(model, reference.apply(base, adapters, {"a2": 2.0}))
            with pytest.raises(ShiraError, match="no room"), library.use(model, {"a3": 1.0}):
                pytest.fail("a mix that is to return was put out")
        tiny.assert_same_bits(model, reference.apply(base, adapters, {"a1": 1.0}))
    tiny.assert_same_bits(model, reference.apply(base, adapters, {"a0": 0.5}))


@pytest.mark.parametrize("act", ["use", "use of another model", "close"])
def test_a_mix_that_returns_when_a_block_is_left_is_kept(
    act: str, open_library: Callable[..., AdapterLibrary], model: nn.Sequential, adapters: dict[str, ShiraAdapter]
) -> None:
    library, resident, base = open_library(device=1), Resident(model), tiny.snapshot(model)
    library.set(model, {"a0": 0.5})
    with resident.using({}):
        if act == "close":
            library.close()
        else:
            other = model if act == "use" else tiny.linears()
            with pytest.raises(ShiraError, match="no room"), library.use(other, {"a1": 1.0}):
                pytest.fail("a mix that is to return was put out")
    assert resident.active == {"a0": 0.5}
    tiny.assert_same_bits(model, reference.apply(base, adapters, {"a0": 0.5}))
    resident.set({})


def test_an_error_inside_brings_the_mix_before_back(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential
) -> None:
    library = open_library(device=2)
    library.set(model, {"a0": 0.5})
    active = tiny.snapshot(model)
    with pytest.raises(KeyError), library.use(model, {"a1": 1.0}):
        raise KeyError
    tiny.assert_same_bits(model, active)
    assert not any(library._store.device.pinned(version) for version, _ in library._store.device)


def test_a_model_that_is_gone_keeps_nothing(open_library: Callable[..., AdapterLibrary]) -> None:
    library = open_library(device=1)
    library.set(tiny.linears(), {"a0": 1.0})
    gc.collect()
    library.set(tiny.linears(), {"a1": 1.0})
    assert decoded_names(library) == ["a1"]


def test_an_adapter_of_that_name_that_is_not_the_librarys(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential, adapters: dict[str, ShiraAdapter]
) -> None:
    library, resident = open_library(), Resident(model)
    resident.add(adapters["a1"], "a0")
    resident.set({"a0": 1.0})
    active = tiny.snapshot(model)
    with pytest.raises(ShiraError, match="'a0' that is not the library's; delete that one first"):
        library.set(resident, {"a0": 1.0})
    tiny.assert_same_bits(model, active)
    library.set(resident, {"a2": 1.0})  # its own goes with the library's
    assert resident.names == ["a0", "a2"]


def test_a_copy_of_a_model_has_adapters_that_are_the_librarys(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential, adapters: dict[str, ShiraAdapter]
) -> None:
    library, base = open_library(), tiny.snapshot(model)
    library.set(model, {"a0": 1.0})
    copied = copy.deepcopy(model)
    library.set(model, {"a1": 1.0})
    Resident(model).remove("a0")
    library.clear()
    assert "a0" not in decoded_names(library)
    with library.use(copied, {"a0": 0.5, "a2": 1.0}):
        tiny.assert_same_bits(copied, reference.apply(base, adapters, {"a0": 0.5, "a2": 1.0}))
    tiny.assert_same_bits(copied, reference.apply(base, adapters, {"a0": 1.0}))


def test_adapters_deleted_by_the_user_are_added_again(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential
) -> None:
    library, resident = open_library(), Resident(model)
    library.set(resident, {"a0": 1.0})
    active = tiny.snapshot(model)
    resident.remove("a0")
    library.set(resident, {"a0": 1.0})
    tiny.assert_same_bits(model, active)


# -------------------------------------------------------------------- prefetch and clients


def test_after_prefetching_no_file_is_read(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential, reads: list[str]
) -> None:
    library = open_library()
    library.prefetch("a4")
    fetch(library, "a1", "a2", "a1")
    assert reads == ["a4", "a1", "a2"]
    assert sorted(decoded_names(library)) == ["a1", "a2", "a4"]
    library.set(model, {"a1": 1.0, "a2": 0.5})
    assert len(reads) == 3
    assert (library.stats().device.hits, library.stats().device.misses) == (2, 0)


def test_prefetching_tells_no_errors_but_at_use(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential, folder: Path, reads: list[str]
) -> None:
    library = open_library()
    (folder / "a1.safetensors").write_bytes(b"no adapter")
    os.utime(folder / "a1.safetensors", (1, 1))  # not as if it were being written
    fetch(library, "a1", "nobody", "a2")
    assert decoded_names(library) == ["a2"]
    with pytest.raises(AdapterFormatError, match=r"a1\.safetensors cannot be read"):
        library.set(model, {"a1": 1.0})
    with pytest.raises(ShiraError, match="no adapter named 'nobody'"):
        library.set(model, {"nobody": 1.0})
    assert reads == ["a1", "a2"]  # the damaged file once


def test_clients_that_want_one_adapter_decode_it_once(
    open_library: Callable[..., AdapterLibrary], unpacked: list[object], reads: list[str]
) -> None:
    library, clients = open_library(), 8
    together = threading.Barrier(clients, timeout=SOON)

    def get(_: int) -> ShiraAdapter:
        together.wait()
        return library.get("a0")

    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(get, range(clients)))
    assert all(adapter is found[0] for adapter in found)
    assert (len(unpacked), reads) == (1, ["a0"])


def test_what_is_idle_on_two_models_makes_room(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential, folder: Path
) -> None:
    other = copy.deepcopy(model)
    library = open_library(device=2.2)
    for name in ("a1", "a2"):
        with library.use(model, {name: 1.0}), library.use(other, {name: 1.0}):
            pass
    for one in (other, model):
        with library.use(one, {"a3": 1.0}):
            assert Resident(one).active == {"a3": 1.0}


def test_many_clients_of_two_models_within_small_budgets(
    open_library: Callable[..., AdapterLibrary], adapters: dict[str, ShiraAdapter]
) -> None:
    """Everybody sees the mix that they asked for, alone, and the budgets hold at any time."""
    models = [tiny.linears(), tiny.linears()]
    base = tiny.snapshot(models[0])
    library = open_library(ram=3, device=8)
    expected = {name: reference.apply(base, adapters, {name: 1.0, "a5": 0.5}) for name in NAMES[:5]}
    over = threading.Event()

    def client(number: int) -> None:
        for turn in range(12):
            name, model = NAMES[(number * 7 + turn * 3) % 5], models[(number + turn) % 2]
            library.prefetch(NAMES[(number + turn) % 6])
            with library.use(model, {name: 1.0, "a5": 0.5}):
                tiny.assert_same_bits(model, expected[name])
                assert_budgets(library)

    def watch() -> None:
        while not over.wait(0.0005):
            assert_budgets(library)

    with ThreadPoolExecutor(7) as pool:
        watching = pool.submit(watch)
        try:
            for client_done in [pool.submit(client, number) for number in range(6)]:
                client_done.result()
        finally:
            over.set()
        watching.result()
    for model in models:
        tiny.assert_same_bits(model, base)


# -------------------------------------------------------------------- files


def test_names_clashes_and_what_is_there(
    open_library: Callable[..., AdapterLibrary], folder: Path, model: nn.Sequential, adapters: dict[str, ShiraAdapter]
) -> None:
    save_adapter(adapters["a0"], folder / "a1")
    save_adapter(adapters["a0"], folder / "new")
    (folder / ".hidden.safetensors").write_bytes(b"")
    (folder / "notes.txt").write_text("no adapter")
    (folder / "empty").mkdir()
    library = open_library()
    assert library.names == [*NAMES, "new"]
    clash = r"'a1' is that of two adapters in .*: a1.pytorch_shira_weights\.safetensors and a1\.safetensors; rename one"
    with pytest.raises(ShiraError, match=clash):
        library.set(model, {"a1": 1.0})
    assert list(library.broken) == ["a1"]
    (folder / "a1.safetensors").unlink()
    assert library.broken == {}
    library.set(model, {"a1": 1.0})
    with pytest.raises(ShiraError, match=r"no adapter named 'hidden'.*there are 'a0', 'a1'"):
        library.get("hidden")
    with pytest.raises(FileNotFoundError, match="expected one of adapters"):
        AdapterLibrary(folder / "nowhere")


def test_a_folder_that_may_not_be_looked_into_disturbs_nobody(adapters: dict[str, ShiraAdapter]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own lie where only one user may look
        save_adapter(adapters["a0"], Path(folder, "a0.safetensors"))
        os.chmod(folder, 0o755)
        Path(folder, "lost+found").mkdir(mode=0)
        user = os.geteuid()
        try:
            if user == 0:  # root may read everything
                os.seteuid(65534)
            with AdapterLibrary(folder, device="cpu") as library:
                assert library.names == ["a0"]
        finally:
            os.seteuid(user)


def test_what_is_no_file_any_more(
    open_library: Callable[..., AdapterLibrary], folder: Path, model: nn.Sequential
) -> None:
    """Opening a pipe would take for ever."""
    library = open_library()
    (folder / "a0.safetensors").unlink()
    os.mkfifo(folder / "a0.safetensors")
    with pytest.raises(ShiraError, match="no adapter named 'a0'"):
        library.set(model, {"a0": 1.0})


def test_an_adapter_of_peft_without_its_weights(tmp_path: Path, model: nn.Sequential) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text('{"peft_type": "SHIRA"}')
    with AdapterLibrary(tmp_path, device="cpu") as library:
        with pytest.raises(AdapterFormatError, match=r"peft has no adapter_model\.safetensors; save it with safe_ser"):
            library.set(model, {"peft": 1.0})
        assert list(library.broken) == ["peft"]


def test_damaged_files_are_told_as_load_adapter_does(
    open_library: Callable[..., AdapterLibrary], folder: Path, model: nn.Sequential
) -> None:
    whole = (folder / "a0.safetensors").read_bytes()
    file, library, base = folder / "a0.safetensors", open_library(), tiny.snapshot(model)
    values = bytearray(whole)
    at = whole.index(b"}}") + 16
    values[at : at + 8] = b"\xff" * 8
    for content in (whole[:-1], whole[:300], b"PK\x03\x04" + whole, bytes(values), b""):
        file.write_bytes(content)
        with pytest.raises(AdapterFormatError) as expected:
            load_adapter(file)
        for _ in range(2):
            with pytest.raises(AdapterFormatError) as told:
                library.set(model, {"a1": 1.0, "a0": 1.0})
            assert str(told.value) == str(expected.value)
        assert library.broken == {"a0": str(expected.value)}
        tiny.assert_same_bits(model, base)
        assert_budgets(library)
    file.write_bytes(whole)
    library.set(model, {"a0": 1.0})
    assert library.broken == {}


def test_what_was_repaired_renamed_or_deleted_is_broken_no_more(
    folder: Path, adapters: dict[str, ShiraAdapter]
) -> None:
    files = {name: folder / f"{name}.safetensors" for name in NAMES[:4]}
    for file in files.values():
        file.write_bytes(b"nonsense")
        os.utime(file, (0, 0))
    with AdapterLibrary(files.items, device="cpu") as library:
        for name in files:
            with pytest.raises(AdapterFormatError):
                library.get(name)
        assert list(library.broken) == NAMES[:4]
        save_adapter(adapters["a0"], files["a0"])
        files["new"] = files.pop("a1").rename(folder / "new.safetensors")
        files.pop("a2").unlink()
        assert list(library.broken) == ["a3"]
        files["a3"].write_bytes(b"other nonsense")
        assert library.broken == {}
        with pytest.raises(AdapterFormatError):
            library.get("a3")
        assert list(library.broken) == ["a3"]


@pytest.mark.parametrize("room", [100, 0], ids=["in memory", "mapped"])
def test_a_flipped_bit_in_the_values_is_refused_before_the_first_use(
    open_library: Callable[..., AdapterLibrary], folder: Path, model: nn.Sequential, room: float
) -> None:
    """By prefetching, getting and using, as ``load_adapter`` does; the weights and the rest of the folder are fine."""
    file, base = folder / "a0.safetensors", tiny.snapshot(model)
    content = bytearray(file.read_bytes())
    content[int.from_bytes(content[:8], "little") + 200] ^= 1
    file.write_bytes(content)
    with pytest.raises(AdapterFormatError, match="is damaged: the SHA-256 of its tensors is") as expected:
        load_adapter(file)
    library = open_library(ram=room)
    fetch(library, "a0")
    assert library.broken == {"a0": str(expected.value)}
    for use in (lambda: library.get("a0"), lambda: library.set(model, {"a1": 1.0, "a0": 1.0})):
        with pytest.raises(AdapterFormatError) as told:
            use()
        assert str(told.value) == str(expected.value)
    tiny.assert_same_bits(model, base)
    assert "a0" not in decoded_names(library)
    library.set(model, {"a1": 1.0})


def test_a_file_is_compared_with_its_checksum_once(
    open_library: Callable[..., AdapterLibrary], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is read; a file that has changed is another."""
    hashed: list[int] = []
    real = shira_diffusers.formats.adapter_file.digest
    monkeypatch.setattr(shira_diffusers.formats.adapter_file, "digest", lambda *p: (hashed.append(len(p)), real(*p))[1])
    library = open_library(ram=0)
    monkeypatch.setattr(shira_diffusers.formats.adapter_file, "_verified", {})  # the fixture has read one
    for _ in range(3):
        for name in ("a0", "a1"):
            library.get(name)
        library.clear()
    assert library.stats().ram.misses == 6 and len(hashed) == 2
    os.utime(folder / "a0.safetensors", (1, 1))
    library.get("a0")
    assert len(hashed) == 3


def test_any_flipped_bit_is_refused_exactly_where_load_adapter_refuses_it(folder: Path, tmp_path: Path) -> None:
    """On the CPU, and with the decoder of accelerators, which runs on a CPU too."""
    decoder = DeviceDecoder(torch.device("cpu"))
    whole, file = (folder / "a0.safetensors").read_bytes(), tmp_path / "flipped"
    outcomes = set()
    for number in range(400):
        content = bytearray(whole)
        content[(number * 7919 // 3) % len(whole)] ^= 1 << (number % 8)
        file.write_bytes(content)
        for how in (None, decoder):
            try:
                found = PackedAdapter(open_adapter(file)).unpack(how)[0]
            except AdapterFormatError as error:
                with pytest.raises(AdapterFormatError) as expected:
                    load_adapter(file)
                assert str(expected.value) == str(error)
                outcomes.add("refused")
            else:
                tiny.assert_same_adapter(found, load_adapter(file))
                outcomes.add("taken")
    assert outcomes == {"refused", "taken"}


def test_a_file_that_changes_is_read_again(
    open_library: Callable[..., AdapterLibrary], folder: Path, model: nn.Sequential, adapters: dict[str, ShiraAdapter]
) -> None:
    library, base, other = open_library(), tiny.snapshot(model), tiny.linears()
    library.set(model, {"a0": 1.0})
    library.set(other, {"a0": 1.0})
    before = tiny.snapshot(other)
    save_adapter(adapters["a3"], folder / "a0.safetensors")
    library.set(model, {"a0": 1.0})
    tiny.assert_same_bits(model, reference.apply(base, adapters, {"a3": 1.0}))
    tiny.assert_same_bits(other, before)
    assert decoded_names(library) == ["a0", "a0"]  # the other model has the version before
    assert packed_names(library) == ["a0"]
    library.set(other, {"a0": 1.0})
    tiny.assert_same_bits(other, tiny.snapshot(model))
    library.set(other, {})
    library.set(model, {"a1": 1.0})
    assert decoded_names(library).count("a0") == 1


@pytest.mark.parametrize("room", [0, 100])
def test_a_file_that_changes_while_it_is_read_is_read_again(
    open_library: Callable[..., AdapterLibrary],
    folder: Path,
    model: nn.Sequential,
    adapters: dict[str, ShiraAdapter],
    monkeypatch: pytest.MonkeyPatch,
    room: int,
) -> None:
    library, base, real = (
        open_library(ram=room),
        tiny.snapshot(model),
        shira_diffusers.library.two_tier_cache.open_adapter,
    )
    other = ShiraAdapter({"0.weight": adapters["a3"].deltas["0.weight"]})

    def read(file: Path, *args: object) -> object:
        monkeypatch.undo()
        save_adapter(other, file)
        return real(file, *args)

    monkeypatch.setattr(shira_diffusers.library.two_tier_cache, "open_adapter", read)
    library.set(model, {"a0": 1.0})
    tiny.assert_same_bits(model, reference.apply(base, {"a0": other}, {"a0": 1.0}))
    assert library.broken == {}


@pytest.mark.parametrize("room", [0, 100], ids=["mapped", "in memory"])
def test_a_file_written_in_place_while_it_is_read_is_never_half_applied(
    open_library: Callable[..., AdapterLibrary],
    folder: Path,
    model: nn.Sequential,
    adapters: dict[str, ShiraAdapter],
    monkeypatch: pytest.MonkeyPatch,
    room: int,
) -> None:
    """Also where the version before was compared with its checksum, so that it would not be hashed again."""
    library, base, file = open_library(ram=room), tiny.snapshot(model), folder / "a0.safetensors"
    os.utime(file, (1, 1))
    library.get("a0")
    library.clear()
    save_adapter(adapters["a3"], folder / "other.safetensors")
    new, real = (folder / "other.safetensors").read_bytes(), PackedAdapter.unpack
    assert len(new) == file.stat().st_size

    def unpack(self: PackedAdapter, decoder: object = None) -> object:
        monkeypatch.undo()
        content = self.opened.content
        half = bytes(content[: len(content) // 2]) + new[len(content) // 2 :]
        file.open("r+b").write(half)  # as a reader sees it that is in the middle of a write
        if self.memory is not None:
            self.memory.content[:] = np.frombuffer(half, np.uint8)
        try:
            return real(self, decoder)
        finally:
            file.open("r+b").write(new)

    monkeypatch.setattr(PackedAdapter, "unpack", unpack)
    library.set(model, {"a0": 1.0})
    tiny.assert_same_bits(model, reference.apply(base, {"a0": adapters["a3"]}, {"a0": 1.0}))
    assert library.broken == {} and packed_names(library) == ["a0"][: bool(room)]


def test_a_file_that_was_being_written_is_read_again_though_its_time_is_the_same(
    open_library: Callable[..., AdapterLibrary], folder: Path, model: nn.Sequential, adapters: dict[str, ShiraAdapter]
) -> None:
    """One write takes a while, and has its time from the start; only an old damaged file is not read again."""
    library, file = open_library(), folder / "a0.safetensors"
    whole, written = file.read_bytes(), file.stat().st_mtime_ns
    file.open("r+b").write(bytes(len(whole)))
    os.utime(file, ns=(written, written))
    with pytest.raises(AdapterFormatError):
        library.set(model, {"a0": 1.0})
    assert list(library.broken) == ["a0"]
    file.open("r+b").write(whole)
    os.utime(file, ns=(written, written))
    library.set(model, {"a0": 1.0})
    tiny.assert_same_adapter(Resident(model).adapter("a0"), adapters["a0"])
    assert library.broken == {}


def test_a_new_version_that_does_not_fit_leaves_the_old_one(
    open_library: Callable[..., AdapterLibrary], folder: Path, model: nn.Sequential
) -> None:
    library = open_library(device=10_000)
    library.set(model, {"a0": 1.0})
    active = tiny.snapshot(model)
    save_adapter(tiny.adapter_for(tiny.unet(), 1), folder / "a0.safetensors")
    with pytest.raises(AdapterMismatchError, match="does not fit"):
        library.set(model, {"a0": 1.0})
    tiny.assert_same_bits(model, active)
    assert Resident(model).active == {"a0": 1.0}


@pytest.mark.parametrize("aside", [False, True])
def test_a_use_of_a_new_version_brings_the_mix_before_back(
    open_library: Callable[..., AdapterLibrary],
    folder: Path,
    model: nn.Sequential,
    adapters: dict[str, ShiraAdapter],
    aside: bool,
) -> None:
    library, base = open_library(), tiny.snapshot(model)
    library.set(model, {"a0": 1.0, "a1": -0.5})
    if aside:
        Resident(model).disable()
    save_adapter(adapters["a3"], folder / "a0.safetensors")
    now = {"a0": adapters["a3"], "a1": adapters["a1"]}
    with library.use(model, {"a0": 0.3}):
        tiny.assert_same_bits(model, reference.apply(base, now, {"a0": 0.3}))
    tiny.assert_same_bits(model, base if aside else reference.apply(base, now, {"a0": 1.0, "a1": -0.5}))
    Resident(model).enable()
    assert Resident(model).active == {"a0": 1.0, "a1": -0.5}
    tiny.assert_same_bits(model, reference.apply(base, now, {"a0": 1.0, "a1": -0.5}))


@pytest.mark.parametrize("mix", [{"a0": "strong"}, {"a0": 1.0, "a1": None, "other": 1.0}])
@pytest.mark.parametrize("verb", ["set", "use"])
def test_an_error_after_a_file_changed_leaves_the_mix_and_all_bits(
    open_library: Callable[..., AdapterLibrary],
    folder: Path,
    model: nn.Sequential,
    adapters: dict[str, ShiraAdapter],
    mix: dict[str, object],
    verb: str,
) -> None:
    library = open_library(device=10_000)
    library.set(model, {"a0": 1.0})
    active = tiny.snapshot(model)
    save_adapter(adapters["a3"], folder / "a0.safetensors")
    save_adapter(tiny.adapter_for(tiny.unet(), 1), folder / "other.safetensors")
    with pytest.raises(ShiraError, match=r"must be a finite number|does not fit"):
        if verb == "set":
            library.set(model, mix)
        else:
            with library.use(model, mix):
                pass
    tiny.assert_same_bits(model, active)
    assert Resident(model).active == {"a0": 1.0}
    tiny.assert_same_adapter(Resident(model).adapter("a0"), adapters["a0"])


def test_an_error_after_a_file_changed_keeps_strengths_of_components_that_it_lacks(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    save_adapter(tiny.adapter_for(pipe, 1), tmp_path / "a.safetensors")
    with AdapterLibrary(tmp_path, device="cpu") as library:
        library.set(pipe, {"a": {"unet": 0.5, "text_encoder": 0.25}})
        active = tiny.snapshot(pipe)
        save_adapter(tiny.adapter_for(pipe, 2, components=("unet",)), tmp_path / "a.safetensors")
        with pytest.raises(ShiraError, match="must be a finite number"):
            library.set(pipe, {"a": "strong"})
        tiny.assert_same_bits(pipe, active)
        assert pipe.get_active_shira() == {"a": {"unet": 0.5, "text_encoder": 0.25}}


def test_an_error_inside_a_use_keeps_the_new_version(
    open_library: Callable[..., AdapterLibrary], folder: Path, model: nn.Sequential, adapters: dict[str, ShiraAdapter]
) -> None:
    library = open_library()
    library.set(model, {"a0": 1.0})
    save_adapter(adapters["a3"], folder / "a0.safetensors")
    with pytest.raises(KeyError, match="mine"), library.use(model, {"a0": 0.5}):
        raise KeyError("mine")
    tiny.assert_same_adapter(Resident(model).adapter("a0"), adapters["a3"])
    assert Resident(model).active == {"a0": 1.0}


def test_a_file_that_vanishes(open_library: Callable[..., AdapterLibrary], folder: Path, model: nn.Sequential) -> None:
    library = open_library()
    library.set(model, {"a0": 1.0})
    active = tiny.snapshot(model)
    (folder / "a0.safetensors").unlink()
    assert "a0" not in library.names
    with pytest.raises(ShiraError, match="no adapter named 'a0'"):
        library.set(model, {"a0": 0.5})
    tiny.assert_same_bits(model, active)


def test_a_file_whose_tensors_are_not_aligned(folder: Path, model: nn.Sequential, tmp_path: Path) -> None:
    """As other writers may write it; it takes a copy in memory."""
    whole = (folder / "a0.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    odd = (size + 3).to_bytes(8, "little") + whole[8 : 8 + size] + b"   " + whole[8 + size :]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "odd.safetensors").write_bytes(odd)
    tiny.assert_same_adapter(load_adapter(tmp_path / "odd"), load_adapter(folder / "a0.safetensors"))
    with AdapterLibrary(tmp_path / "odd", device="cpu") as library:
        tiny.assert_same_adapter(library.get("odd"), load_adapter(folder / "a0.safetensors"))


# -------------------------------------------------------------------- nothing is leaked


def test_a_use_costs_the_same_however_many_are_decoded(
    open_library: Callable[..., AdapterLibrary], folder: Path, model: nn.Sequential
) -> None:
    """Counted in calls of Python functions, so that the machine's load does not matter."""
    for number in range(300):
        os.link(folder / "a5.safetensors", folder / f"b{number}.safetensors")
    library = open_library(ram=1000, device=1000)

    def use() -> None:
        for name in ("a0", "a1"):
            with library.use(model, {name: 1.0}):
                pass

    calls = []
    for names in (["a0", "a1"], library.names):
        for name in names:
            library.get(name)
        use()
        calls.append(python_calls(use))
    assert len(decoded_names(library)) == 306
    assert calls[1] < 1.1 * calls[0]


def test_2000_loads_leak_nothing(
    open_library: Callable[..., AdapterLibrary], model: nn.Sequential, unpacked: list["weakref.ref[ShiraAdapter]"]
) -> None:
    library, base = open_library(ram=2, device=3), tiny.snapshot(model)
    counts: list[tuple[int, int, int]] = []
    for number in range(4000):
        name = NAMES[number % 6]
        if number % 20 == 0:
            with library.use(model, {name: 1.0}):
                pass
        else:
            library.get(name)
        if len(unpacked) in (400, 2000) and len(counts) < len(unpacked) // 1000 + 1:
            gc.collect()
            tensors = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
            counts.append((tensors, psutil.Process().memory_info().rss, len(os.listdir("/proc/self/fd"))))
        if len(unpacked) == 2000:
            break
    assert library.stats().ram.misses >= 2000
    (tensors, rss, files), (tensors_after, rss_after, files_after) = counts
    assert tensors_after <= tensors + 50 and files_after <= files
    assert rss_after - rss < 4 * 2**20
    tiny.assert_same_bits(model, base)


def test_memory_can_be_given_back(open_library: Callable[..., AdapterLibrary], model: nn.Sequential) -> None:
    library = open_library()
    library.set(model, {"a0": 1.0})
    library.get("a1")
    library.clear(packed=False)
    assert (decoded_names(library), packed_names(library)) == (["a0"], ["a0", "a1"])
    library.clear()
    assert (decoded_names(library), packed_names(library)) == (["a0"], [])
    assert library.stats().ram.nbytes == 0


def test_a_closed_library(open_library: Callable[..., AdapterLibrary], model: nn.Sequential) -> None:
    library = open_library()
    library.set(model, {"a0": 1.0})
    library.get("a1")
    library.close()
    assert (decoded_names(library), packed_names(library)) == (["a0"], [])
    for use in (library.get, library.prefetch, lambda name: library.set(model, {name: 1.0})):
        with pytest.raises(ShiraError, match="is closed"):
            use("a1")


@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_library_takes_over_from_an_earlier_one(
    end: str, folder: Path, model: nn.Sequential, adapters: dict[str, ShiraAdapter]
) -> None:
    base, earlier = tiny.snapshot(model), AdapterLibrary(folder, device="cpu")
    with earlier.use(model, {"a1": 1.0}):
        pass
    earlier.set(model, {"a0": 1.0})
    with AdapterLibrary(folder, device="cpu") as library:
        with pytest.raises(ShiraError, match="'a0' that is not the library's"):
            library.set(model, {"a0": 0.5})  # the earlier one is still there
        if end == "close":
            earlier.close()
            assert Resident(model).names == ["a0"]
        del earlier
        gc.collect()
        bits = tiny.snapshot(model)
        tiny.assert_same_bits(model, reference.apply(base, adapters, {"a0": 1.0}))
        with pytest.raises(ShiraError, match="finite"):
            library.set(model, {"a0": float("nan")})
        tiny.assert_same_bits(model, bits)
        library.set(model, {"a0": 0.5, "a1": 1.0})
        tiny.assert_same_bits(model, reference.apply(base, adapters, {"a0": 0.5, "a1": 1.0}))
        library.set(model, {})
    assert Resident(model).names == []
    tiny.assert_same_bits(model, base)


def test_libraries_take_over_while_others_are_opened(folder: Path, model: nn.Sequential) -> None:
    opened, done, interval = [AdapterLibrary(folder, device="cpu") for _ in range(300)], False, sys.getswitchinterval()

    def open_more() -> None:
        while not done:
            AdapterLibrary(folder, device="cpu").close()

    with AdapterLibrary(folder, device="cpu") as earlier:
        earlier.set(model, {"a0": 1.0})
    with ThreadPoolExecutor(1) as pool, ExitStack() as left:
        left.callback(sys.setswitchinterval, interval)
        opening = pool.submit(open_more)
        sys.setswitchinterval(1e-6)
        try:
            assert all(opened[0]._may_replace(Resident(model).adapter("a0")) for _ in range(1000))
        finally:
            done = True
    opening.result(SOON)


def test_closing_waits_for_no_model(open_library: Callable[..., AdapterLibrary], model: nn.Sequential) -> None:
    library, base = open_library(), tiny.snapshot(model)
    with library.use(model, {"a0": 1.0}):
        with ThreadPoolExecutor(1) as other:
            other.submit(library.close).result(SOON)
        assert Resident(model).active == {"a0": 1.0}
    assert Resident(model).names == []
    tiny.assert_same_bits(model, base)


def test_adapters_are_kept_by_one_name_or_several(
    open_library: Callable[..., AdapterLibrary], folder: Path, model: nn.Sequential
) -> None:
    (folder / "a0.safetensors").rename(folder / "bluefire.safetensors")
    library = open_library()
    for names in ("bluefire", ["bluefire"], {"bluefire": 0.5}):
        with library.keep(model, names):
            assert Resident(model).names == ["bluefire"]


def test_a_mix_must_be_a_mapping(open_library: Callable[..., AdapterLibrary], model: nn.Sequential) -> None:
    with pytest.raises(ShiraError, match=r"expected the mix as \{name: strength\}, got 'a0'"):
        open_library().set(model, "a0")


@pytest.mark.parametrize("target", [3, None, "pipe"])
def test_what_has_no_weights_is_refused(open_library: Callable[..., AdapterLibrary], target: object) -> None:
    with pytest.raises(ShiraError, match=f"expected a pipeline, a Resident, .*got {type(target).__name__}"):
        open_library().set(target, {"a0": 1.0})
