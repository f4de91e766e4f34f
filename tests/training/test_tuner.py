"""The engine against dense training; what it guarantees before, during and after."""

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shira_diffusers import AdapterFormatError, AdapterMismatchError, Resident, ResidentStateError, build_masks
from shira_diffusers.training.tuner import SparseTuner
from tests import tiny
from tests.dreambooth.reference import dense_mask, train_dense

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


def models(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {"unet": tiny.unet(), "text_encoder": tiny.text_encoder()}
    for part in parts.values():
        part.to(dtype).requires_grad_(False)
    return parts


def loss_of(parts: dict[str, nn.Module], number: int, autocast: torch.dtype | None = None) -> Tensor:
    """The error of the UNet for a batch of two, through the text encoder; the batch depends on ``number`` alone."""
    generator = torch.Generator().manual_seed(number)
    dtype = parts["unet"].dtype
    sample, target = torch.randn(2, 2, 4, 8, 8, generator=generator)
    tokens = torch.randint(0, 52, (2, 6), generator=generator)
    timesteps = torch.randint(0, 1000, (2,), generator=generator)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        text = parts["text_encoder"](tokens)[0]
        predicted = parts["unet"](sample.to(dtype), timesteps, text).sample
    return (predicted.float() - target).square().mean()


def parameters_of(parts: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}


def tune(
    tuner: SparseTuner, loss: Callable[[int], Tensor], steps: int, accumulation: int = 1, scale: float = 1.0
) -> None:
    optimizer = torch.optim.AdamW([tuner.deltas], **ADAMW)
    for step in range(steps):
        for part in range(accumulation):
            (loss(step * accumulation + part) * scale / accumulation).backward()
        tuner.deltas.grad /= scale
        optimizer.step()
        optimizer.zero_grad()
        tuner.apply()


def small_masks(parts: dict[str, nn.Module], family: str = "rand") -> dict[str, Tensor]:
    return build_masks(parts, family, 0.05, ["to_q", "to_v", "ff.net.2", "conv1", "q_proj", "fc1"])


def checkpointed(parts: dict[str, nn.Module], reentrant: bool) -> None:
    parts["unet"].enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
    encoder = parts["text_encoder"].train()
    encoder.gradient_checkpointing_enable({"use_reentrant": reentrant})


# ---------------------------------------------------------------- the same as dense training


@pytest.mark.parametrize(
    ("weights", "autocast", "accumulation", "scale"),
    [
        pytest.param(torch.float32, None, 1, 1.0, id="fp32"),
        pytest.param(torch.float32, None, 2, 1.0, id="accumulated"),
        pytest.param(torch.float32, torch.bfloat16, 1, 1.0, id="autocast"),
        pytest.param(torch.bfloat16, None, 1, 1.0, id="bf16"),
        pytest.param(torch.float16, torch.float16, 1, 1024.0, id="fp16-scaled"),
    ],
)
def test_steps_equal_dense_training(
    weights: torch.dtype, autocast: torch.dtype | None, accumulation: int, scale: float
) -> None:
    """Bit for bit: the same sums in the same order, and AdamW treats each entry alone."""
    sparse, dense = models(weights), models(weights)
    masks = small_masks(sparse)
    with SparseTuner(sparse, masks) as tuner:
        tune(tuner, lambda n: loss_of(sparse, n, autocast), 8, accumulation, scale)
        trained = {name: p.detach().clone() for name, p in parameters_of(sparse).items()}
    adapted = {name: parameters_of(dense)[name].requires_grad_() for name in masks}
    deltas = train_dense(
        adapted, masks, lambda n: loss_of(dense, n, autocast), 8, accumulation=accumulation, scale=scale, **ADAMW
    )
    assert all(torch.equal(trained[name], p) for name, p in parameters_of(dense).items())
    adapter = tuner.adapter(dtype=torch.float32)
    assert all(torch.equal(adapter.deltas[name].to_dense(), delta) for name, delta in deltas.items())
    assert all(delta.count_nonzero() == masks[name].numel() for name, delta in deltas.items())


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    """Reentrant checkpointing adds the text's gradients up in another order: there the last bits may differ."""
    plain, saving = models(), models()
    masks = small_masks(plain)
    checkpointed(saving, reentrant)
    gradients = []
    for parts in (plain, saving):
        with SparseTuner(parts, masks) as tuner:
            loss_of(parts, 0).backward()
            gradients.append(tuner.deltas.grad)
    assert gradients[1].count_nonzero() == gradients[1].numel()
    tolerance = {"rtol": 1e-4, "atol": 1e-7} if reentrant else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(gradients[1], gradients[0], **tolerance)


def test_channels_last_convolutions_train_as_contiguous_ones() -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        parts: dict[str, UNet2DConditionModel] = {"unet": tiny.unet().to(memory_format=memory_format)}
        masks = build_masks(parts, "rand", 0.1, ["conv1"])
        with SparseTuner(parts, masks) as tuner:
            loss = parts["unet"](torch.ones(1, 4, 8, 8), 5, torch.ones(1, 3, 32)).sample.square().mean()
            loss.backward()
            results.append(tuner.deltas.grad.clone())
    assert results[0].count_nonzero() > 0
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-6)  # other convolution kernels


