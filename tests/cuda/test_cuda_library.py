"""What only an NVIDIA GPU can show of the library: decoding there, pinned memory, streams, budgets in its memory."""

import gc
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from shira_diffusers import AdapterFormatError, AdapterLibrary, ShiraAdapter, SparseDelta, load_adapter, save_adapter
from shira_diffusers.formats import opened_adapter as opened_adapter_module
from shira_diffusers.formats.gap_codec import encode_gaps
from shira_diffusers.formats.gpu_decoder import DeviceDecoder
from shira_diffusers.formats.opened_adapter import open_adapter
from shira_diffusers.formats.shira_file import encode
from shira_diffusers.library.packed_adapter import HostMemory, PackedAdapter
from tests import tiny

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def pack_file(file: Path) -> PackedAdapter:
    memory = HostMemory(file.stat().st_size, device())
    return PackedAdapter(open_adapter(file, memory.fill), memory)


def large(seed: int = 0) -> ShiraAdapter:
    """Two million entries at 1 %, 0.01 % and 30 %: gaps of two dtypes, more than one group of any."""
    generator, deltas = torch.Generator().manual_seed(seed), {}
    for number, (density, numel) in enumerate([(0.01, 10_000_000)] * 12 + [(0.0001, 10_000_000), (0.3, 1_000_000)] * 3):
        count = round(density * numel)
        gaps = torch.rand(count, generator=generator).clamp_min_(1e-9).log_() / math.log1p(-density)
        at = gaps.long().cumsum(0) + torch.arange(count)
        at = at[at < numel]
        deltas[f"w{number:02}"] = SparseDelta(at, torch.randn(at.numel(), generator=generator).half(), (numel,))
    assert {encode_gaps(delta.indices.numpy()).dtype.name for delta in deltas.values()} == {"uint8", "uint16"}
    return ShiraAdapter(deltas)


def runs() -> ShiraAdapter:
    """Aligned runs of 32."""
    at = torch.randperm(100_000, generator=torch.Generator().manual_seed(0))[:2000].sort().values
    indices = (at[:, None] * 32 + torch.arange(32)).flatten()
    return ShiraAdapter({"w": SparseDelta(indices, torch.randn(indices.numel()).half(), (3_200_000,))})


def assert_same(found: ShiraAdapter, expected: ShiraAdapter) -> None:
    assert found.deltas.keys() == expected.deltas.keys()
    for name, delta in found.deltas.items():
        assert (
            delta.indices.is_cuda
            and delta.values.is_cuda
            and delta.indices.dtype == expected.deltas[name].indices.dtype
        )
        assert torch.equal(delta.indices.cpu(), expected.deltas[name].indices)
        assert torch.equal(delta.values.cpu(), expected.deltas[name].values)


def test_the_gpu_decodes_the_bits_that_a_cpu_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = DeviceDecoder(device())
    for number, expected in enumerate((large(), runs())):
        file = save_adapter(expected, tmp_path / f"{number}.safetensors")
        source = pack_file(file)
        assert source.memory is not None and source.memory.pinned
        assert torch.from_numpy(source.memory.content).is_pinned()
        for piece in (2**23, 300_000):
            with monkeypatch.context() as patch:
                patch.setattr(opened_adapter_module, "to_adapter", lambda *_, **__: pytest.fail("decoded on the CPU"))
                patch.setattr("shira_diffusers.formats.gpu_decoder._PIECE", piece)
                adapter, held = source.unpack(decoder)
            assert_same(adapter, load_adapter(file))
            assert sum(tensor.nbytes for tensor in held) == adapter.nbytes == source.opened.decoded_nbytes
            assert len({tensor.untyped_storage().data_ptr() for tensor in held}) == 2  # all indices, all values


def test_the_gpu_decodes_files_of_version_1(tmp_path: Path) -> None:
    adapter = large()
    tensors, header = encode(adapter)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", header)
    assert_same(pack_file(tmp_path / "a.safetensors").unpack(DeviceDecoder(device()))[0], adapter)


def test_load_shira_decodes_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, other = tiny.pipeline().to("cuda"), tiny.pipeline().to("cuda")
    adapter = tiny.adapter_for(pipe, dtype=torch.float16)
    file = save_adapter(adapter, tmp_path / "a.safetensors")
    base = tiny.snapshot(pipe)
    monkeypatch.setattr(opened_adapter_module, "to_adapter", lambda *_, **__: pytest.fail("decoded on the CPU"))
    pipe.load_shira(file, "a")
    other.load_shira(adapter, "a")
    tiny.assert_same_bits(pipe, tiny.snapshot(other))
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, base)


def test_a_decoding_waits_for_the_gpu_once(tmp_path: Path) -> None:
    source, decoder = pack_file(save_adapter(large(), tmp_path / "a.safetensors")), DeviceDecoder(device())
    source.unpack(decoder)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        source.unpack(decoder)
    assert len([event.name for event in profile.events() if "DtoH" in event.name]) == 1


