"""How the deltas of a mix are laid end to end."""

import torch

from shira_diffusers import Resident
from shira_diffusers.engine.plan import end_to_end
from shira_diffusers.formats.shira_file import load_adapter, save_adapter
from tests import tiny


def test_neighbours_are_viewed_and_others_copied() -> None:
    whole = torch.arange(10)
    empty = whole[4:4]
    for parts in ([whole[:4], whole[4:]], [whole[2:4], empty, whole[4:9]], [empty, whole[3:5]]):
        joined = end_to_end(parts)
        assert torch.equal(joined, torch.cat(parts))
        assert joined.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert end_to_end([empty, empty]).numel() == 0
    for parts in (
        [whole[4:], whole[:4]],
        [whole[:4], whole[5:]],
        [whole[:4].clone(), whole[4:]],
        [whole[:6:2], whole[6:]],
        [whole[:4], whole[4:].view(torch.float64)],
    ):
        joined = end_to_end(parts)
        assert torch.equal(joined, torch.cat(parts))
        assert joined.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


def test_an_adapter_from_a_file_is_not_held_twice(tmp_path: object) -> None:
    model = tiny.unet()
    file = save_adapter(tiny.adapter_for(model, 1), tmp_path / "a.safetensors")
    resident = Resident(model)
    resident.add(load_adapter(file), "a")
    resident.set({"a": 1.0})
    (saved,) = model._shira.overwritten
    first = next(iter(model._shira.adapters["a"].deltas.values()))
    assert saved.plan.indices.data_ptr() == first.indices.data_ptr()