def test_a_shared_weight_gets_the_gradients_of_both_uses() -> None:
    first, second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    x = torch.randn(3, 6)
    model(x).sum().backward()
    expected = first.weight.grad.flatten()[torch.tensor([1, 7, 30])].clone()
    first.weight.grad = None
    with SparseTuner(model, {"1.weight": torch.tensor([1, 7, 30])}) as tuner:
        model(x).sum().backward()
        assert torch.equal(tuner.deltas.grad, expected)
    with pytest.raises(ResidentStateError, match=r"1\.weight is tied to 0\.weight"):
        SparseTuner(model, {"0.weight": torch.tensor([1]), "1.weight": torch.tensor([2])})


# ---------------------------------------------------------------- before, during, after


def test_only_masked_entries_move(dtype: torch.dtype) -> None:
    parts = models(dtype)
    masks = small_masks(parts)
    before = {name: p.detach().clone() for name, p in parameters_of(parts).items()}
    addresses = {name: p.data_ptr() for name, p in parameters_of(parts).items()}
    with SparseTuner(parts, masks) as tuner:
        with torch.no_grad():
            tuner.deltas.fill_(1.0)
        tuner.apply()
        for name, now in parameters_of(parts).items():
            moved = now != before[name]
            expected = dense_mask(now.shape, masks[name]).bool() if name in masks else torch.zeros_like(moved)
            assert torch.equal(moved, expected), name
            assert torch.equal(now, torch.where(expected, (before[name].float() + 1.0).to(dtype), before[name]))
            assert now.data_ptr() == addresses[name]
    assert all(tiny.same_bits(p, before[name]) for name, p in parameters_of(parts).items())


def test_base_comes_back_bit_for_bit_after_training_and_errors(dtype: torch.dtype) -> None:
    parts = models(dtype)
    before = {name: p.detach().clone() for name, p in parameters_of(parts).items()}
    parts["unet"].conv_in.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="stop"), SparseTuner(parts, small_masks(parts)) as tuner:
        tune(tuner, partial(loss_of, parts), 2)
        assert not all(torch.equal(p, before[name]) for name, p in parameters_of(parts).items())
        raise RuntimeError("stop")
    assert all(tiny.same_bits(p, before[name]) for name, p in parameters_of(parts).items())
    wanting = [name for name, p in parameters_of(parts).items() if p.requires_grad]
    assert wanting == ["unet.conv_in.weight"]
    tuner.restore()
    with pytest.raises(ResidentStateError, match="restored"):
        tuner.apply()
    loss_of(parts, 0).backward()
    assert tuner.deltas.grad is None, "hooks outlived the tuner"


def test_a_cast_while_training_restores_to_the_cast_base() -> None:
    parts, other = models(), models()
    with SparseTuner(parts, small_masks(parts)) as tuner:
        for part in parts.values():
            part.to(torch.bfloat16)
        tune(tuner, partial(loss_of, parts), 2)
        assert bool(tuner.deltas.any())
    expected = parameters_of({name: part.to(torch.bfloat16) for name, part in other.items()})
    assert all(tiny.same_bits(p, expected[name]) for name, p in parameters_of(parts).items())


