"""Named adapters on a quantized UNet: switched and mixed beside its weights, of which no bit changes."""

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from optimum.quanto import QTensor, freeze, qint8, quantize
from torch import Tensor, nn

from shira_diffusers import (
    AdapterLibrary,
    AdapterMismatchError,
    Resident,
    ResidentStateError,
    ShiraAdapter,
    ShiraError,
    SparseDelta,
    save_adapter,
)
from shira_diffusers.engine.side_branch import ResidentBranch, hooks_of
from shira_diffusers.engine.state import ShiraState
from tests import tiny

CLOSE = 1e-4  # of the largest entry of a latent


def quantized(pipe: StableDiffusionPipeline, exclude: str | None = None) -> StableDiffusionPipeline:
    quantize(pipe.unet, weights=qint8, exclude=exclude)
    freeze(pipe.unet)
    return pipe


def dequantized(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The same base in plain weights, which adapters overwrite: the oracle."""
    twin = tiny.pipeline()
    for name, weight in pipe.unet.named_parameters():
        own = twin.unet.get_parameter(name)
        own.data.copy_(weight.dequantize() if isinstance(weight, QTensor) else weight)
    return twin


def stored(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """What a quantized UNet is made of."""
    return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items() if isinstance(tensor, Tensor)}


def adapters() -> dict[str, ShiraAdapter]:
    pipe = tiny.pipeline()
    return {name: tiny.adapter_for(pipe, seed, only=("",), size=0.1) for seed, name in enumerate("ab", 1)}


def load(*pipes: StableDiffusionPipeline) -> None:
    for pipe in pipes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, adapter in adapters().items():
                pipe.load_shira(adapter, name, activate=False)


def assert_close(one: Tensor, other: Tensor) -> None:
    assert float((one - other).abs().max() / other.abs().max()) < CLOSE


def branches(pipe: StableDiffusionPipeline) -> int:
    return len(hooks_of(pipe.unet, ResidentBranch))


@pytest.fixture
def loaded(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    load(quantized(pipe))
    return pipe


def test_a_life_of_two_adapters(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    quantized(pipe)
    plain, bits, twin = tiny.picture(pipe), stored(pipe), dequantized(pipe)
    a = adapters()["a"]
    with pytest.warns(UserWarning, match=r"'a': \d+ of \d+ weights of unet are quantized.*costs"):
        pipe.load_shira(a, "a")
    twin.load_shira(a, "a")
    assert_close(tiny.picture(pipe), tiny.picture(twin))
    pipe.unload_shira()
    twin.unload_shira()
    load(pipe, twin)
    for mix in ("b", {"a": 0.5, "b": {"unet": {"down": -0.3}}}, {"a": {"text_encoder": 0.0}}):
        for one in (pipe, twin):
            one.set_shira(mix)
        mixed = tiny.picture(pipe)
        assert_close(mixed, tiny.picture(twin))
        assert not torch.allclose(mixed, plain, atol=1e-3)
    with pipe.shira("a"), twin.shira("a"):
        assert_close(tiny.picture(pipe), tiny.picture(twin))
    pipe.disable_shira()
    assert torch.equal(tiny.picture(pipe), plain)
    pipe.enable_shira()
    assert pipe.get_active_shira() == twin.get_active_shira()
    assert_close(tiny.picture(pipe), tiny.picture(twin))
    for one in (pipe, twin):
        one.load_shira(adapters()["b"], "a", hotswap=True)
    assert_close(tiny.picture(pipe), tiny.picture(twin))
    assert pipe.list_shira() == twin.list_shira()
    assert pipe.fuse_report() == twin.fuse_report()
    file = pipe.save_shira(tmp_path / "mix", {"a": 0.7, "b": 1.0})
    assert file.read_bytes() == twin.save_shira(tmp_path / "other", {"a": 0.7, "b": 1.0}).read_bytes()
    pipe.delete_shira("a")
    assert torch.equal(tiny.picture(pipe), plain)
    pipe.unload_shira()
    assert branches(pipe) == 0
    now = stored(pipe)
    assert now.keys() == bits.keys()
    assert all(torch.equal(now[name], bits[name]) for name in bits)


def test_a_quantized_layer_in_the_place_of_one_that_lives_on_gets_the_branch(loaded: StableDiffusionPipeline) -> None:
    for name in "abab":
        loaded.set_shira(name)
    unet = loaded.unet
    old, unet.conv_in = unet.conv_in, quantized(tiny.pipeline()).unet.conv_in
    loaded.set_shira("a")
    assert old is not unet.conv_in
    assert len(unet.conv_in._forward_hooks) == 1


def test_weights_that_are_not_quantized_are_overwritten(pipe: StableDiffusionPipeline) -> None:
    quantized(pipe, exclude="*conv*")
    twin, weight = dequantized(pipe), pipe.unet.conv_in.weight
    before = weight.detach().clone()
    load(pipe, twin)
    for one in (pipe, twin):
        one.set_shira(["a", "b"], [1.0, 0.5])
    assert torch.equal(weight, twin.unet.conv_in.weight)
    assert not torch.equal(weight, before)
    assert 0 < branches(pipe) < len(adapters()["a"].part("unet").deltas)
    assert_close(tiny.picture(pipe), tiny.picture(twin))
    pipe.unload_shira()
    assert torch.equal(weight, before)


def test_a_switch_that_fails_leaves_the_mix_before(
    loaded: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded.set_shira("a")
    before, switches = tiny.picture(loaded), list[ShiraState]()

    def fail(state: ShiraState, *_: object) -> None:
        switches.append(state)
        if len(switches) == 2:  # the other component is committed
            raise MemoryError

    for mix in ("x", {"b": float("nan")}):
        with pytest.raises(ShiraError):
            loaded.set_shira(mix)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(ShiraState, "set_overwritten", fail)
        loaded.set_shira("b")
    assert loaded.get_active_shira() == {"a": 1.0}
    assert torch.equal(tiny.picture(loaded), before)
    loaded.disable_shira()
    assert branches(loaded) == 0


def test_an_adapter_per_picture(loaded: StableDiffusionPipeline) -> None:
    twin, latents = dequantized(loaded), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    load(twin)
    loaded.set_shira("a")
    options = {"prompt": ["a cat", "a dog"], "cross_attention_kwargs": {"shira_adapters": ["b", {"a": 0.5}]}}
    assert_close(tiny.picture(loaded, latents=latents, **options), tiny.picture(twin, latents=latents, **options))
    assert branches(loaded) == len(adapters()["a"].part("unet").deltas)


def test_a_library_serves_it(loaded: StableDiffusionPipeline, tmp_path: Path) -> None:
    before = tiny.picture(loaded)
    with loaded.shira("a"):
        expected = tiny.picture(loaded)
    loaded.unload_shira()
    save_adapter(adapters()["a"], tmp_path / "a.safetensors")
    with AdapterLibrary(tmp_path) as library:
        for _ in range(2):
            with library.use(loaded, {"a": 1.0}) as styled:
                assert_close(tiny.picture(styled), expected)
        assert library.stats().device.hits == 1
    assert torch.equal(tiny.picture(loaded), before)


def test_what_does_not_fit_is_refused(loaded: StableDiffusionPipeline) -> None:
    adapter = adapters()["a"]
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    other = next(delta for delta in adapter.deltas.values() if delta.shape != adapter.deltas[name].shape)
    with pytest.raises(AdapterMismatchError, match=r"1 of \d+ parameters differs(?s:.*)to_q\.weight: expected"):
        loaded.load_shira(ShiraAdapter({**adapter.deltas, name: other}), "c")
    assert sorted(loaded.list_shira()) == ["a", "b"]


def test_baking_is_refused(loaded: StableDiffusionPipeline) -> None:
    loaded.set_shira("a")
    before = tiny.picture(loaded)
    with pytest.raises(ResidentStateError, match="beside quantized weights of unet, which cannot hold it"):
        loaded.bake_shira()
    assert torch.equal(tiny.picture(loaded), before)


def test_a_compiled_model_is_refused(loaded: StableDiffusionPipeline) -> None:
    loaded.unet.compile(backend="aot_eager")
    with pytest.raises(ResidentStateError, match="unet is quantized and compiled"):
        loaded.set_shira("a")
    assert branches(loaded) == 0


def test_layers_without_a_branch_are_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    model[0].weight = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ResidentStateError, match=r"0\.weight of this model is torch\.int8, expected a plain float32"):
        Resident(model).add(ShiraAdapter({"0.weight": SparseDelta(torch.tensor([0]), torch.ones(1), (4,))}), "a")
