"""Gradients of weights that autograd knows nothing of: the same numbers, without what autograd would keep for them."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shira_diffusers import build_masks
from shira_diffusers.training.tuner import SparseTuner
from tests import tiny
from tests.dreambooth.reference import train_dense
from tests.training.test_tuner import ADAMW, checkpointed, loss_of, models, parameters_of, tune

TARGETS = "attention+ff"


def masks_of(parts: dict[str, nn.Module], family: str) -> dict[str, Tensor]:
    return build_masks(parts, family, 0.08, TARGETS)


def plain(parts: dict[str, nn.Module]) -> None:
    """As models are made."""


CHECKPOINTING: dict[str, Callable[[dict[str, nn.Module]], None]] = {
    "plain": plain,
    "checkpointed": partial(checkpointed, reentrant=False),
    "reentrant": partial(checkpointed, reentrant=True),
}
DTYPES = [
    pytest.param(torch.float32, None, id="fp32"),
    pytest.param(torch.bfloat16, None, id="bf16"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16-autocast"),
    pytest.param(torch.float32, torch.bfloat16, id="fp32-autocast"),
]


def gradient(parts: dict[str, nn.Module], masks: dict[str, Tensor], autocast: Any, **options: bool) -> Tensor:
    with SparseTuner(parts, masks, **options) as tuner:
        loss_of(parts, 0, autocast).backward()
        assert tuner.deltas.grad is not None
        return tuner.deltas.grad


def dense_gradient(parts: dict[str, nn.Module], masks: dict[str, Tensor], autocast: Any) -> Tensor:
    """As autograd alone has it."""
    weights = parameters_of(parts)
    for parameter in weights.values():
        parameter.requires_grad_(True).grad = None
    loss_of(parts, 0, autocast).backward()
    taken = [weights[name].grad.flatten()[at.long()].float() for name, at in masks.items()]
    for parameter in weights.values():
        parameter.grad = None
    return torch.cat(taken)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
def test_inputs_computed_again_give_the_same_bits(dtype: torch.dtype, autocast: Any, checkpointing: str) -> None:
    parts = models(dtype)
    masks = masks_of(parts, "rand")
    CHECKPOINTING[checkpointing](parts)
    expected = dense_gradient(parts, masks, autocast)
    assert expected.count_nonzero() > 0.9 * expected.numel()
    assert torch.equal(gradient(parts, masks, autocast), expected)
    assert torch.equal(gradient(parts, masks, autocast, recompute=True), expected)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
def test_columns_have_the_dense_gradient(
    dtype: torch.dtype, autocast: Any, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = models(dtype)
    masks = masks_of(parts, "struct")
    CHECKPOINTING[checkpointing](parts)
    with SparseTuner(parts, masks):
        assert not any(p.requires_grad for p in parameters_of(parts).values()), "autograd would make dense gradients"
    found = gradient(parts, masks, autocast)
    monkeypatch.setattr("shira_diffusers.training.tuner.find_columns", lambda *_: None)
    dense = gradient(parts, masks, autocast)
    assert float((found - dense).norm()) < 1e-6 * float(dense.norm())  # sums in another order, rounded alike


def test_six_steps_with_columns_equal_dense_training() -> None:
    sparse, dense = models(), models()
    masks = masks_of(sparse, "struct")
    with SparseTuner(sparse, masks) as tuner:
        tune(tuner, partial(loss_of, sparse), 6, accumulation=2)
    adapted = {name: parameters_of(dense)[name].requires_grad_() for name in masks}
    deltas = train_dense(adapted, masks, partial(loss_of, dense), 6, accumulation=2, **ADAMW)
    adapter = tuner.adapter(dtype=torch.float32)
    for name, expected in deltas.items():  # AdamW's first steps are the sign of a gradient, whatever its size
        assert float((adapter.deltas[name].to_dense() - expected).norm()) < 1e-2 * float(expected.norm()), name


class Products(TorchDispatchMode):
    """Takes down the shape of each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.append(result.shape)
        return result


@pytest.mark.parametrize(("family", "dense"), [("struct", False), ("rand", True)])
def test_shapes_of_the_products_in_backward(family: str, dense: bool) -> None:
    """With columns none has the shape of a weight; with other masks some have, so the test would see it."""
    model = Block()
    masks = build_masks(model, family, 0.08, ["block.*"])
    with SparseTuner(model, masks):
        loss = model(torch.randn(4, 7, 32)).square().mean()
        with Products() as products:
            loss.backward()
    weights = {model.get_parameter(name).shape for name in masks}
    assert (weights <= set(products.shapes)) if dense else not weights & set(products.shapes)
    assert len(products.shapes) > len(masks)


# ---------------------------------------------------------------- what autograd keeps meanwhile


def kept_bytes(loss: Tensor, parts: dict[str, nn.Module]) -> int:
    """Size of all memory that a loss's graph keeps alive, each counted once; parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in parameters_of(parts).values()}
    sizes: dict[int, int] = {}
    todo: list[Any] = [loss.grad_fn]
    done: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in done:
            continue
        done.add(node)
        held = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        held += getattr(node, "saved_tensors", ())
        for tensor in (part for value in held for part in (value if isinstance(value, tuple) else (value,))):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        todo += [following for following, _ in node.next_functions]
    return sum(sizes.values())


class Block(nn.Module):
    """A transformer block of a UNet, with text, after a convolution that is not adapted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 32)
        self.block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24)

    def forward(self, x: Tensor) -> Tensor:
        text = torch.ones(x.shape[0], 6, 24, dtype=x.dtype)
        result: Tensor = self.block(self.first(x), encoder_hidden_states=text)
        return result