def test_one_dense_gradient_is_alive_at_a_time_and_none_after() -> None:
    parts: dict[str, nn.Module] = {"unet": tiny.unet(), "text_encoder": tiny.text_encoder()}  # nothing is frozen
    masks = small_masks(parts)
    adapted = [parameters_of(parts)[name] for name in masks]
    alive: list[int] = []
    for parameter in adapted:  # registered first, so it looks before the tuner frees
        parameter.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for p in adapted)))
    with SparseTuner(parts, masks) as tuner:
        loss_of(parts, 0).backward()
        seen = [p for p in adapted if p.ndim == 4 or p.shape[1] < 4 * p.shape[0]]  # of the others autograd has none
        assert alive == [1] * len(seen)
        assert all(p.grad is None for p in parameters_of(parts).values())
        assert tuner.deltas.grad.shape == (sum(mask.numel() for mask in masks.values()),)
        assert tuner.deltas.dtype == tuner.deltas.grad.dtype == torch.float32
        assert [p for p in parameters_of(parts).values() if p.requires_grad] == seen


def test_weight_decay_pulls_deltas_to_zero_not_weights() -> None:
    model = tiny.linears()
    base = model[0].weight.detach().flatten()[:2].clone()
    with SparseTuner(model, {"0.weight": torch.tensor([0, 1])}) as tuner:
        optimizer = torch.optim.AdamW([tuner.deltas], lr=0.1, weight_decay=5.0)
        tuner.deltas.data.fill_(1.0)
        tuner.deltas.grad = torch.zeros(2)
        optimizer.step()
        tuner.apply()
        torch.testing.assert_close(model[0].weight.detach().flatten()[:2], base + 0.5)


# ---------------------------------------------------------------- what comes out


def test_adapter_gives_the_trained_weights_on_the_base(dtype: torch.dtype) -> None:
    parts = models(dtype)
    with SparseTuner(parts, small_masks(parts)) as tuner:
        tune(tuner, partial(loss_of, parts), 3)
        trained = {name: p.detach().clone() for name, p in parameters_of(parts).items()}
        adapter = tuner.adapter({"base_model": "tiny"}, dtype=torch.float32)
    resident = Resident(parts)
    assert resident.check(adapter) == "same"
    resident.add(adapter, "it")
    resident.set({"it": 1.0})
    assert all(tiny.same_bits(p, trained[name]) for name, p in parameters_of(parts).items())
    assert tuner.adapter().deltas[next(iter(adapter.deltas))].values.dtype == torch.float16
    assert adapter.metadata["base_model"] == "tiny"


def test_deltas_that_diverged_make_no_adapter() -> None:
    with SparseTuner(tiny.linears(), {"0.weight": torch.tensor([3])}) as tuner:
        tuner.deltas.data.fill_(1e6)
        assert tuner.adapter(dtype=torch.float32).nnz == 1
        with pytest.raises(AdapterFormatError, match=r"1 of 1 delta is NaN or infinite in torch.float16"):
            tuner.adapter()


def test_checkpoint_goes_on_where_it_stopped() -> None:
    whole, halves = models(), models()
    masks = small_masks(whole)
    with SparseTuner(whole, masks) as tuner:
        tune(tuner, partial(loss_of, whole), 2)
        state = tuner.state_dict()
        tuner.deltas.data.zero_()
        weights = {name: p.detach().clone() for name, p in parameters_of(whole).items()}
    with SparseTuner(halves, state["masks"]) as resumed:
        resumed.load_state_dict(state)
        assert all(torch.equal(p, weights[name]) for name, p in parameters_of(halves).items())
        assert torch.equal(resumed.deltas, state["deltas"])
        assert bool(state["deltas"].any()), "the state shares memory with the tuner"


def test_checkpoint_of_other_masks_is_refused() -> None:
    model = tiny.linears()
    with SparseTuner(model, {"0.weight": torch.tensor([0, 1])}) as tuner:
        state = {"deltas": torch.ones(2), "masks": {"0.weight": torch.tensor([0, 2])}}
        with pytest.raises(AdapterMismatchError, match=r"other masks.*\n  - 0.weight"):
            tuner.load_state_dict(state)
        assert not tuner.deltas.any()


def test_checkpoint_of_masks_in_another_order_is_refused() -> None:
    """Deltas and the optimizer's state follow the order."""
    model, masks = tiny.linears(), {"0.weight": torch.tensor([0, 1]), "2.weight": torch.tensor([3])}
    with SparseTuner(model, masks) as tuner:
        state = tuner.state_dict()
    turned = dict(reversed(masks.items()))
    with SparseTuner(model, turned) as tuner, pytest.raises(AdapterMismatchError, match="other masks") as told:
        tuner.load_state_dict(state)
    assert str(told.value).splitlines()[1:] == [
        "  - 0.weight: number 1 in the checkpoint, expected 2.weight: the order differs",
        "  - 2.weight: number 2 in the checkpoint, expected 0.weight: the order differs",
    ]


