"""Entries of many weights as one: the same bits as weight by weight, and nothing beside them is touched."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shira_diffusers import Resident
from shira_diffusers.weights import sweep_cpu, sweep_triton
from shira_diffusers.weights.finder import identity
from shira_diffusers.weights.scatter import gather
from tests import tiny
from tests.weights.test_scatter import CUDA, DTYPES, LAYOUTS


def weights_of(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """A weight of each layout, each in a buffer with room around it."""
    weights = []
    for layout in LAYOUTS.values():
        plain = layout()
        room = torch.full((plain.untyped_storage().nbytes() // 4 + 64,), 7.0, device=device).to(dtype)
        weight = room.as_strided(plain.shape, plain.stride(), 32)
        weights.append(weight.copy_(plain))
    return weights


def entries_of(weights: list[Tensor], seed: int = 0) -> tuple[list[int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = [
        torch.randperm(w.numel(), generator=generator)[: max(1, w.numel() // 3)].sort().values.int() for w in weights
    ]
    return [part.numel() for part in chosen], torch.cat(chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("access", "device"),
    [
        (sweep_cpu.access, "cpu"),
        (sweep_cpu._access_one_by_one, "cpu"),
        pytest.param(sweep_triton.access, "cuda", marks=[pytest.mark.cuda, CUDA]),
        pytest.param(sweep_cpu._access_one_by_one, "cuda", marks=[pytest.mark.cuda, CUDA]),
    ],
)
def test_reads_and_writes_the_entries_and_nothing_else(
    access: Callable[..., sweep_cpu.Access], dtype: torch.dtype, device: str
) -> None:
    weights = weights_of(dtype, device)
    sizes, indices = entries_of(weights)
    read, write = access(weights, sizes, indices.to(device))
    expected = [gather(w, part) for w, part in zip(weights, indices.split(sizes), strict=True)]
    assert tiny.same_bits(read(), torch.cat(expected))
    values = torch.randn(len(indices), generator=torch.Generator().manual_seed(1)).to(device).to(dtype)
    buffers = [w.as_strided((w.untyped_storage().nbytes() // dtype.itemsize,), (1,), 0) for w in weights]
    before = [buffer.clone() for buffer in buffers]
    write(values)
    assert tiny.same_bits(read(), values)
    for weight, buffer, old, own, new in zip(
        weights, buffers, before, indices.split(sizes), values.split(sizes), strict=True
    ):
        undone = torch.as_strided(old, weight.shape, weight.stride(), 32).contiguous().view(-1)
        undone[own.long()] = new
        assert tiny.same_bits(weight.contiguous().view(-1), undone)
        changed = (buffer.view(torch.uint8) != old.view(torch.uint8)).view(-1, dtype.itemsize).any(1)
        assert int(changed.sum()) <= len(own)


def test_a_range_needs_one_dtype_on_the_cpu_and_aligned_entries() -> None:
    assert sweep_cpu.spans([torch.zeros(4), torch.zeros(3, 3)])
    assert not sweep_cpu.spans([torch.zeros(4), torch.zeros(4).half()])
    assert not sweep_cpu.spans([torch.zeros(4), torch.zeros(4, device="meta")])
    shifted = torch.frombuffer(bytearray(18), dtype=torch.uint8)[2:].view(torch.int16)
    aligned = torch.zeros(8, dtype=torch.int16)
    assert sweep_cpu.spans([aligned, shifted])
    odd = torch.frombuffer(bytearray(17), dtype=torch.int16, count=8, offset=1)
    assert not sweep_cpu.spans([aligned, odd])


def test_the_identity_tells_moved_and_restrided_weights() -> None:
    weight = torch.zeros(2, 3, 4, 4)
    kept = identity(weight)
    assert identity(weight) == kept
    assert identity(weight.clone()) != kept
    assert identity(weight.view(2, 3, 16)) != kept
    assert identity(weight.view(torch.int32)) != kept


def test_weights_that_move_between_switches_are_found_again() -> None:
    model = nn.ModuleDict({"one": tiny.linears(1), "two": tiny.linears(2)})
    resident = Resident(model)
    resident.add(tiny.adapter_for(model, 1, only=("",)), "a")
    resident.add(tiny.adapter_for(model, 2, only=("",)), "b")
    base = tiny.snapshot(model)
    resident.set({"a": 1.0})
    bits = tiny.snapshot(model)
    left = []
    for parameter in model.parameters():
        left.append((parameter.data, parameter.data.clone()))
        parameter.data = parameter.data.clone()
    resident.set({"b": 1.0})
    resident.set({"a": 1.0})
    tiny.assert_same_bits(model, bits)
    resident.clear()
    tiny.assert_same_bits(model, base)
    assert all(torch.equal(old, then) for old, then in left)  # what it no longer holds was left alone


def test_a_copied_model_writes_into_its_own_weights() -> None:
    model = tiny.linears(1)
    resident = Resident(model)
    resident.add(tiny.adapter_for(model, 1, only=("",)), "a")
    base = tiny.snapshot(model)
    resident.set({"a": 1.0})
    bits = tiny.snapshot(model)
    twin = copy.deepcopy(model)
    Resident(twin).clear()
    tiny.assert_same_bits(model, bits)
    tiny.assert_same_bits(twin, base)
