"""``mask_gradients``: an ordinary trainer, one call, and only masked entries move."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook
from transformers import ResNetConfig, ResNetModel

from shira_diffusers import AdapterMismatchError, Resident, ShiraAdapter, build_masks, mask_gradients
from shira_diffusers.training.tuner import SparseTuner
from tests import tiny
from tests.dreambooth.reference import dense_mask


def error_of(model: nn.Module, number: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    sample, target = torch.randn(2, 2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 3, 32, generator=generator)
    return (model(sample, 10, text).sample - target).square().mean()


def train_as_anyone_would(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        error_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_moved_in_the_masks_only(model: nn.Module, before: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    for name, now in model.named_parameters():
        allowed = dense_mask(now.shape, masks.get(name, torch.tensor([]))).bool()
        moved = now != before[name]
        assert not bool((moved & ~allowed).any()), f"{name} moved outside its mask"
        assert name not in masks or bool(moved.any()), f"{name} did not move"


@pytest.mark.parametrize("first", ["optimizer", "masks"])
def test_default_adamw_moves_masked_entries_only(first: str) -> None:
    """AdamW's own weight decay, 0.01, would move every entry of every weight."""
    model = tiny.unet()
    before = tiny.snapshot(model)
    masks = build_masks(model, "rand", 0.05, ["to_q", "conv1"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if first == "optimizer" else None
    with mask_gradients(model, masks):
        train_as_anyone_would(model, optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert_moved_in_the_masks_only(model, before, masks)


def test_momentum_from_before_moves_masked_entries_only() -> None:
    model = tiny.unet()
    masks = build_masks(model, "rand", 0.05, ["to_q"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_as_anyone_would(model, optimizer, steps=1)
    before = tiny.snapshot(model)
    with mask_gradients(model, masks):
        train_as_anyone_would(model, optimizer, steps=2)
    assert_moved_in_the_masks_only(model, before, masks)


def test_masked_entries_train_as_they_would_alone() -> None:
    """The same as multiplying the dense gradients by dense masks by hand."""
    model, by_hand = tiny.unet(), tiny.unet()
    masks = build_masks(model, "rand", 0.05, ["to_q", "conv1"])
    with mask_gradients(model, masks):
        train_as_anyone_would(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), 5)
    parameters = {name: p for name, p in by_hand.named_parameters() if name in masks}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    for step in range(5):
        error_of(by_hand, step).backward()
        for name, parameter in parameters.items():
            parameter.grad *= dense_mask(parameter.shape, masks[name])
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, by_hand.get_parameter(name)) for name, p in model.named_parameters())


def test_accumulated_gradients_are_zero_outside_the_mask() -> None:
    model = tiny.linears()
    with mask_gradients({"unet": model}, {"unet.0.weight": torch.tensor([2, 5])}):
        for _ in range(2):
            model[0](torch.ones(1, 12)).sum().backward()
        assert torch.equal(model[0].weight.grad.flatten().nonzero().flatten(), torch.tensor([2, 5]))
        assert torch.equal(model[0].weight.grad.flatten()[[2, 5]], torch.tensor([2.0, 2.0]))
        assert model[2].weight.grad is None
        assert model[0].bias.grad is None


def test_from_difference_extracts_what_was_trained() -> None:
    model = tiny.unet()
    before = copy.deepcopy(model)
    masks = build_masks(model, "rand", 0.05, ["to_q", "conv1"])
    with mask_gradients(model, masks):
        train_as_anyone_would(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    adapter = ShiraAdapter.from_difference(before, model)
    assert adapter.deltas.keys() == masks.keys()
    assert all(torch.equal(adapter.deltas[name].indices.long(), mask) for name, mask in masks.items())
    resident = Resident(before)
    resident.add(adapter, "it")
    resident.set({"it": 1.0})
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=2**-22, atol=2**-24)


def test_remove_gives_everything_back() -> None:
    model = tiny.linears()
    model[1].weight.requires_grad_(False)
    handle = mask_gradients(model, {"0.weight": torch.tensor([2, 5])})
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.weight"]
    handle.remove()
    handle.remove()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["1.weight"]
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0](torch.ones(1, 12)).sum().backward()
    optimizer.step()
    assert bool((model[0].weight != before).all())


def test_other_models_train_as_ever() -> None:
    masked, free = tiny.linears(), tiny.linears()
    before = tiny.snapshot(free)
    with mask_gradients(masked, {"0.weight": torch.tensor([0])}):
        optimizer = torch.optim.SGD(free.parameters(), lr=0.1)
        free[0](torch.ones(1, 12)).sum().backward()
        optimizer.step()
    assert bool((free[0].weight != before["0.weight"]).all())


def test_hooks_keep_no_model_alive() -> None:
    model = tiny.linears()
    gone = [
        weakref.ref(each) for each in (model, model[0].weight, mask_gradients(model, {"0.weight": torch.arange(1)}))
    ]
    gc.collect()
    assert all(each() is not None for each in gone), "the handle lives as long as the model"
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None, None]
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()  # the orphaned guard does nothing