def block_bytes(dtype: torch.dtype, autocast: Any, family: str | None, *, recompute: bool = False) -> int:
    """What one pass of a block keeps: frozen, or with an adapter in training."""
    model = Block().to(dtype).requires_grad_(False)
    x = torch.randn(4, 64, 32).to(dtype).requires_grad_()
    if family:
        SparseTuner(model, build_masks(model, family, 0.08, ["block.*"]), recompute=recompute)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(x).float().square().mean()
    return kept_bytes(loss, {"block": model})


@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
def test_hardly_more_is_kept_than_of_a_frozen_model(dtype: torch.dtype, autocast: Any) -> None:
    frozen = block_bytes(dtype, autocast, None)
    kept = block_bytes(dtype, autocast, "rand")  # of the feed-forward's second layer too, without the tap: 1.2
    assert 1.05 * frozen < kept < 1.15 * frozen
    assert block_bytes(dtype, autocast, "rand", recompute=True) < 1.03 * frozen
    assert block_bytes(dtype, autocast, "struct") < 1.03 * frozen


# ---------------------------------------------------------------- layers of all kinds


class Layers(nn.Module):
    """A Linear used in ways that a tap must bear: inputs of every making, outputs written in place, keywords."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.normed, self.plain = nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.gelu = FeedForward(8, activation_fn="gelu-approximate")

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.normed(x)) + self.b(self.plain(x)) + self.c(self.normed(x) * 2.0)
        y = self.d(input=torch.sigmoid(y) * y).relu_()
        one = self.d(y.flatten(0, 1)[0])  # a single vector
        result: Tensor = self.gelu(y) + one
        return result


def layer_masks(model: nn.Module) -> dict[str, Tensor]:
    return build_masks(model, "rand", 0.3, "all-linear")


def test_inputs_of_every_making() -> None:
    results = []
    for recompute in (False, True):
        model = Layers()
        with SparseTuner(model, layer_masks(model), recompute=recompute) as tuner:
            model(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))).square().sum().backward()
            assert tuner.deltas.grad is not None
            results.append(tuner.deltas.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert results[0].count_nonzero() > 0.9 * results[0].numel()


def test_restore_takes_the_taps_away() -> None:
    model = tiny.linears()
    x = torch.randn(2, 12)
    before = [hook for part in model.modules() for hook in part._forward_hooks.values()]
    tuner = SparseTuner(model, build_masks(model, "struct", 0.2, ["0"]))
    assert type(model[0](x).grad_fn).__name__ == "_TappedBackward"
    tuner.restore()
    assert type(model[0](x).grad_fn).__name__ == "AddmmBackward0"
    assert [hook for part in model.modules() for hook in part._forward_hooks.values()] == before


def test_no_gradient_is_looked_for_where_none_is_wanted() -> None:
    model = tiny.linears()
    with SparseTuner(model, build_masks(model, "struct", 0.2, ["0"])), torch.no_grad():
        assert model[0](torch.randn(2, 12)).grad_fn is None


def test_layers_that_share_a_weight_or_are_compiled_have_dense_gradients() -> None:
    first, second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    second.weight = first.weight
    compiled = nn.Linear(6, 6, bias=False)
    compiled.compile(backend="eager")
    for model in (nn.Sequential(first, second), nn.Sequential(compiled)):
        with SparseTuner(model, {"0.weight": torch.arange(0, 36, 7)}) as tuner:
            model(torch.randn(2, 6)).sum().backward()
            assert model[0].weight.requires_grad
            assert tuner.deltas.grad is not None


def test_a_graph_walked_twice_gives_its_gradient_twice() -> None:
    model = Layers()
    with SparseTuner(model, layer_masks(model), recompute=True) as tuner:
        loss = model(torch.randn(2, 3, 8)).sum()
        loss.backward(retain_graph=True)
        assert tuner.deltas.grad is not None
        once = tuner.deltas.grad.clone()
        loss.backward()
        torch.testing.assert_close(tuner.deltas.grad, once + once)


def test_a_checkpoint_runs_twice_and_no_more() -> None:
    """What autograd has kept inside one cannot be looked at without computing it again."""
    model = Layers()
    x = torch.randn(2, 3, 8)
    runs: list[None] = []

    def segment(x: Tensor) -> Tensor:
        runs.append(None)
        result: Tensor = model(x)
        return result

    with SparseTuner(model, layer_masks(model), recompute=True) as tuner:
        model(x).sum().backward()
        assert tuner.deltas.grad is not None
        expected, tuner.deltas.grad = tuner.deltas.grad, None
        checkpoint(segment, x, use_reentrant=False).sum().backward()
        assert len(runs) == 2
        assert torch.equal(tuner.deltas.grad, expected)


def test_nothing_that_was_computed_again_stays_alive_with_the_loss() -> None:
    model = Layers()
    x = torch.randn(71, 73, 8)
    with SparseTuner(model, layer_masks(model), recompute=True) as tuner:
        loss = model(x).sum()
        loss.backward()
        tuner.deltas.grad = None
        alive = [part.shape for part in gc.get_objects() if type(part) is Tensor and part is not x]
        assert not {71, 71 * 73} & {size for shape in alive for size in shape}
        assert loss.grad_fn is not None
