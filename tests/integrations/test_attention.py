"""Adapters beside fixed weights: the pictures of overwritten ones up to rounding, and the base to the bit after."""

import copy
import pickle
import threading
from collections.abc import Callable
from functools import partial

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from optimum.quanto import freeze, qint8, quantize
from peft import LoraConfig
from torch import Tensor, nn

from shira_diffusers import AdapterMismatchError, Resident, ShiraAdapter, ShiraError, SparseDelta
from shira_diffusers.engine.side_branch import SideBranch
from shira_diffusers.integrations.attention import (
    ShiraAttnProcessor,
    remove_shira_attn_processors,
    set_shira_attn_processors,
)
from tests import tiny

# of the largest entry of the result; deltas here are as large as the weights
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ALL = ("",)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert float((got - expected).abs().max() / expected.abs().max()) < TOLERANCE[dtype]


def overwritten(model: nn.Module, adapters: dict[str, ShiraAdapter], scales: dict[str, object]) -> Tensor:
    """What a copy of a UNet gives with these adapters in its weights."""
    twin = copy.deepcopy(model)
    resident = Resident(twin)
    for name, adapter in adapters.items():
        resident.add(adapter, name)
    resident.set(scales)
    return tiny.run_unet(twin)


def installed(model: nn.Module) -> tuple[int, int]:
    """Processors of ours, and hooks."""
    processors = sum(isinstance(module, ShiraAttnProcessor) for module in model.modules())
    return processors, sum(len(module._forward_hooks) for module in model.modules())


class Named(AttnProcessor2_0):
    """A user's processor, with an argument of its own."""

    def __call__(self, attn: Attention, hidden_states: Tensor, strength: float = 1.0, **others: Tensor) -> Tensor:
        return super().__call__(attn, hidden_states, **others) * strength


def use(processor: Callable[[], object]) -> Callable[[UNet2DConditionModel], None]:
    return lambda model: model.set_attn_processor(processor())


@pytest.mark.parametrize(
    ("configure", "dtype"),
    [
        pytest.param(use(AttnProcessor), torch.float32, id="plain"),
        pytest.param(use(AttnProcessor2_0), torch.float32, id="2_0"),
        pytest.param(use(AttnProcessor2_0), torch.float16, id="2_0-fp16"),
        pytest.param(use(AttnProcessor2_0), torch.bfloat16, id="2_0-bf16"),
        pytest.param(use(partial(SlicedAttnProcessor, 2)), torch.float32, id="sliced"),
        pytest.param(use(Named), torch.float32, id="custom"),
        pytest.param(lambda model: model.fuse_qkv_projections(), torch.float32, id="fused"),
    ],
)
def test_result_is_that_of_overwritten_weights(
    configure: Callable[[UNet2DConditionModel], None], dtype: torch.dtype
) -> None:
    """Of every Linear and Conv2d weight of the model."""
    model = tiny.unet().to(dtype)
    configure(model)
    before, bits, processors = tiny.run_unet(model), tiny.snapshot(model), dict(model.attn_processors)
    adapter = tiny.adapter_for(model, only=ALL, dtype=torch.float16, size=0.1)
    expected = overwritten(model, {"it": adapter}, {"it": 1.0})
    set_shira_attn_processors(model, adapter)
    assert_close(tiny.run_unet(model), expected, dtype)
    assert float((before - expected).abs().max() / expected.abs().max()) > 10 * TOLERANCE[dtype]
    tiny.assert_same_bits(model, bits)
    remove_shira_attn_processors(model)
    remove_shira_attn_processors(model)
    assert torch.equal(tiny.run_unet(model), before)
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    assert installed(model) == (0, 0)
    assert model.state_dict().keys() == bits.keys()


def flux_output(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 16, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
    }
    with torch.no_grad():
        return model(
            **given, timestep=torch.tensor([0.5]), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3)
        ).sample