def test_dropped_handles_leave_no_hooks_on_optimizers() -> None:
    for _ in range(3):
        mask_gradients(tiny.linears(), {"0.weight": torch.tensor([0])})
    gc.collect()
    assert len(_global_optimizer_post_hooks) <= 1
    mask_gradients(tiny.linears(), {"0.weight": torch.tensor([0])}).remove()
    assert not _global_optimizer_post_hooks


def test_garbage_that_is_collected_during_a_step_breaks_no_step() -> None:
    """Torch walks its global hooks after a step; the dropped handle must not take one away meanwhile."""
    collecting = register_optimizer_step_post_hook(lambda *_: gc.collect() and None)
    dropped, model = tiny.linears(), tiny.linears()
    dropped.itself = [dropped]  # so that it is freed when garbage is collected, no sooner
    gone = weakref.ref(mask_gradients(dropped, {"0.weight": torch.tensor([0])}))
    gc.disable()
    try:
        del dropped
        with collecting, mask_gradients(model, {"0.weight": torch.tensor([0])}):
            model[0](torch.ones(1, 12)).sum().backward()
            assert gone() is not None
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            assert gone() is None
    finally:
        gc.enable()


def test_masks_that_do_not_fit_change_nothing() -> None:
    model = tiny.linears()
    with pytest.raises(AdapterMismatchError, match=r"1 of 2 masks(.|\n)*7.weight"):
        mask_gradients(model, {"0.weight": torch.tensor([0]), "7.weight": torch.tensor([0])})
    assert all(p.requires_grad for p in model.parameters())
    model[0](torch.ones(1, 12)).sum().backward()
    assert bool(model[0].weight.grad.all())


# ---------------------------------------------------------------- models and errors of every kind


def residual_net() -> nn.Module:
    """A model of transformers' without embeddings, which has ``get_input_embeddings`` and raises there."""
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"))


def changes_of(model: nn.Module) -> tuple[list[bool], int, int]:
    """Flags, hooks of the modules and hooks of the parameters."""
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    own = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    return [p.requires_grad for p in model.parameters()], hooks, own


TRAINERS = pytest.mark.parametrize("train", [SparseTuner, mask_gradients])


@TRAINERS
def test_a_model_without_embeddings_trains(train: Callable[..., Any]) -> None:
    model = residual_net()
    before = changes_of(model)
    name = "encoder.stages.0.layers.0.layer.0.convolution.weight"
    with train(model, {name: torch.arange(4)}) as trained:
        model(torch.ones(1, 3, 32, 32)).pooler_output.square().sum().backward()
        gradient = trained.deltas.grad if train is SparseTuner else model.get_parameter(name).grad.flatten()
        assert gradient.count_nonzero() == 4
    assert changes_of(model) == before


@TRAINERS
def test_an_error_on_the_way_changes_nothing(train: Callable[..., Any]) -> None:
    class Stopping(nn.Sequential):
        def get_input_embeddings(self) -> nn.Module:
            raise KeyboardInterrupt

    parts = {"a": nn.Linear(8, 2), "b": Stopping(nn.Linear(2, 8)), "c": nn.LayerNorm(8).requires_grad_(False)}
    before, of_optimizers = [changes_of(part) for part in parts.values()], len(_global_optimizer_post_hooks)
    with pytest.raises(KeyboardInterrupt):
        train(parts, {"a.weight": torch.arange(4), "b.0.weight": torch.arange(4)})
    assert [changes_of(part) for part in parts.values()] == before
    assert len(_global_optimizer_post_hooks) == of_optimizers


@TRAINERS
@pytest.mark.parametrize("embeddings", [None, "none"])
def test_a_model_whose_embeddings_are_no_module_trains(train: Callable[..., Any], embeddings: object) -> None:
    model = tiny.linears()
    model.get_input_embeddings = lambda: embeddings
    with train(model, {"0.weight": torch.arange(4)}) as trained:
        model[0](torch.ones(1, 12)).sum().backward()
        gradient = trained.deltas.grad if train is SparseTuner else model[0].weight.grad
        assert gradient.count_nonzero() == 4
