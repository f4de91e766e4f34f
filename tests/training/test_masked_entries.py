"""Entries of many weights, read and written as one tensor, wherever the weights lie."""

import pytest
import torch
from torch import Tensor, nn

from shira_diffusers.training.masked_entries import MaskedEntries


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    convolution = torch.randn(3, 2, 3, 3).to(memory_format=torch.channels_last)
    return [nn.Parameter(torch.randn(4, 5)), nn.Parameter(convolution), nn.Parameter(torch.randn(6))]


MASKS = ([0, 7, 19], [1, 2, 30, 53], [5])
INDICES = torch.tensor([index for mask in MASKS for index in mask], dtype=torch.int32)


def entries_of(held: list[nn.Parameter]) -> MaskedEntries:
    return MaskedEntries(held, [len(mask) for mask in MASKS], INDICES)


def one_by_one(held: list[nn.Parameter]) -> Tensor:
    return torch.stack(
        [w.detach().flatten()[index].float() for w, mask in zip(held, MASKS, strict=True) for index in mask]
    )


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float16, torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("one_range", [True, False])
def test_values_go_to_their_places_and_nowhere_else(
    dtypes: tuple[torch.dtype, ...], one_range: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not one_range:  # as on a GPU without Triton: from weight to weight
        monkeypatch.setattr("shira_diffusers.weights.sweep_cpu.spans", lambda *_: False)
    held = weights()
    for weight, dtype in zip(held, dtypes, strict=True):
        weight.data = weight.data.to(dtype)
    before = [weight.detach().clone() for weight in held]
    entries = entries_of(held)
    assert torch.equal(entries.read(), one_by_one(held))
    values = torch.arange(8) + 100.0
    entries.write(values)
    assert torch.equal(one_by_one(held), values)
    assert torch.equal(entries.read(), values)
    assert [int((w != old).sum()) for w, old in zip(held, before, strict=True)] == [len(mask) for mask in MASKS]


def test_weights_that_were_cast_or_moved_are_found_again() -> None:
    held = weights()
    entries = entries_of(held)
    entries.write(torch.arange(8.0))
    old = held[0].data
    held[0].data = held[0].data.clone()
    held[1].data = held[1].data.contiguous().bfloat16()
    entries.write(torch.arange(8.0) + 1)
    assert torch.equal(one_by_one(held), torch.arange(8.0) + 1)
    assert float(old.flatten()[7]) == 1.0, "memory that is no longer the weight's was written"


def test_a_backward_that_needs_the_values_from_before_fails() -> None:
    held = weights()
    loss = (torch.ones(5, requires_grad=True) * held[0]).sum()
    entries_of(held).write(torch.zeros(8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