def test_every_damage_is_refused_with_the_words_of_load_adapter(tmp_path: Path) -> None:
    adapter = tiny.adapter_for(tiny.linears(), 0, only=("",), dtype=torch.float16)
    whole = save_adapter(adapter, tmp_path / "whole.safetensors").read_bytes()
    decoder, file, outcomes = DeviceDecoder(device()), tmp_path / "flipped.safetensors", set()
    for number in range(300):
        content = bytearray(whole)
        content[(number * 7919 // 3) % len(whole)] ^= 1 << (number % 8)
        file.write_bytes(content)
        try:
            found = pack_file(file).unpack(decoder)[0]
        except AdapterFormatError as error:
            with pytest.raises(AdapterFormatError) as expected:
                load_adapter(file)
            assert str(expected.value) == str(error)
            outcomes.add("refused")
        else:
            assert_same(found, load_adapter(file))
            outcomes.add("taken")
    assert outcomes == {"refused", "taken"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_those_after_load_shira(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs, ours = (tiny.pipeline(dtype).to("cuda") for _ in range(2))
    base = tiny.snapshot(ours)
    for seed, name in enumerate("abc"):
        save_adapter(tiny.adapter_for(ours, seed, dtype=torch.float16), tmp_path / f"{name}.safetensors")
        theirs.load_shira(tmp_path / f"{name}.safetensors", name)
    with AdapterLibrary(tmp_path) as library:
        assert library.device.type == "cuda"
        for mix in ({"a": 1.0}, {"b": 0.7}, {"a": 0.3, "c": -1.2}, {"c": 1.0}):
            theirs.set_shira(list(mix), list(mix.values()))
            with library.use(ours, mix):
                tiny.assert_same_bits(ours, tiny.snapshot(theirs))
        tiny.assert_same_bits(ours, base)


def test_adapters_on_the_gpu_and_on_the_cpu_are_mixed_and_fused(tmp_path: Path) -> None:
    pipe, other = tiny.pipeline().to("cuda"), tiny.pipeline().to("cuda")
    first, second = (tiny.adapter_for(pipe, seed, dtype=torch.float16) for seed in range(2))
    pipe.load_shira(save_adapter(first, tmp_path / "a.safetensors"), "a")
    pipe.load_shira(second, "b")
    other.load_shira(first, "a")
    other.load_shira(second, "b")
    for each in (pipe, other):
        each.set_shira({"a": 0.5, "b": -1.0})
    tiny.assert_same_bits(pipe, tiny.snapshot(other))
    files = [each.save_shira(tmp_path / name) for each, name in ((pipe, "mixed"), (other, "plain"))]
    assert load_adapter(files[0]).deltas == load_adapter(files[1]).deltas
    assert pipe.fuse_report(["a", "b"]) == other.fuse_report(["a", "b"])


def test_loading_beside_work_on_the_gpu_disturbs_neither(tmp_path: Path) -> None:
    """Adapters come and go in one small budget, on streams of the library's, while the default stream is kept busy."""
    expected = {}
    for seed, name in enumerate("abcd"):
        file = save_adapter(large(seed), tmp_path / f"{name}.safetensors")
        expected[name] = load_adapter(file)
    each = expected["a"].nbytes
    busy = torch.randn(2048, 2048, device="cuda")
    with AdapterLibrary(tmp_path, device_bytes=2 * each + each // 2) as library:
        for turn in range(40):
            name = "abcd"[turn * 7 % 4]
            adapter = library.get(name)
            library.prefetch("abcd"[(turn + 1) * 7 % 4])
            for _ in range(20):
                busy = torch.tanh(busy @ busy)
            sums = {n: (d.indices.sum(), d.values.float().sum()) for n, d in adapter.deltas.items()}
            del adapter
            for weight, (indices, values) in sums.items():
                delta = expected[name].deltas[weight]
                assert int(indices) == int(delta.indices.sum())
                assert float(values) == pytest.approx(float(delta.values.float().sum()), abs=0.5)
    assert bool(torch.isfinite(busy).all())


def test_many_loads_leak_neither_gpu_memory_nor_pinned_memory(tmp_path: Path) -> None:
    each = 0
    for seed, name in enumerate("abcd"):
        file = save_adapter(large(seed), tmp_path / f"{name}.safetensors")
        each = max(each, load_adapter(file).nbytes)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with AdapterLibrary(tmp_path, ram_bytes=2 * file.stat().st_size, device_bytes=2 * each) as library:
        used = []
        for turn in range(60):
            library.get("abcd"[turn % 4])
            used.append(torch.cuda.memory_allocated() - before)
        assert max(used) <= library.stats().device.budget + 2**20  # rounded up by torch, tensor by tensor
        assert library.stats().device.evictions > 50
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 2**20
