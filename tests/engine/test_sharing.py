"""Two names for one memory: refused before two owners save each other's values as the base."""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from shira_diffusers import AdapterMismatchError, Resident, ResidentStateError, ShiraAdapter, ShiraError, SparseDelta
from shira_diffusers.engine.sharing import claims, conflicts
from shira_diffusers.weights.finder import WeightMap
from tests import reference, tiny

SELF = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
CROSS = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


def adapter(*names: str, model: nn.Module, size: float = 0.5) -> ShiraAdapter:
    """Every third entry of some weights."""
    weights = {name: WeightMap(model)[name] for name in names}
    places = {name: torch.arange(0, weight.numel(), 3) for name, weight in weights.items()}
    deltas = {n: SparseDelta(at, torch.full(at.shape, size), tuple(weights[n].shape)) for n, at in places.items()}
    return ShiraAdapter(deltas)


def assert_refused(
    act: Callable[[], object], model: nn.Module, message: str, error: type[ShiraError] = ResidentStateError
) -> None:
    """It raises, and no bit, mix or adapter has changed."""
    bits, names, active = tiny.snapshot(model), Resident(model).names, Resident(model).active
    with pytest.raises(error, match=message):
        act()
    tiny.assert_same_bits(model, bits)
    assert (Resident(model).names, Resident(model).active) == (names, active)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (f"{SELF}.to_q", f"{SELF}.to_qkv"),
        (f"{SELF}.to_qkv", f"{SELF}.to_v"),
        (f"{CROSS}.to_k", f"{CROSS}.to_kv"),
    ],
)
@pytest.mark.parametrize("active", [True, False])
def test_a_projection_and_its_fused_copy(first: str, second: str, active: bool) -> None:
    model = tiny.unet()
    model.fuse_qkv_projections()
    base = tiny.snapshot(model)
    resident = Resident(model)
    one, other = f"{first}.weight", f"{second}.weight"
    message = r"1 of 2 parameters differs?[\s\S]*- .*: one memory with down_blocks.*which has deltas for it too"
    both = adapter(one, other, model=model)
    assert_refused(lambda: resident.add(both, "both"), model, message, AdapterMismatchError)
    resident.add(adapter(one, model=model), "a")
    resident.set({"a": 1.0} if active else {})
    late = adapter(other, model=model)
    message = rf"1 weight of the adapter shares memory[\s\S]*- {other}: {one} is changed by adapter 'a'"
    for act in (lambda: resident.add(late, "b"), lambda: resident.check(late)):
        assert_refused(act, model, message)
    if active:
        assert_refused(lambda: resident.replace(late, "a"), model, "1 pair of adapted weights shares memory")
        resident.clear()
    resident.replace(late, "a")
    resident.set({"a": 1.0})
    resident.remove("a")
    resident.add(late, "b")
    resident.remove("b")
    tiny.assert_same_bits(model, base)


def test_projections_beside_each_other_share_nothing() -> None:
    model = tiny.unet()
    model.fuse_qkv_projections()
    base = tiny.snapshot(model)
    resident = Resident(model)
    for part in ("to_q", "to_k", "to_v"):
        resident.add(adapter(f"{SELF}.{part}.weight", model=model), part)
    resident.set({"to_q": 1.0, "to_k": 1.0, "to_v": 1.0})
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_projections_fused_after_their_copies_were_added() -> None:
    """``add`` saw no copy; the switch does."""
    model = tiny.unet()
    model.fuse_qkv_projections()
    resident = Resident(model)
    resident.add(adapter(f"{SELF}.to_qkv.weight", model=model), "fused")
    attention = model.get_submodule(SELF)
    copied = attention._modules.pop("to_qkv")  # what diffusers' unfuse leaves there
    resident.add(adapter(f"{SELF}.to_q.weight", model=model), "q")
    resident.set({"q": 1.0})
    attention.to_qkv = copied
    message = rf"1 pair of adapted weights shares memory[\s\S]*{SELF}.to_qkv.weight and {SELF}.to_q.weight"
    for mix in ({"q": 1.0, "fused": 1.0}, {"fused": 1.0}):
        assert_refused(lambda mix=mix: resident.set(mix), model, message)
    resident.clear()
    resident.set({"fused": 1.0})


class Views(nn.Module):
    """Weights that are parts of one matrix."""

    def __init__(self, **parts: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.whole = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        for name, part in parts.items():
            layer = nn.Linear(8, 8, bias=False)
            layer.weight = nn.Parameter(part(self.whole))
            self.add_module(name, layer)


APART: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
    (lambda w: w[:4], lambda w: w[4:]),
    (lambda w: w[:, :4], lambda w: w[:, 4:]),
    (lambda w: w[:4, :4].T, lambda w: w[4:, 4:].T),
]
OVERLAPPING: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
    (lambda w: w[:5], lambda w: w[4:]),
    (lambda w: w, lambda w: w[:4]),
    (lambda w: w, lambda w: w.T),
    (lambda w: w, lambda w: w.view(4, 16)),
    (lambda w: w[:, :5], lambda w: w[:, 4:]),
    (lambda w: w[:4], lambda w: w[:, :4]),
]