def sd3_output(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
    }
    with torch.no_grad():
        return model(**given, timestep=torch.tensor([500])).sample


def wan_output(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 4, 1, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 512, 16, generator=generator),  # the length of Wan's texts
        "encoder_hidden_states_image": torch.randn(1, 5, 4, generator=generator),
    }
    with torch.no_grad():
        return model(**given, timestep=torch.tensor([500])).sample


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize(
    ("make", "output"),
    [(tiny.sd3_transformer, sd3_output), (tiny.flux_transformer, flux_output), (tiny.wan_transformer, wan_output)],
    ids=["sd3", "flux", "wan"],
)
def test_joint_attention(make: Callable[[], nn.Module], output: Callable[[nn.Module], Tensor], fused: bool) -> None:
    model = make()
    if fused:
        model.fuse_qkv_projections()
    adapter = tiny.adapter_for(model, only=("attn.", "attn2.", "ff", "proj_"), size=0.1)
    assert any("add_v_proj" in name for name in adapter.deltas)
    twin = copy.deepcopy(model)
    resident = Resident(twin)
    resident.add(adapter, "it")
    resident.set({"it": 1.0})
    set_shira_attn_processors(model, adapter)
    expected = output(twin)
    assert_close(output(model), expected)
    remove_shira_attn_processors(model)
    resident.clear()
    assert torch.equal(output(model), output(twin))


def test_text_encoders_and_components(pipe: DiffusionPipeline) -> None:
    adapter = tiny.adapter_for(pipe, only=ALL, size=0.1)
    before = tiny.picture(pipe)
    for component in ("unet", "text_encoder"):
        set_shira_attn_processors(getattr(pipe, component), adapter, component=component)
    beside = tiny.picture(pipe)
    for component in ("unet", "text_encoder"):
        remove_shira_attn_processors(getattr(pipe, component))
    assert torch.equal(tiny.picture(pipe), before)
    resident = Resident(tiny.modules_of(pipe))
    resident.add(adapter, "it")
    resident.set({"it": 1.0})
    assert float((beside - tiny.picture(pipe)).abs().max()) < 1e-4 < float((beside - before).abs().max())


# ---------------------------------------------------------------- several, and how strongly


def test_a_mix_is_that_of_a_resident_model() -> None:
    model, base = tiny.unet(), tiny.unet()
    adapters = {name: tiny.adapter_for(base, seed, only=ALL, size=0.1) for seed, name in enumerate("ab")}
    set_shira_attn_processors(model, list(adapters.values()), [0.5, -0.3])
    assert_close(tiny.run_unet(model), overwritten(base, adapters, {"a": 0.5, "b": -0.3}))
    set_shira_attn_processors(model, adapters["a"], 2.0)  # replaces
    assert_close(tiny.run_unet(model), overwritten(base, adapters, {"a": 2.0}))


def test_strength_by_block() -> None:
    model = tiny.unet()
    prefixed = tiny.adapter_for(model, only=ALL, size=0.1).prefixed("unet")
    strength = {"unet": {"down": 0.0, "mid": 0.5, "up": 1.5}}
    set_shira_attn_processors(model, prefixed, strength)
    twin = copy.deepcopy(tiny.unet())
    resident = Resident({"unet": twin})
    resident.add(prefixed, "it")
    resident.set({"it": strength})
    assert_close(tiny.run_unet(model), tiny.run_unet(twin))
    assert not any(isinstance(module, ShiraAttnProcessor) for module in model.down_blocks.modules())


def test_scale_zero_is_the_base_to_the_bit() -> None:
    model = tiny.unet()
    before = tiny.run_unet(model)
    adapter = tiny.adapter_for(model, only=("attn",))
    set_shira_attn_processors(model, adapter, 0.0)
    assert installed(model) == (0, 0)
    set_shira_attn_processors(model, adapter)
    assert not torch.equal(tiny.run_unet(model), before)
    for processor in model.attn_processors.values():
        processor.scale = 0.0
    assert torch.equal(tiny.run_unet(model), before)


