"""Folders for PEFT: PEFT itself loads them, and its model has the outputs of ours."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from shira_diffusers import AdapterMismatchError, Resident, ShiraAdapter, ShiraError, SparseDelta, build_masks
from shira_diffusers.formats.peft import load_peft_adapter
from shira_diffusers.formats.peft_export import rank_for_peft, save_peft_adapter, split_for_peft
from tests import tiny

LINEAR = ("to_q", "to_k", "to_v", "to_out", "ff.net")


def resident_with(model: nn.Module, adapter: ShiraAdapter) -> nn.Module:
    resident = Resident(model)
    resident.add(adapter, "a")
    resident.set({"a": 1.0})
    return model


def of_family(family: str) -> ShiraAdapter:
    """Random values on the masks of a family."""
    model = tiny.unet()
    masks = build_masks(model, family, 0.03, "attention+ff", seed=0)
    shapes = {name: tuple(weight.shape) for name, weight in tiny.weights_of(model).items()}
    return ShiraAdapter({n: SparseDelta(at, torch.randn(len(at)), shapes[n]) for n, at in masks.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_from_pretrained_has_our_outputs(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = tiny.adapter_for(tiny.unet(), only=LINEAR, density=0.05, dtype=dtype)
    folder = save_peft_adapter(adapter, tmp_path / "new" / "peft")
    model = PeftModel.from_pretrained(tiny.unet(), folder)
    expected = tiny.run_unet(resident_with(tiny.unet(), adapter))
    assert torch.equal(tiny.run_unet(model), expected)
    assert not torch.equal(tiny.run_unet(tiny.unet()), expected)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"


@pytest.mark.parametrize("family", ["struct", "rand", "wm", "block"])
def test_any_mask(tmp_path: Path, family: str) -> None:
    """Also through ``get_peft_model``, and merged into the weights."""
    adapter = of_family(family)
    folder = save_peft_adapter(adapter, tmp_path / "peft")
    model = get_peft_model(tiny.unet(), ShiraConfig.from_pretrained(folder))
    outcome = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    assert not outcome.unexpected_keys
    ours = resident_with(tiny.unet(), adapter)
    assert torch.equal(tiny.run_unet(model), tiny.run_unet(ours))
    merged = model.merge_and_unload()
    expected = tiny.snapshot(ours)
    assert all(torch.equal(weight, expected[name]) for name, weight in tiny.snapshot(merged).items())


def test_each_weight_has_r_times_in_plus_out_entries(tmp_path: Path) -> None:
    """The smallest ``r``, zeros at the first free places, each place once, in row-major order."""
    first = SparseDelta(torch.tensor([1, 29, 30, 31, 32]), torch.arange(1.0, 6.0), (3, 20))
    second = SparseDelta(torch.tensor([0]), torch.tensor([7.0]), (10, 8))
    adapter = ShiraAdapter({"a.weight": first, "b.weight": second})
    folder = save_peft_adapter(adapter, tmp_path / "peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model."
    assert rank_for_peft(adapter) == 1
    rows, columns = tensors[f"{prefix}a.shira_indices"]
    assert (rows * 20 + columns).tolist() == [*range(19), 29, 30, 31, 32]
    assert tensors[f"{prefix}a.shira_weight"].tolist() == [0.0, 1.0, *[0.0] * 17, 2.0, 3.0, 4.0, 5.0]
    assert tensors[f"{prefix}b.shira_indices"].tolist() == [[0] * 8 + [1] * 8 + [2] * 2, [*range(8), *range(8), 0, 1]]
    assert tensors[f"{prefix}b.shira_weight"].tolist() == [7.0, *[0.0] * 17]
    assert tensors[f"{prefix}a.shira_indices"].dtype == torch.int32
    denser = SparseDelta(torch.arange(24), torch.ones(24), (3, 20))
    assert rank_for_peft(ShiraAdapter({"a.weight": denser, "b.weight": second})) == 2


def test_it_comes_back(tmp_path: Path) -> None:
    model = tiny.unet()
    adapter = tiny.adapter_for(model, only=LINEAR, density=0.05)
    found = load_peft_adapter(save_peft_adapter(adapter, tmp_path / "peft"), model)
    assert found.deltas.keys() == adapter.deltas.keys()
    assert all(torch.equal(d.to_dense(), found.deltas[name].to_dense()) for name, d in adapter.deltas.items())


def test_layers_whose_names_end_alike_are_let_be(tmp_path: Path) -> None:
    """PEFT compares the ends of a list's names: ``0`` would mean ``inner.0`` too."""
    model = nn.ModuleDict({"0": nn.Linear(4, 5), "inner": nn.Sequential(nn.Linear(4, 5))})
    adapter = ShiraAdapter({"0.weight": SparseDelta(torch.tensor([3]), torch.ones(1), (5, 4))})
    loaded = PeftModel.from_pretrained(model, save_peft_adapter(adapter, tmp_path / "peft"))
    assert [name for name, _ in loaded.named_parameters() if "shira" in name] == [
        "base_model.model.0.shira_weight.default"
    ]


