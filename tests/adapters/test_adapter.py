"""ShiraAdapter: frozen data, and the difference of two models."""

import copy
import pickle

import pytest
import torch
from torch import nn

from shira_diffusers import AdapterFormatError, AdapterMismatchError, Resident, ShiraAdapter, SparseDelta
from tests import tiny


@pytest.fixture
def adapter() -> ShiraAdapter:
    delta = SparseDelta(torch.tensor([1, 3]), torch.ones(2), (2, 3))
    return ShiraAdapter(
        {"unet.b.weight": delta, "text_encoder.a.weight": delta.astype(torch.float16), "unet.a.weight": delta},
        {"base_model": "tiny", "density": "0.3"},
        {"unet.b.weight": torch.zeros(2, dtype=torch.float16)},
    )


def test_figures(adapter: ShiraAdapter) -> None:
    assert (adapter.nnz, adapter.numel, adapter.density) == (6, 18, 6 / 18)
    assert adapter.nbytes == 2 * 16 + 12
    assert list(adapter.deltas) == ["text_encoder.a.weight", "unet.a.weight", "unet.b.weight"]
    assert adapter.component_names() == ["text_encoder", "unet"]
    assert ShiraAdapter({}).density == 0.0


def test_it_is_told_in_one_short_line(adapter: ShiraAdapter) -> None:
    """A console or notebook shows no thousands of numbers."""
    assert repr(adapter) == "<ShiraAdapter: 6 entries in 3 parameters, base_model='tiny', density='0.3'>"
    assert repr(ShiraAdapter({})) == "<ShiraAdapter: 0 entries in 0 parameters>"
    assert repr(adapter.deltas["unet.a.weight"]) == "<SparseDelta: 2 entries of a (2, 3) weight, torch.float32>"


def test_it_is_frozen(adapter: ShiraAdapter) -> None:
    with pytest.raises(AttributeError):
        adapter.deltas = {}
    for mapping in (adapter.deltas, adapter.metadata, adapter.base_probes):
        with pytest.raises(TypeError):
            mapping["x"] = 1


def test_parts_and_prefixes(adapter: ShiraAdapter) -> None:
    unet = adapter.part("unet")
    assert list(unet.deltas) == ["a.weight", "b.weight"]
    assert list(unet.base_probes) == ["b.weight"]
    assert unet.metadata == adapter.metadata
    assert unet.prefixed("unet").deltas == {n: d for n, d in adapter.deltas.items() if n.startswith("unet.")}
    assert not adapter.part("vae").deltas
    assert not adapter.part("une").deltas


def test_renaming_casting_and_metadata(adapter: ShiraAdapter) -> None:
    renamed = adapter.renamed({"unet.b.weight": "unet.c.weight"})
    assert list(renamed.deltas) == ["text_encoder.a.weight", "unet.a.weight", "unet.c.weight"]
    assert list(renamed.base_probes) == ["unet.c.weight"]
    assert {d.values.dtype for d in adapter.astype(torch.bfloat16).deltas.values()} == {torch.bfloat16}
    more = adapter.with_metadata(mask="wm", density="0.5")
    assert more.metadata == {"base_model": "tiny", "density": "0.5", "mask": "wm"}
    assert adapter.metadata["density"] == "0.3"


def test_copies(adapter: ShiraAdapter) -> None:
    assert copy.deepcopy(adapter) is adapter
    thawed = pickle.loads(pickle.dumps(adapter))
    assert thawed.deltas == adapter.deltas
    assert thawed.metadata == adapter.metadata
    assert torch.equal(thawed.base_probes["unet.b.weight"], adapter.base_probes["unet.b.weight"])


def test_metadata_become_strings() -> None:
    assert ShiraAdapter({}, {"density": 0.5}).metadata == {"density": "0.5"}


@pytest.mark.parametrize("probe", [torch.zeros(3), torch.zeros(1, 2)])
def test_base_values_belong_to_a_delta(adapter: ShiraAdapter, probe: torch.Tensor) -> None:
    with pytest.raises(AdapterFormatError, match="at most one per entry"):
        ShiraAdapter(adapter.deltas, {}, {"unet.b.weight": probe})
    with pytest.raises(AdapterFormatError, match=r"nowhere\.weight"):
        ShiraAdapter(adapter.deltas, {}, {"nowhere.weight": torch.zeros(1)})