def test_a_branch_of_scale_zero_adds_nothing_whatever_comes_in() -> None:
    layer = nn.Linear(4, 3)
    branch = SideBranch(SparseDelta(torch.tensor([0]), torch.tensor([1.0]), (3, 4)))
    output = torch.tensor([[-0.0, 1.0, 2.0]])
    assert branch.add(layer, torch.full((1, 4), torch.inf), output, scale=0.0) is output


# ---------------------------------------------------------------- the processor by itself


def attention(processor: object) -> tuple[Attention, dict[str, SparseDelta]]:
    torch.manual_seed(0)
    layer = Attention(16, cross_attention_dim=12, heads=2, dim_head=8, processor=processor)
    weights = tiny.adapter_for(layer, only=("to_q", "to_k.", "to_v.", "to_out")).deltas
    return layer, {name.removesuffix(".weight"): delta for name, delta in weights.items()}


def test_arguments_of_the_wrapped_processor_arrive(caplog: pytest.LogCaptureFixture) -> None:
    layer, deltas = attention(Named())
    x, text = torch.randn(1, 4, 16), torch.randn(1, 3, 12)
    layer.set_processor(ShiraAttnProcessor(layer.processor, deltas))
    torch.testing.assert_close(layer(x, text, strength=2.0), 2 * layer(x, text))
    layer(x, text, unknown=1)
    assert "['unknown'] are not expected" in caplog.text


def test_an_ip_adapter_inside_keeps_its_weights_and_arguments() -> None:
    inner = IPAdapterAttnProcessor2_0(16, 12, num_tokens=(2,), scale=0.7)
    layer, deltas = attention(inner)
    layer.set_processor(ShiraAttnProcessor(inner, deltas))
    twin = copy.deepcopy(layer)
    twin.set_processor(twin.processor.processor)
    for name, delta in deltas.items():
        twin.get_submodule(name).weight.data += delta.to_dense()
    text = (torch.randn(1, 3, 12), [torch.randn(1, 1, 2, 12)])
    x, masks = torch.randn(1, 16, 16), [torch.zeros(1, 1, 4, 4)]
    with torch.no_grad():
        torch.testing.assert_close(layer(x, text), twin(x, text), rtol=0, atol=1e-6)
        masked = layer(x, text, ip_adapter_masks=masks)
        torch.testing.assert_close(masked, twin(x, text, ip_adapter_masks=masks), rtol=0, atol=1e-6)
        assert not torch.allclose(masked, layer(x, text))
    layer.half()
    assert inner.to_k_ip[0].weight.dtype == torch.float16


def test_an_error_leaves_the_layer_as_it_was() -> None:
    class Failing(AttnProcessor2_0):
        def __call__(self, attn: Attention, *args: Tensor, **kwargs: Tensor) -> Tensor:
            attn.seen = attn.to_q(args[0])
            raise RuntimeError("stop")

    layer, deltas = attention(AttnProcessor2_0())
    x, text = torch.randn(1, 4, 16), torch.randn(1, 3, 12)
    plain, children = layer.to_q(x), {name: dict(m.__dict__) for name, m in layer.named_modules()}
    layer.set_processor(ShiraAttnProcessor(Failing(), deltas))
    with pytest.raises(RuntimeError, match="stop"):
        layer(x, text)
    torch.testing.assert_close(layer.seen, plain + x @ deltas["to_q"].to_dense().T)  # what a processor sets arrives
    assert torch.equal(layer.to_q(x), plain)
    for name in deltas:
        assert layer.get_submodule(name).__dict__.keys() == children[name].keys()
        assert not layer.get_submodule(name)._forward_hooks