def test_no_checkpoint_is_loaded_after_restore() -> None:
    with SparseTuner(tiny.linears(), {"0.weight": torch.tensor([0, 1])}) as tuner:
        state = tuner.state_dict()
    state["deltas"] += 1
    with pytest.raises(ResidentStateError, match="this tuner was restored"):
        tuner.load_state_dict(state)
    assert not tuner.deltas.any()


# ---------------------------------------------------------------- what cannot be trained


def test_masks_that_fit_nothing_are_all_named() -> None:
    model = tiny.linears()
    masks = {"0.weight": torch.tensor([0]), "9.weight": torch.tensor([0]), "2.weight": torch.tensor([5, 10_000])}
    with pytest.raises(AdapterMismatchError, match=r"2 of 3 masks(.|\n)*9.weight(.|\n)*2.weight.*out of range"):
        SparseTuner(model, masks)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(AdapterMismatchError, match=r"vae.x.weight: belongs to no component of unet"):
        SparseTuner({"unet": model}, {"vae.x.weight": torch.tensor([0])})
    with pytest.raises(AdapterMismatchError, match="no masks"):
        SparseTuner(model, {})


def quantized() -> tuple[nn.Module, str]:
    return torch.ao.quantization.quantize_dynamic(tiny.linears(), {nn.Linear}), "quantized"


def on_meta() -> tuple[nn.Module, str]:
    return tiny.linears().to("meta"), "meta device"


def double() -> tuple[nn.Module, str]:
    return tiny.linears().double(), "torch.float64, expected float32"


@pytest.mark.parametrize("make", [quantized, on_meta, double])
def test_bases_that_cannot_be_trained_are_refused(make: Callable[[], tuple[nn.Module, str]]) -> None:
    model, message = make()
    with pytest.raises(ResidentStateError, match=message):
        SparseTuner(model, {"0.weight": torch.tensor([0])})


def test_fused_projections_are_refused() -> None:
    unet = tiny.unet()
    masks = build_masks(unet, "rand", 0.1, ["to_q"])
    unet.fuse_qkv_projections()
    with pytest.raises(ResidentStateError, match="unfuse_qkv_projections"):
        SparseTuner(unet, masks)


@pytest.mark.parametrize("family", ["rand", "struct"])
def test_a_tuner_that_is_dropped_without_restore_is_freed_and_so_is_its_model(family: str) -> None:
    parts = models()
    tuner = SparseTuner(parts, small_masks(parts, family))
    tune(tuner, partial(loss_of, parts), 1)
    gone = weakref.ref(tuner)
    weights = [weakref.ref(adapted.parameter) for adapted in tuner._adapted.values()]
    del tuner
    gc.collect()
    assert gone() is None
    loss_of(parts, 1).backward()  # the model goes on without it
    del parts
    gc.collect()
    assert not any(weight() is not None for weight in weights)


@pytest.mark.parametrize("family", ["rand", "struct"])
def test_a_copy_of_a_model_in_training_is_whole_and_trains_nothing(family: str) -> None:
    parts = models()
    with SparseTuner(parts, small_masks(parts, family), recompute=True) as tuner:
        tune(tuner, partial(loss_of, parts), 1)
        copied = copy.deepcopy(parts)
        for name, part in parts.items():
            tiny.assert_same_bits(copied[name], tiny.snapshot(part))
        tuner.deltas.grad = None
        loss_of(copied, 1).backward()
        assert tuner.deltas.grad is None
        loss_of(parts, 1).backward()
        assert tuner.deltas.grad is not None


def test_a_model_with_an_active_adapter_is_refused() -> None:
    unet = tiny.unet()
    resident = Resident(unet)
    resident.add(tiny.adapter_for(unet), "style")
    resident.set({"style": 1.0})
    with pytest.raises(ResidentStateError, match=r"adapters are active.*style.*disable_shira"):
        SparseTuner(unet, build_masks(unet, "rand", 0.1, ["to_q"]))
    resident.clear()
    SparseTuner(unet, build_masks(unet, "rand", 0.1, ["to_q"])).restore()
