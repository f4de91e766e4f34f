"""SHiRA-DoRA against dense weights, dense directions and autograd; what it keeps of the base; checkpoints."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from shira_diffusers import AdapterMismatchError, Resident, ResidentStateError, build_masks
from shira_diffusers.training.tuner import SparseTuner
from tests import tiny
from tests.dreambooth.reference import dense_mask
from tests.training.test_tuner import loss_of, models, parameters_of, small_masks, tune

SGD = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-3}


class DenseDora:
    """The slow way, in float64: by its definition, with autograd's gradients. It uses none of the library's code."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor]) -> None:
        self.model = model.double().requires_grad_(False)
        self.base = {name: model.get_parameter(name).clone() for name in masks}
        self.chosen = {name: dense_mask(w.shape, masks[name]).double() for name, w in self.base.items()}
        self.directions = {name: nn.Parameter(torch.zeros_like(w)) for name, w in self.base.items()}
        self.offsets = {name: nn.Parameter(torch.zeros(w.shape[0], dtype=w.dtype)) for name, w in self.base.items()}
        self.optimizer = torch.optim.SGD([*self.directions.values(), *self.offsets.values()], **SGD)

    def weight(self, name: str) -> Tensor:
        base, chosen = self.base[name], self.chosen[name]
        moved = base + chosen * self.directions[name]
        rows = (-1, *(1,) * (base.ndim - 1))
        magnitude = base.flatten(1).norm(dim=1) + self.offsets[name]
        whole = magnitude.view(rows) * moved / moved.flatten(1).norm(dim=1).view(rows).detach()
        return base + chosen * (whole - base)

    def step(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        self.optimizer.zero_grad()
        loss(functional_call(self.model, {name: self.weight(name) for name in self.base}, (x,))).backward()
        self.optimizer.step()


class Layers(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 5))


def squares(y: Tensor) -> Tensor:
    return (y - 1).square().sum()


def gradient_of(tuner: SparseTuner, name: str) -> Tensor:
    part = tuner.trained[name]
    assert tuner.deltas.grad is not None
    return tuner.deltas.grad[part.storage_offset() :][: part.numel()]


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("family", ["rand", "struct"])
def test_steps_equal_dense_dora(family: str) -> None:
    model = Layers()
    masks = build_masks(model, family, 0.3, "all")
    oracle = DenseDora(Layers(), masks)
    with SparseTuner(model, masks, dora=True) as tuner:
        optimizer = torch.optim.SGD([tuner.deltas], **SGD)
        for step in range(8):
            x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            for _ in range(2):  # accumulated
                (squares(model(x)) / 40).backward()
            oracle.step(x.double(), lambda y: squares(y) / 20)
            for name, mask in masks.items():
                assert_close(gradient_of(tuner, name), oracle.directions[name].grad.flatten()[mask], 1e-3)
                assert_close(gradient_of(tuner, f"{name}.magnitude"), oracle.offsets[name].grad, 1e-3)
            optimizer.step()
            optimizer.zero_grad()
            tuner.apply()
            for name in masks:
                assert_close(model.get_parameter(name).detach(), oracle.weight(name).detach(), 1e-4)
        assert all(bool(part.any()) for part in tuner.trained.values())


def test_training_begins_at_the_base_and_ends_at_it(dtype: torch.dtype) -> None:
    parts = models(dtype)
    before = {name: p.detach().clone() for name, p in parameters_of(parts).items()}
    masks = small_masks(parts)
    with SparseTuner(parts, masks, dora=True) as tuner:
        tuner.apply()
        assert all(tiny.same_bits(p, before[name]) for name, p in parameters_of(parts).items())
        tuner.deltas.data.fill_(0.5)
        tuner.apply()
        for name, now in parameters_of(parts).items():
            mask = dense_mask(now.shape, masks.get(name, torch.tensor([]))).bool()
            assert torch.equal(now[~mask], before[name][~mask])
            assert name not in masks or bool((now[mask] != before[name][mask]).float().mean() > 0.9)
    assert all(tiny.same_bits(p, before[name]) for name, p in parameters_of(parts).items())


def test_the_adapter_is_one_as_any_other() -> None:
    parts = models()
    masks = small_masks(parts)
    with SparseTuner(parts, masks, dora=True) as tuner:
        tune(tuner, partial(loss_of, parts), 3)
        trained = {name: p.detach().clone() for name, p in parameters_of(parts).items()}
        adapter = tuner.adapter(dtype=torch.float32)
    assert {name: delta.nnz for name, delta in adapter.deltas.items()} == {n: m.numel() for n, m in masks.items()}
    resident = Resident(parts)
    resident.add(adapter, "it")
    resident.set({"it": 1.0})
    assert all(tiny.same_bits(p, trained[name]) for name, p in parameters_of(parts).items())


def test_a_row_of_zeros_stays_finite() -> None:
    model = nn.Linear(6, 4, bias=False)
    model.weight.data[1] = 0
    with SparseTuner(model, {"weight": torch.tensor([0, 1, 6, 7, 20])}, dora=True) as tuner:
        optimizer = torch.optim.AdamW([tuner.deltas], lr=0.1)
        for _ in range(3):
            model(torch.ones(2, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            tuner.apply()
        assert bool(torch.isfinite(tuner.deltas).all())
        assert bool(torch.isfinite(model.weight).all())


def test_checkpoint_goes_on_bit_for_bit() -> None:
    whole, halves = models(), models()
    masks = small_masks(whole)
    with SparseTuner(whole, masks, dora=True) as tuner:
        tune(tuner, partial(loss_of, whole), 2)
        state = tuner.state_dict()
        with SparseTuner(halves, state["masks"], dora=True) as resumed:
            resumed.load_state_dict(state)
            for one, parts in ((tuner, whole), (resumed, halves)):
                tune(one, partial(loss_of, parts), 2)
            assert torch.equal(resumed.deltas, tuner.deltas)
            other = parameters_of(halves)
            assert all(torch.equal(p, other[name]) for name, p in parameters_of(whole).items())


def test_a_checkpoint_of_the_other_kind_is_refused() -> None:
    model = tiny.linears()
    masks = {"0.weight": torch.tensor([0, 1])}
    with SparseTuner(model, masks, dora=True) as tuner:
        state = tuner.state_dict()
    with SparseTuner(model, masks) as tuner, pytest.raises(AdapterMismatchError, match=r"22 trained.*expected 2.*dora"):
        tuner.load_state_dict(state)


def test_weights_without_rows_are_refused() -> None:
    model = nn.Module()
    model.scale, model.bias = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(4))
    masks = {"scale": torch.tensor([0]), "bias": torch.tensor([1, 2])}
    message = r"1 of 2 parameters cannot be trained with dora.*without dora:\n  - scale of shape \(\): expected rows"
    with pytest.raises(ResidentStateError, match=message):
        SparseTuner(model, masks, dora=True)
    assert all(p.requires_grad for p in model.parameters())
    with SparseTuner(model, masks) as tuner:
        assert tuner.deltas.shape == (3,)