def test_layers_that_are_called_by_keyword() -> None:
    """As AnimateDiff calls ``proj_in(input=...)``."""

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model, x = Called(), torch.ones(1, 4)
    adapter = tiny.adapter_for(model, only=ALL)
    expected = model(x) + x @ adapter.deltas["layer.weight"].to_dense().T
    set_shira_attn_processors(model, adapter)
    torch.testing.assert_close(model(x), expected)
    remove_shira_attn_processors(model)
    assert not model.layer._forward_hooks_with_kwargs


def test_gradients_reach_the_input() -> None:
    layer, deltas = attention(AttnProcessor2_0())
    dense = copy.deepcopy(layer)
    for name, delta in deltas.items():
        dense.get_submodule(name).weight.data += delta.to_dense()
    layer.set_processor(ShiraAttnProcessor(layer.processor, deltas))
    text, inputs = torch.randn(1, 3, 12), [torch.ones(1, 4, 16, requires_grad=True) for _ in range(2)]
    for one, x in zip((layer, dense), inputs, strict=True):
        one(x, text).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-6)


def test_the_scale_of_a_processor_may_change() -> None:
    layer, deltas = attention(AttnProcessor2_0())
    halved = {name: SparseDelta(delta.indices, delta.values / 2, delta.shape) for name, delta in deltas.items()}
    x, text = torch.randn(1, 4, 16), torch.randn(1, 3, 12)
    layer.set_processor(ShiraAttnProcessor(AttnProcessor2_0(), halved))
    expected = layer(x, text)
    layer.set_processor(ShiraAttnProcessor(AttnProcessor2_0(), deltas))
    layer.processor.scale = 0.5
    torch.testing.assert_close(layer(x, text), expected, rtol=0, atol=1e-6)


def test_no_projections_are_refused() -> None:
    layer, deltas = attention(AttnProcessor2_0())
    with pytest.raises(AdapterMismatchError, match=r"no attention projections: to_x; expected.*to_out\.0"):
        ShiraAttnProcessor(layer.processor, {**deltas, "to_x": deltas["to_q"]})


# ---------------------------------------------------------------- with what diffusers does


def test_quantized_model_is_close_to_one_quantized_after_overwriting() -> None:
    model = tiny.unet()
    adapter = tiny.adapter_for(model, only=("attn", "ff", "conv1"), size=0.02)
    twin = copy.deepcopy(model)
    resident = Resident(twin)
    resident.add(adapter, "it")
    resident.set({"it": 1.0})
    resident.bake()
    for one in (model, twin):
        quantize(one, weights=qint8)
        freeze(one)
    before = tiny.run_unet(model)
    set_shira_attn_processors(model, adapter)
    beside, expected = tiny.run_unet(model), tiny.run_unet(twin)
    assert float((beside - expected).norm() / (before - expected).norm()) < 0.2  # what int8 rounds
    remove_shira_attn_processors(model)
    assert torch.equal(tiny.run_unet(model), before)


def test_sequential_offload(pipe: DiffusionPipeline) -> None:
    model = tiny.unet()
    adapter = tiny.adapter_for(model, only=ALL, size=0.1)
    expected = overwritten(model, {"it": adapter}, {"it": 1.0})
    set_shira_attn_processors(model, adapter)
    beside = tiny.run_unet(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
    with torch.no_grad():
        assert torch.equal(model(sample, 10, text).sample, beside)
    assert_close(beside, expected)


def test_lora_in_the_same_model() -> None:
    model = tiny.unet()
    adapter = tiny.adapter_for(model, only=ALL, size=0.1)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "conv1"], init_lora_weights=False))
    expected = overwritten(model, {"it": adapter}, {"it": 1.0})
    set_shira_attn_processors(model, adapter)
    assert_close(tiny.run_unet(model), expected)


def test_compiled_after() -> None:
    layer, deltas = attention(AttnProcessor2_0())
    x, text = torch.randn(1, 4, 16), torch.randn(1, 3, 12)
    layer.set_processor(ShiraAttnProcessor(layer.processor, deltas))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x, text), layer(x, text), rtol=0, atol=1e-6)
    torch._dynamo.reset()