def tuned(model: nn.Module) -> nn.Module:
    """A copy in which every third entry of every parameter was trained."""
    after = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.view(-1)[::3] += torch.randn_like(parameter.view(-1)[::3])
    return after


@pytest.mark.parametrize("kind", ["modules", "components", "state dicts"])
def test_the_difference_of_two_models(kind: str) -> None:
    before = tiny.linears()
    after = tuned(before)
    sides = {
        "modules": (before, after),
        "components": ({"unet": before}, {"unet": after}),
        "state dicts": (before.state_dict(), after.state_dict()),
    }[kind]
    adapter = ShiraAdapter.from_difference(*sides, metadata={"mask": "every third"})
    prefix = "unet." if kind == "components" else ""
    assert set(adapter.deltas) == {prefix + name for name, _ in before.named_parameters()}
    assert adapter.metadata == {"mask": "every third"}
    for name, parameter in before.named_parameters():
        delta = adapter.deltas[prefix + name]
        assert delta.indices.tolist() == list(range(0, parameter.numel(), 3))
        assert torch.allclose(parameter + delta.to_dense(), dict(after.named_parameters())[name])
    assert adapter.base_probes


def test_the_difference_applied_gives_the_trained_weights() -> None:
    """Exactly, where ``before + (after - before)`` is exact, as with these multiples of 1/8."""
    before = tiny.linears()
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.copy_((parameter * 8).round() / 8)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after[0].weight[3] += 0.25
        after[1].weight[:, 1] -= 0.5
    resident = Resident(before)
    resident.add(ShiraAdapter.from_difference(before, after, dtype=torch.float16), "trained")
    resident.set({"trained": 1.0})
    tiny.assert_same_bits(before, tiny.snapshot(after))


def test_the_difference_with_half_precision_weights(dtype: torch.dtype) -> None:
    before = tiny.linears().to(dtype)
    after = tuned(before)
    adapter = ShiraAdapter.from_difference(before, after)
    for name, delta in adapter.deltas.items():
        old, new = before.get_parameter(name), after.get_parameter(name)
        assert torch.equal(delta.to_dense(), new.float() - old.float())


def test_what_cannot_be_compared() -> None:
    before = tiny.linears()
    with pytest.raises(AdapterMismatchError, match="no weight differs"):
        ShiraAdapter.from_difference(before, copy.deepcopy(before))
    with pytest.raises(AdapterMismatchError, match=r"1\.weight: only on one side"):
        ShiraAdapter.from_difference(before, before[:1])
    with pytest.raises(AdapterMismatchError, match=r"w: \(2,\) before, \(3,\) after"):
        ShiraAdapter.from_difference({"w": torch.zeros(2)}, {"w": torch.zeros(3)})
    after = copy.deepcopy(before)
    with torch.no_grad():
        after[2].weight[0, 0] = torch.nan
    with pytest.raises(AdapterFormatError, match=r"2\.weight: .*NaN or infinite"):
        ShiraAdapter.from_difference(before, after)


def test_what_is_no_delta_and_no_tensor() -> None:
    with pytest.raises(
        AdapterFormatError, match=r"expected \{name: SparseDelta\}; .* got:\n  - 'w': Tensor\n  - 'v': dict$"
    ):
        ShiraAdapter({"w": torch.ones(2), "v": {}})  # type: ignore[dict-item]
    with pytest.raises(AdapterFormatError, match=r"expected \{name: SparseDelta\}, got list"):
        ShiraAdapter([])  # type: ignore[arg-type]
    with pytest.raises(AdapterFormatError, match=r"expected tensors or modules by name, got:\n  - 'a': int$"):
        ShiraAdapter.from_difference({"a": 3}, {"a": 4})  # type: ignore[dict-item]


def test_values_too_large_for_a_dtype_are_named() -> None:
    values = torch.tensor([1e6, 1.0, -7e4])
    adapter = ShiraAdapter(
        {"a": SparseDelta(torch.arange(3), values, (2, 2)), "b": SparseDelta(torch.arange(1), values[1:2], (2, 2))}
    )
    with pytest.raises(
        AdapterFormatError,
        match=r"of 1 parameter are too large for torch.float16[\s\S]*- a: 2 of 3 values, up to 1e\+06",
    ):
        adapter.astype(torch.float16)
    assert adapter.astype(torch.bfloat16).deltas["a"].values[0] == torch.tensor(1e6).bfloat16()
