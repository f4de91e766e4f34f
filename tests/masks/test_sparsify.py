"""Top entries of dense updates against sorting everything, and the energies that the report tells."""

import pytest
import torch
from torch import Tensor

from shira_diffusers import AdapterFormatError, AdapterMismatchError, ShiraError
from shira_diffusers.masks.sparsify import DENSITIES, sparsify
from shira_diffusers.masks.top_entries import top_indices

Weights = dict[str, Tensor]


@pytest.fixture
def weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    shapes = {"unet.a": (64, 96), "unet.b": (32, 16, 3, 3), "text.c": (50, 40)}
    sizes = {"unet.a": 1.0, "unet.b": 3.0, "text.c": 0.1}
    return {name: sizes[name] * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def energy(values: Tensor) -> float:
    return float(values.double().square().sum())


def top_energy(values: Tensor, density: float) -> float:
    return energy(values.flatten().abs().topk(round(density * values.numel())).values)


def test_each_layer_keeps_its_top(weights: Weights) -> None:
    deltas, report = sparsify(weights.items, 0.05)
    assert deltas.keys() == weights.keys()
    for name, weight in weights.items():
        expected = weight.flatten().abs().topk(round(0.05 * weight.numel())).indices.sort().values
        assert torch.equal(deltas[name].indices.long(), expected)
        assert torch.equal(deltas[name].values, weight.flatten()[expected])
        assert deltas[name].shape == tuple(weight.shape)
    assert report.total.entries == sum(delta.nnz for delta in deltas.values())
    assert report.total.numel == sum(weight.numel() for weight in weights.values())


def test_the_global_ranking_is_that_of_all_entries(weights: Weights) -> None:
    deltas, report = sparsify(weights.items, 0.02, ranking="global")
    everything = torch.cat([weight.flatten() for weight in weights.values()])
    count = round(0.02 * everything.numel())
    threshold = everything.abs().topk(count).values[-1]
    assert report.total.entries == count
    for name, weight in weights.items():
        expected = (weight.flatten().abs() >= threshold).nonzero().flatten()
        assert torch.equal(deltas[name].indices.long(), expected) if expected.numel() else name not in deltas
    assert report.components["text"].entries == 0 and report.components["text"].kept == 0


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_energies(weights: Weights, ranking: str) -> None:
    deltas, report = sparsify(weights.items, 0.05, ranking=ranking)  # type: ignore[arg-type]
    whole = sum(energy(weight) for weight in weights.values())
    kept = sum(energy(delta.values) for delta in deltas.values())
    assert report.total.kept == pytest.approx(kept / whole, rel=1e-6)
    parts = {part: [n for n in weights if n.startswith(part)] for part in ("unet", "text")}
    for part, names in parts.items():
        own = sum(energy(deltas[name].values) for name in names if name in deltas)
        assert report.components[part].kept == pytest.approx(own / sum(energy(weights[n]) for n in names), rel=1e-6)
    everything = torch.cat([weight.flatten() for weight in weights.values()])
    for density in DENSITIES:
        layers = sum(top_energy(weight, density) for weight in weights.values())
        expected = layers if ranking == "layer" else top_energy(everything, density)
        assert report.total.at[density] == pytest.approx(expected / whole, rel=5e-3)  # counts are rounded per layer
    assert list(report.total.at) == sorted(report.total.at)
    assert report.as_dict()["components"]["unet"]["energy_kept"] == report.components["unet"].kept


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_everything_is_kept_at_density_1(weights: Weights, ranking: str) -> None:
    deltas, report = sparsify(weights.items, 1.0, ranking=ranking)  # type: ignore[arg-type]
    assert all(torch.equal(deltas[name].to_dense(), weight) for name, weight in weights.items())
    assert report.total.kept == pytest.approx(1.0)


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_zeros_are_never_kept_and_ties_go_to_the_lowest(ranking: str) -> None:
    weights = {"m.a": torch.tensor([[0.0, 2.0, 0.0, 2.0]]), "m.b": torch.zeros(2, 2), "m.c": torch.ones(1, 4)}
    deltas, _ = sparsify(weights.items, 1.0, ranking=ranking)  # type: ignore[arg-type]
    assert deltas["m.a"].indices.tolist() == [1, 3] and "m.b" not in deltas
    assert top_indices(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [0, 1]
    deltas, report = sparsify(weights.items, 0.5, ranking=ranking)  # type: ignore[arg-type]
    assert report.total.entries == (4 if ranking == "layer" else 6)


def test_a_module_alone_has_one_component(weights: Weights) -> None:
    _, report = sparsify(weights.items, 0.1, by_component=False)
    assert list(report.components) == [""] and report.components[""] == report.total


def test_values_are_rounded_once(weights: Weights) -> None:
    deltas, _ = sparsify(weights.items, 0.05, dtype=torch.float16)
    exact, _ = sparsify(weights.items, 0.05)
    assert all(torch.equal(deltas[n].values, exact[n].values.half()) for n in weights)


def test_one_update_is_in_memory_at_a_time(weights: Weights) -> None:
    asked = []

    def updates():  # type: ignore[no-untyped-def]
        for name, weight in weights.items():
            asked.append(name)
            yield name, weight

    sparsify(updates, 0.1)
    assert asked == list(weights)
    asked.clear()
    sparsify(updates, 0.1, ranking="global")
    assert asked == 3 * list(weights)  # which bin, which score inside it, which entries


def test_bad_updates(weights: Weights) -> None:
    with pytest.raises(AdapterMismatchError, match="no weight is changed"):
        sparsify({"m.a": torch.zeros(2, 2)}.items, 0.5)
    wrong = weights | {"unet.a": weights["unet.a"] * torch.inf, "text.c": weights["text.c"] * torch.nan}
    for ranking in ("layer", "global"):
        with pytest.raises(AdapterFormatError, match=r"(?s)unet.a: the update holds NaN.*text.c: the update holds"):
            sparsify(wrong.items, 0.1, ranking=ranking)  # type: ignore[arg-type]
    with pytest.raises(AdapterFormatError, match=r"unet.b: .*infinite"):
        sparsify({"unet.b": 1e6 * weights["unet.b"]}.items, 0.1, dtype=torch.float16)
    for density in (0.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ShiraError, match=r"density must be in \(0, 1\]"):
            sparsify(weights.items, density)
