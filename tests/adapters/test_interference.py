"""AWOM, AWOR and their neighbours against dense matrix products."""

import itertools

import pytest
import torch

from shira_diffusers import AdapterMismatchError, ShiraAdapter, SparseDelta
from shira_diffusers.adapters.interference import interference, interference_in_all
from shira_diffusers.masks.families import MaskContext, struct
from shira_diffusers.seeds import seeded
from tests import tiny


def matrix(delta: SparseDelta) -> torch.Tensor:
    return delta.to_dense().double().view(delta.shape[0], -1)


def slowly(first: ShiraAdapter, second: ShiraAdapter) -> dict[str, float]:
    """All weights of both as one block-diagonal matrix."""
    names = sorted(first.deltas.keys() | second.deltas.keys())
    shapes = {name: (first.deltas.get(name) or second.deltas[name]).shape for name in names}
    one, two = (
        [matrix(own.deltas[n]) if n in own.deltas else torch.zeros(shapes[n]).double().flatten(1) for n in names]
        for own in (first, second)
    )
    product = torch.block_diag(*(a.T @ b for a, b in zip(one, two, strict=True)))
    common = conflicts = 0
    for name in first.deltas.keys() & second.deltas.keys():
        a, b = (
            dict(zip(d.indices.tolist(), d.values.tolist(), strict=True))
            for d in (first.deltas[name], second.deltas[name])
        )
        shared = a.keys() & b.keys()
        common += len(shared)
        conflicts += sum(a[i] * b[i] < 0 for i in shared)
    cells = sum(part.shape[1] ** 2 for part in one)
    return {
        "overlap": common / min(first.nnz, second.nnz),
        "sign_conflict": conflicts / common if common else 0.0,
        "awom": float(product.norm()),
        "awor": 1 - int((product != 0).sum()) / cells,
        "l2": float(sum((a - b).square().sum() for a, b in zip(one, two, strict=True))) ** 0.5,
    }


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_to_dense_products(density: float, dtype: torch.dtype) -> None:
    model = tiny.linears()
    first = tiny.adapter_for(model, 1, only=("",), density=density, dtype=dtype)
    for only in (("",), ("0", "1"), ("2",)):
        second = tiny.adapter_for(model, 2, only=only, density=0.2)
        for one, two in itertools.permutations((first, second)):
            assert interference(one, two).as_dict() == pytest.approx(slowly(one, two), rel=1e-9)


def test_by_weight() -> None:
    model = tiny.linears()
    first, second = tiny.adapter_for(model, 1, only=("",)), tiny.adapter_for(model, 2, only=("0", "1"))
    by_weight = interference_in_all(first, second)[1]
    assert list(by_weight) == ["0.weight", "1.weight"]
    for name, figures in by_weight.items():
        alone = [ShiraAdapter({name: adapter.deltas[name]}) for adapter in (first, second)]
        assert figures == interference(*alone)


def test_an_adapter_and_itself() -> None:
    adapter = tiny.adapter_for(tiny.linears(), only=("",))
    figures = interference(adapter, adapter)
    assert (figures.overlap, figures.sign_conflict, figures.l2) == (1.0, 0.0, 0.0)
    negative = ShiraAdapter({n: SparseDelta(d.indices, -d.values, d.shape) for n, d in adapter.deltas.items()})
    assert interference(adapter, negative).sign_conflict == 1.0


def test_disjoint_columns_of_disjoint_rows_are_orthogonal() -> None:
    upper = ShiraAdapter({"w": SparseDelta(torch.tensor([0, 1]), torch.ones(2), (4, 4))})
    lower = ShiraAdapter({"w": SparseDelta(torch.tensor([12, 13]), torch.ones(2), (4, 4))})
    assert interference(upper, lower).as_dict() == {
        "overlap": 0.0,
        "sign_conflict": 0.0,
        "awom": 0.0,
        "awor": 1.0,
        "l2": 2.0,
    }
    elsewhere = ShiraAdapter({"v": lower.deltas["w"]})
    assert interference(upper, elsewhere).awor == 1.0


def test_struct_adapters_that_avoid_each_other_are_nearly_orthogonal() -> None:
    """P 4.2: more so than random ones of the same density."""
    weight = torch.zeros(64, 64)
    generator = torch.Generator().manual_seed(0)

    def adapter_on(mask: torch.Tensor) -> ShiraAdapter:
        mask = mask.sort().values
        return ShiraAdapter({"w": SparseDelta(mask, torch.randn(mask.numel(), generator=generator), (64, 64))})

    first = adapter_on(struct(weight, 200, MaskContext(seeded(0, "w"), None, None)))
    blocked = torch.zeros(4096, dtype=torch.bool)
    blocked[first.deltas["w"].indices.long()] = True
    second = adapter_on(struct(weight, 200, MaskContext(seeded(0, "w"), blocked, None)))
    random = [adapter_on(torch.randperm(4096, generator=generator)[:200]) for _ in range(2)]
    assert interference(first, second).overlap == 0
    assert interference(first, second).awor > interference(*random).awor


def test_the_two_names_of_a_text_encoders_weights_are_one() -> None:
    first, second = tiny.adapter_for(tiny.linears(), 1, only=("",)), tiny.adapter_for(tiny.linears(), 2, only=("0",))
    whole, each = interference_in_all(first.prefixed("text_encoder.text_model"), second.prefixed("text_encoder"))
    assert whole == interference(first, second) and list(each) == ["text_encoder.text_model.0.weight"]


def test_other_shapes_are_refused() -> None:
    one = ShiraAdapter({"w": SparseDelta(torch.tensor([0]), torch.ones(1), (2, 3))})
    other = ShiraAdapter({"w": SparseDelta(torch.tensor([0]), torch.ones(1), (3, 2))})
    for compare in (interference, interference_in_all):
        with pytest.raises(AdapterMismatchError, match=r"w is \(2, 3\) in one and \(3, 2\) in the other"):
            compare(one, other)


def test_a_weight_without_dimensions_in_one_adapter_only() -> None:
    scalar = SparseDelta(torch.tensor([0]), torch.tensor([3.0]), ())
    line = SparseDelta(torch.tensor([1]), torch.tensor([4.0]), (2, 2))
    found = interference(ShiraAdapter({"s": scalar, "w": line}), ShiraAdapter({"w": line}))
    assert (found.overlap, found.l2, found.awor) == (1.0, 3.0, 1 - 1 / 5)
    assert interference(ShiraAdapter({"s": scalar}), ShiraAdapter({"s": scalar})).awom == 9.0


def test_empty_deltas() -> None:
    empty = SparseDelta(torch.empty(0, dtype=torch.int64), torch.empty(0), (2, 3))
    adapter = ShiraAdapter({"w": empty})
    assert interference(adapter, adapter).as_dict() == {
        "overlap": 0.0,
        "sign_conflict": 0.0,
        "awom": 0.0,
        "awor": 1.0,
        "l2": 0.0,
    }