def test_convolutions_are_refused_by_name(tmp_path: Path) -> None:
    adapter = tiny.adapter_for(tiny.unet(), only=("to_q", "conv1"), density=0.05)
    convolutions = [name for name in adapter.deltas if "conv1" in name]
    with pytest.raises(AdapterMismatchError) as caught:
        save_peft_adapter(adapter, tmp_path / "peft")
    assert f"and {len(convolutions)} weights of this adapter are of other layers" in str(caught.value)
    assert all(name in str(caught.value) for name in convolutions[:8])
    linear, rest = split_for_peft(adapter)
    assert rest == convolutions
    assert list(linear.deltas) == [name for name in adapter.deltas if "to_q" in name]
    assert not any(tmp_path.iterdir())
    model = PeftModel.from_pretrained(tiny.unet(), save_peft_adapter(linear, tmp_path / "peft"))
    assert torch.equal(tiny.run_unet(model), tiny.run_unet(resident_with(tiny.unet(), linear)))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lambda: ShiraAdapter({}), "has no entries in weights of Linear layers: there is nothing to export"),
        (
            lambda: ShiraAdapter(
                {
                    "wide.weight": SparseDelta(torch.arange(900), torch.ones(900), (30, 30)),
                    "small.weight": SparseDelta(torch.tensor([0]), torch.ones(1), (4, 4)),
                }
            ),
            r"r = 15, which the densest mask needs, is more than 1 of 2 weights can hold.*\n  - small.weight: 15 \* 8",
        ),
    ],
    ids=["empty", "too dense"],
)
def test_what_peft_cannot_hold(tmp_path: Path, adapter: Callable[[], ShiraAdapter], message: str) -> None:
    with pytest.raises(AdapterMismatchError, match=message):
        save_peft_adapter(adapter(), tmp_path / "peft")
    assert not any(tmp_path.iterdir())


def test_memory_goes_with_the_entries_that_are_written(tmp_path: Path) -> None:
    """Not with the shape that a file claims, of which a bit per entry would be 8 GB here."""
    delta = SparseDelta(torch.tensor([3, 2**36 - 1]), torch.tensor([1.0, 2.0]), (2**18, 2**18))
    folder = save_peft_adapter(ShiraAdapter({"a.weight": delta}), tmp_path / "peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors["base_model.model.a.shira_indices"][:, -2:].tolist() == [[1, 2**18 - 1], [2**18 - 2, 2**18 - 1]]
    assert tensors["base_model.model.a.shira_weight"].nonzero().flatten().tolist() == [3, 2**19 - 1]


def test_shapes_that_would_fill_the_disk_with_zeros_are_refused(tmp_path: Path) -> None:
    huge = ShiraAdapter({"a.weight": SparseDelta(torch.tensor([3]), torch.ones(1), (2**31, 2**31))})
    with pytest.raises(AdapterMismatchError, match=r"1 entry.*with 4,294,967,295 zeros.*\n  - a.weight: \(21474"):
        save_peft_adapter(huge, tmp_path / "peft")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_exists_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ShiraError, match="exists, expected a new folder; choose another name"):
        save_peft_adapter(tiny.adapter_for(tiny.unet(), only=("to_q",), density=0.05), tmp_path)
    assert not any(tmp_path.iterdir())
