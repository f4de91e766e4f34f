"""Second moments of layers' inputs, and values fitted to them, against least squares on the inputs themselves."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shira_diffusers import AdapterMismatchError
from shira_diffusers.masks import activations
from shira_diffusers.masks.activations import ActivationChooser, fit_rows, input_moments
from shira_diffusers.masks.sparsify import sparsify

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def correlated(rows: int, width: int) -> Tensor:
    """Inputs of unequal sizes that depend on each other, ``(rows, width)``."""
    return random(rows, width) @ (random(width, width) * torch.linspace(0.1, 2, width))


@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 1}, {"stride": 2}, {"dilation": 2}, {"padding": "same"}],
    ids=["plain", "padding", "stride", "dilation", "same"],
)
def test_moments_of_convolutions_are_those_of_their_patches(options: dict[str, object]) -> None:
    """A product with the moments is the mean square of the layer's outputs."""
    layer, inputs = nn.Conv2d(3, 5, 3, bias=False, **options), random(2, 3, 8, 8)
    moment = input_moments({"w": layer}, lambda: layer(inputs))["w"]
    rows = layer.weight.detach().flatten(1)
    expected = layer(inputs).detach().square().mean((0, 2, 3))
    torch.testing.assert_close((rows @ moment * rows).sum(1), expected)


def test_moments_of_linears_over_several_calls() -> None:
    layer, calls = nn.Linear(6, 4), [random(2, 5, 6), random(3, 6)]
    found = input_moments({"w": layer}, lambda: [layer(inputs) for inputs in calls])["w"]
    rows = torch.cat([inputs.reshape(-1, 6) for inputs in calls])
    torch.testing.assert_close(found, rows.T @ rows / len(rows))
    assert not layer._forward_pre_hooks


def test_a_layer_that_is_not_reached_is_named() -> None:
    one, other = nn.Linear(6, 4), nn.Linear(6, 4)
    with pytest.raises(AdapterMismatchError, match=r"calibration must run every layer.*\n  - other"):
        input_moments({"one": one, "other": other}, lambda: one(random(2, 6)))
    assert not one._forward_pre_hooks and not other._forward_pre_hooks


def test_fitted_values_are_the_least_squares_solution() -> None:
    inputs, update = correlated(200, 12), random(7, 12)
    indices = torch.randperm(7 * 12, generator=GENERATOR)[:30].sort().values
    indices = indices[indices // 12 != 3]  # a row without entries
    fitted = fit_rows(update, inputs.T @ inputs / len(inputs), indices, ridge=1e-6)
    for row in range(7):
        mine = indices // 12 == row
        columns = indices[mine] % 12
        expected = torch.linalg.lstsq(inputs[:, columns], inputs @ update[row]).solution if mine.any() else fitted[:0]
        torch.testing.assert_close(fitted[mine], expected, rtol=1e-3, atol=1e-3)


def test_the_ridge_pulls_towards_the_update_and_dead_inputs_change_nothing() -> None:
    inputs, update = correlated(50, 12), random(7, 12)
    indices = torch.arange(0, 84, 5)
    kept = update.flatten()[indices]
    moment = inputs.T @ inputs / len(inputs)
    torch.testing.assert_close(fit_rows(update, moment, indices, ridge=1e6), kept, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fit_rows(update, torch.zeros(12, 12), indices), kept)


def test_everything_kept_is_kept_as_it_is() -> None:
    inputs, update = correlated(50, 12), random(7, 12)
    fitted = fit_rows(update, inputs.T @ inputs / len(inputs), torch.arange(84))
    torch.testing.assert_close(fitted.view(7, 12), update, rtol=1e-3, atol=1e-3)


def test_batches_of_systems_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, update, indices = correlated(50, 12), random(20, 12), torch.arange(0, 240, 3)
    moment = inputs.T @ inputs / len(inputs)
    whole = fit_rows(update, moment, indices)
    monkeypatch.setattr(activations, "_BATCH", 20)
    torch.testing.assert_close(fit_rows(update, moment, indices), whole)


class Three(nn.Module):
    """A layer of each kind, the grouped convolution without moments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 16, bias=False), nn.Conv2d(4, 6, 3, bias=False)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, bias=False)

    def forward(self, rows: Tensor, pictures: Tensor) -> tuple[Tensor, ...]:
        return self.linear(rows), self.conv(pictures), self.grouped(pictures)


@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("room", [2**31, 1], ids=["at once", "layer by layer"])
def test_calibrated_entries_keep_more_of_the_effect(monkeypatch: pytest.MonkeyPatch, ranking: str, room: int) -> None:
    model, rows, pictures = Three(), correlated(40, 8), random(2, 4, 8, 8) * torch.tensor([0.1, 1, 3, 9]).view(4, 1, 1)
    monkeypatch.setattr(activations, "_ROOM", room)
    updates = {f"m.{name}": random(*weight.shape) for name, weight in model.named_parameters()}
    layers = {f"m.{path}.weight": layer for path, layer in model.named_children()}
    chooser = ActivationChooser(layers, lambda: model(rows, pictures), ridge=1e-3)
    calibrated, _ = sparsify(updates.items, 0.25, ranking=ranking, chooser=chooser)  # type: ignore[arg-type]
    plain, _ = sparsify(updates.items, 0.25, ranking=ranking)  # type: ignore[arg-type]

    def effect(name: str, weight: Tensor) -> Tensor:
        return rows @ weight.T if weight.ndim == 2 else F.conv2d(pictures, weight)

    def lost(deltas: dict[str, object]) -> float:
        names = ("m.linear.weight", "m.conv.weight")
        rest = {n: updates[n] - deltas[n].to_dense() if n in deltas else updates[n] for n in names}  # type: ignore[attr-defined]
        whole = sum(effect(n, updates[n]).square().mean((0, 2, 3) if "conv" in n else 0).sum() for n in names)
        left = sum(effect(n, rest[n]).square().mean((0, 2, 3) if "conv" in n else 0).sum() for n in names)
        return float(left / whole)

    assert lost(calibrated) < 0.8 * lost(plain)
    if ranking == "layer":
        assert chooser.effect_kept == pytest.approx(1 - lost(calibrated), abs=1e-4)
        grouped = calibrated["m.grouped.weight"]
        assert torch.equal(grouped.indices, plain["m.grouped.weight"].indices)
        assert torch.equal(grouped.values, plain["m.grouped.weight"].values)
