"""A default device other than the model's changes nothing: all that is created names its device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shira_diffusers import (
    AdapterLibrary,
    Resident,
    ShiraAdapter,
    build_masks,
    convert_lora,
    fuse,
    load_adapter,
    mask_gradients,
    remove_shira_attn_processors,
    save_adapter,
    set_shira_attn_processors,
)
from shira_diffusers.formats.peft_export import save_peft_adapter
from shira_diffusers.masks.families import FAMILIES
from shira_diffusers.masks.sparsify import Ranking, sparsify
from shira_diffusers.training.tuner import SparseTuner
from tests import loras, tiny


@contextmanager
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("avoids", [False, True])
def test_masks(family: str, avoids: bool) -> None:
    model = tiny.linears()
    calibration = {name: torch.rand(w.shape) for name, w in model.state_dict().items() if w.ndim > 1}
    avoid = [tiny.adapter_for(model, 3, only=("",), density=0.002)] if avoids else []
    expected = build_masks(model, family, 0.1, "all", calibration=calibration, avoid=avoid)
    with elsewhere():
        masks = build_masks(model, family, 0.1, "all", calibration=calibration, avoid=avoid)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())


def test_a_pipeline(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    base = {name: weight.clone() for name, weight in tiny.weights_of(pipe).items()}
    adapters = {name: tiny.adapter_for(pipe, seed) for seed, name in enumerate(("a", "b", "c"))}
    pipe.load_shira(save_adapter(adapters["a"], tmp_path / "first.safetensors"), "a")
    for name in "bc":
        pipe.load_shira(save_adapter(adapters[name], tmp_path / f"{name}.safetensors"), name, activate=False)
    mix = {"a": 0.5, "b": 1.5, "c": -1.0}
    pipe.set_shira(list(mix), list(mix.values()))
    expected = {name: weight.clone() for name, weight in tiny.weights_of(pipe).items()}
    pipe.unload_shira()
    with elsewhere():
        for name, adapter in adapters.items():
            path = save_adapter(adapter, tmp_path / f"again-{name}.safetensors")
            pipe.load_shira(path, name, activate=False)
        pipe.set_shira(list(mix), list(mix.values()))
        pipe.fuse_report(["a", "b"])
        pipe.save_shira(tmp_path / "mix")
        mixed = {name: weight.clone() for name, weight in tiny.weights_of(pipe).items()}
        pipe.set_shira("a", {"unet": {"down": 0.5}})
        pipe.unload_shira()
        AdapterLibrary(tmp_path).set(pipe, {"first": 1.0})
        AdapterLibrary(tmp_path).set(pipe, {})
        after = dict(tiny.weights_of(pipe))
        fused = fuse(adapters, list(mix.values()))
        told = load_adapter(tmp_path / "again-a.safetensors")
    assert all(torch.equal(mixed[name], weight) for name, weight in expected.items())
    assert all(torch.equal(after[name], weight) for name, weight in base.items())
    plain = fuse(adapters, list(mix.values()))
    assert all(torch.equal(fused.deltas[name].values, delta.values) for name, delta in plain.deltas.items())
    assert all(torch.equal(told.deltas[name].values, delta.values) for name, delta in adapters["a"].deltas.items())


@pytest.mark.parametrize("seed", range(2))
def test_a_module_of_many_adapters(seed: int) -> None:
    model = tiny.linears().half()
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapters = {name: tiny.adapter_for(model, seed + k, only=("",)) for k, name in enumerate("abcdef")}
    resident = Resident(model)
    with elsewhere():
        for name, adapter in adapters.items():
            resident.add(adapter, name)
        resident.set(dict.fromkeys(adapters, 0.5))
        resident.set({"a": 1.0})
        resident.remove("a")
        resident.clear()
    assert all(torch.equal(weight, base[name]) for name, weight in model.state_dict().items())


def trained(model: nn.Module, masks: dict[str, Tensor], x: Tensor) -> ShiraAdapter:
    tuner = SparseTuner(model, masks)
    (model[2](model[0](x)[..., :20]).square().sum()).backward()
    torch.optim.SGD([tuner.deltas], lr=0.1).step()
    tuner.apply()
    adapter = tuner.adapter(dtype=torch.float32)
    tuner.restore()
    return adapter


@pytest.mark.parametrize("family", ["rand", "struct"])
def test_training(family: str) -> None:
    model, x = tiny.linears(), torch.rand(3, 12)
    masks = build_masks(model, family, 0.2, ["0", "2"])
    expected = trained(model, masks, x)
    with elsewhere():
        found = trained(model, masks, x)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        with mask_gradients(model, masks):
            model[0](x).sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        difference = ShiraAdapter.from_difference(before, model.state_dict())
    assert all(torch.equal(found.deltas[name].values, delta.values) for name, delta in expected.deltas.items())
    assert difference.nnz


@pytest.mark.parametrize("kohya", [False, True])
def test_a_lora(kohya: bool, tmp_path: Path) -> None:
    unet, text = loras.adapted(tiny.unet(), loras.UNET), loras.adapted(tiny.text_encoder(), loras.TEXT, 1)
    file = loras.of_kohya(tmp_path / "a.safetensors", unet, text) if kohya else loras.of_diffusers(tmp_path, unet, text)
    pipe = tiny.pipeline()
    expected = convert_lora(file, pipe, 0.05)
    with elsewhere():
        assert convert_lora(file, pipe, 0.05).adapter.deltas == expected.adapter.deltas


def test_an_export_for_peft(tmp_path: Path) -> None:
    adapter = tiny.adapter_for(tiny.linears(), only=("0.weight",))
    with elsewhere():
        again = save_peft_adapter(adapter, tmp_path / "again")
    plain = save_peft_adapter(adapter, tmp_path / "plain")
    assert [file.read_bytes() for file in sorted(again.iterdir())] == [f.read_bytes() for f in sorted(plain.iterdir())]


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_top_entries_of_updates(ranking: Ranking) -> None:
    updates = {name: weight.detach() for name, weight in tiny.linears().named_parameters()}
    expected = sparsify(updates.items, 0.1, ranking=ranking)
    with elsewhere():
        assert sparsify(updates.items, 0.1, ranking=ranking) == expected


def test_side_branches() -> None:
    model, x = tiny.linears(), torch.rand(3, 12)
    adapter = tiny.adapter_for(model, only=("",))
    set_shira_attn_processors(model, adapter)
    expected = model[0](x)
    with elsewhere():
        set_shira_attn_processors(model, adapter)
        assert torch.equal(model[0](x), expected)
        remove_shira_attn_processors(model)