@pytest.mark.parametrize("parts", OVERLAPPING)
def test_views_of_one_storage(parts: tuple[Callable[[Tensor], Tensor], ...]) -> None:
    model = Views(one=parts[0], two=parts[1])
    resident = Resident(model)
    both = adapter("one.weight", "two.weight", model=model)
    assert_refused(lambda: resident.add(both, "both"), model, "(one|two).weight: one memory", AdapterMismatchError)
    resident.add(adapter("one.weight", model=model), "a")
    late = adapter("two.weight", model=model)
    assert_refused(lambda: resident.add(late, "b"), model, "two.weight: one.weight is changed by adapter 'a'")


@pytest.mark.parametrize("parts", APART)
def test_views_beside_each_other(parts: tuple[Callable[[Tensor], Tensor], ...]) -> None:
    model = Views(one=parts[0], two=parts[1])
    base = tiny.snapshot(model)
    both = adapter("one.weight", "two.weight", model=model)
    resident = Resident(model)
    resident.add(both, "both")
    resident.add(adapter("two.weight", model=model), "two")
    resident.set({"both": 1.0})
    expected = reference.apply(base, {"both": both}, {"both": 1.0})
    assert all(torch.equal(now, expected[name]) for name, now in tiny.snapshot(model).items())
    resident.clear()
    tiny.assert_same_bits(model, base)


def test_a_part_beside_the_whole() -> None:
    net = tiny.linears()
    base = tiny.snapshot(net)
    whole, part = Resident(net), Resident(net[0])
    whole.add(adapter("0.weight", model=net), "a")
    whole.set({"a": 1.0})
    message = r"- weight: 0.weight of another model, Sequential, is changed by adapter 'a'"
    late = adapter("weight", model=net[0])
    assert_refused(lambda: part.add(late, "b"), net, message)
    Resident(net[2]).add(adapter("weight", model=net[2]), "c")
    message = r"- 2.weight: weight of another model, Linear, is changed by adapter 'c'"
    assert_refused(lambda: whole.add(adapter("2.weight", model=net), "d"), net, message)
    whole.remove("a")
    part.add(late, "b")
    part.set({"b": 1.0})
    part.remove("b")
    tiny.assert_same_bits(net, base)


def test_models_that_share_tensors_by_assignment() -> None:
    net, twin = tiny.linears(), tiny.linears(8)
    twin.load_state_dict(net.state_dict(), assign=True)
    resident = Resident({"first": net, "second": twin})
    resident.add(adapter("0.weight", model=net).prefixed("first"), "a")
    late = adapter("0.weight", "2.weight", model=twin)
    for owner, name, held in (
        (resident, late.prefixed("second"), "second.0.weight: first.0.weight is changed"),
        (Resident(twin), late, "0.weight: 0.weight of another model, Sequential, is changed"),
    ):
        assert_refused(lambda owner=owner, name=name: owner.add(name, "b"), twin, rf"- {held} by adapter 'a'")
    twin.load_state_dict(tiny.linears(8).state_dict(), assign=True)
    resident.add(late.prefixed("second"), "b")


def test_a_weight_tied_to_another_pipeline_s() -> None:
    pipe, other = tiny.pipeline(), tiny.pipeline()
    layer = f"{SELF}.to_q.weight"
    other.unet.get_submodule(f"{SELF}.to_q").weight = pipe.unet.get_submodule(f"{SELF}.to_q").weight
    pipe.load_shira(adapter(layer, model=pipe.unet).prefixed("unet"), "a")
    bits = tiny.snapshot(other)
    with pytest.raises(
        ResidentStateError, match=rf"- unet.{layer}: {layer} of another model, UNet2DConditionModel, .*'a'"
    ):
        other.load_shira(adapter(layer, model=other.unet).prefixed("unet"), "b")
    tiny.assert_same_bits(other, bits)
    assert other.list_shira() == {}


def test_owners_that_are_gone_or_apart_are_no_owners() -> None:
    """Copies have memory of their own; what one shares with a pipeline of the same module is one state."""
    net = tiny.linears()
    Resident(net).add(adapter("0.weight", model=net), "a")
    twin, shallow = copy.deepcopy(net), copy.copy(net)
    Resident(twin).add(adapter("0.weight", model=twin), "b")
    Resident(shallow).add(adapter("0.weight", model=net), "c")
    assert Resident(net).names == ["a", "c"]
    kept = nn.Sequential(*net[:3])
    assert_refused(lambda: Resident(kept).add(adapter("0.weight", model=kept), "d"), kept, "of another model")
    del net, shallow
    Resident(kept).add(adapter("0.weight", model=kept), "d")


def test_two_pipelines_of_one_unet(pipe: StableDiffusionPipeline) -> None:
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    for owner, name in ((pipe, "a"), (other, "b")):
        owner.load_shira(tiny.adapter_for(pipe), name, activate=False)
    assert list(pipe.list_shira()) == list(other.list_shira()) == ["a", "b"]


def test_offloaded_weights_have_their_stored_memory() -> None:
    weight, stored = torch.zeros(4, 4), torch.zeros(4, 4)
    one = [(weight, 0), (stored, 0)]
    assert not list(conflicts(claims({"one": one, "two": [(torch.zeros(4, 4), 0)]})))
    assert len(list(conflicts(claims({"one": one, "two": [(stored[1:], 0)]})))) == 1


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return tiny.pipeline()