def test_autocast_takes_the_branches_along() -> None:
    model = tiny.unet()
    adapter = tiny.adapter_for(model, only=("attn", "ff"), size=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        expected = overwritten(model, {"it": adapter}, {"it": 1.0})
        set_shira_attn_processors(model, adapter)
        assert_close(tiny.run_unet(model), expected, torch.bfloat16)


def test_without_a_sparse_kernel_the_product_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.unet()
    adapter = tiny.adapter_for(model, only=ALL, size=0.1)
    expected = overwritten(model, {"it": adapter}, {"it": 1.0})
    set_shira_attn_processors(model, adapter)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(torch.sparse, "mm", None)
    assert_close(tiny.run_unet(model), expected)


def test_copies_and_threads() -> None:
    model = tiny.unet()
    set_shira_attn_processors(model, tiny.adapter_for(model, only=ALL, size=0.1))
    expected = tiny.run_unet(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tiny.run_unet(other), expected)
        remove_shira_attn_processors(other)
    assert torch.equal(tiny.run_unet(model), expected)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(tiny.run_unet(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


# ---------------------------------------------------------------- what is refused


def broken(adapter: ShiraAdapter, kind: str) -> ShiraAdapter:
    deltas = dict(adapter.deltas)
    name = next(iter(deltas))
    delta = SparseDelta(torch.tensor([0]), torch.tensor([1.0]), (3, 5))
    if kind == "name":
        deltas["down_blocks.9.to_q.weight"] = delta
    elif kind == "shape":
        deltas[name] = delta
    else:
        deltas["conv_norm_out.weight"] = SparseDelta(torch.tensor([0]), torch.tensor([1.0]), (32,))
    return ShiraAdapter(deltas, adapter.metadata)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        pytest.param("name", r"down_blocks\.9\.to_q\.weight: no such parameter", id="name"),
        pytest.param("shape", r"weight: expected \(\d+, \d+.*\), got \(3, 5\)", id="shape"),
        pytest.param(
            "norm", r"conv_norm_out\.weight of GroupNorm: only weights of Linear, Conv2d and Conv1D", id="norm"
        ),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(kind: str, message: str) -> None:
    model = tiny.unet()
    good = tiny.adapter_for(model, 1, size=0.1)
    set_shira_attn_processors(model, good)
    before = tiny.run_unet(model)
    with pytest.raises(
        AdapterMismatchError, match=rf"1 of \d+ parameters differs; it was trained on 'tiny'(.|\n)*{message}"
    ):
        set_shira_attn_processors(model, [good, broken(good, kind)])
    assert torch.equal(tiny.run_unet(model), before)


def test_components_are_named(pipe: DiffusionPipeline) -> None:
    adapter = tiny.adapter_for(pipe)
    with pytest.raises(AdapterMismatchError, match=r"components text_encoder, unet, expected one: .* component="):
        set_shira_attn_processors(pipe.unet, adapter)
    with pytest.raises(AdapterMismatchError, match="components text_encoder, unet, expected 'prior' among them"):
        set_shira_attn_processors(pipe.unet, adapter, component="prior")
    assert installed(pipe.unet) == (0, 0)


def test_scales_are_checked() -> None:
    model = tiny.unet()
    adapter = tiny.adapter_for(model)
    with pytest.raises(ShiraError, match="got 1 adapter and 2 scales"):
        set_shira_attn_processors(model, adapter, [1.0, 2.0])
    with pytest.raises(ShiraError, match="got 0 adapters"):
        set_shira_attn_processors(model, [])
    with pytest.raises(ShiraError, match="must be a finite number"):
        set_shira_attn_processors(model, adapter, float("nan"))
    assert installed(model) == (0, 0)
