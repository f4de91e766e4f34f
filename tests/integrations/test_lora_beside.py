"""LoRAs beside adapters, and what LoRA's users expect: the intents of diffusers' own LoRA and hotswap tests."""

import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from shira_diffusers import save_adapter
from tests import reference, tiny

ADAPTERS = {name: tiny.adapter_for(tiny.pipeline(), seed) for seed, name in enumerate("ab")}
ADAPTERS["b"] = tiny.adapter_for(tiny.pipeline(), 1, density=0.05, only=("to_v", "conv1", "q_proj"))
MIX = {"a": 0.7, "b": {"unet": 0.5}}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRAs of the UNet's attention and convolutions, of different ranks."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("first", "second")):
        model = tiny.unet()
        model.add_adapter(LoraConfig(r=2 + seed, target_modules=["to_q", "to_v", "conv1"]))
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_()
        StableDiffusionPipeline.save_lora_weights(folder / name, unet_lora_layers=get_peft_model_state_dict(model))
    return folder


def dense(mix: dict[str, object]) -> StableDiffusionPipeline:
    """A pipeline whose weights hold a mix, written by the oracle."""
    twin = tiny.pipeline()
    expected = reference.apply(tiny.snapshot(twin), ADAPTERS, mix)
    for part, model in tiny.modules_of(twin).items():
        own = {n.removeprefix(f"{part}."): w for n, w in expected.items() if n.startswith(f"{part}.")}
        model.load_state_dict(own, strict=False)
    return twin


def load(pipe: DiffusionPipeline) -> None:
    for name, adapter in ADAPTERS.items():
        pipe.load_shira(adapter, name, activate=False)


Step = Callable[[DiffusionPipeline, Path], object]
LIFE: dict[str, Step] = {
    "load_lora_weights": lambda pipe, loras: pipe.load_lora_weights(loras / "first", adapter_name="first"),
    "load a second": lambda pipe, loras: pipe.load_lora_weights(loras / "second", adapter_name="second"),
    "set_adapters, one": lambda pipe, _: pipe.set_adapters("second", 0.5),
    "set_adapters, both": lambda pipe, _: pipe.set_adapters(["first", "second"], [0.3, 0.8]),
    "set_adapters, by block": lambda pipe, _: pipe.set_adapters("first", {"unet": {"up": {"block_0": [0.2, 0.6]}}}),
    "disable_lora": lambda pipe, _: pipe.disable_lora(),
    "enable_lora": lambda pipe, _: pipe.enable_lora(),
    "delete_adapters, one": lambda pipe, _: pipe.delete_adapters("first"),
    "set_adapters, the other": lambda pipe, _: pipe.set_adapters("second", 1.0),
    "unload_lora_weights": lambda pipe, _: pipe.unload_lora_weights(),
    "load again": lambda pipe, loras: pipe.load_lora_weights(loras / "first", adapter_name="again"),
    "delete_adapters, the last": lambda pipe, _: pipe.delete_adapters("again"),
}


@pytest.fixture(scope="module")
def pictures(loras: Path) -> dict[str, dict[str, Tensor]]:
    """The picture after each step of LoRA's life, on the base and on weights that hold a mix."""
    found = {}
    for kind, mix in (("base", {}), ("mix", MIX)):
        pipe = dense(mix)
        found[kind] = {"": tiny.picture(pipe)}
        for name, step in LIFE.items():
            step(pipe, loras)
            found[kind][name] = tiny.picture(pipe)
    return found


@pytest.mark.parametrize("loaded", list(LIFE))
def test_a_life_of_loras_beside_a_mix(
    pipe: StableDiffusionPipeline, loras: Path, pictures: dict[str, dict[str, Tensor]], loaded: str
) -> None:
    """Adapters come at any point of a LoRA's life; from there on each picture is that of weights which hold the mix."""
    base, begun = tiny.snapshot(pipe), False
    for name, step in LIFE.items():
        step(pipe, loras)
        if name == loaded:
            load(pipe)
            begun = True
        if not begun:
            continue
        pipe.set_shira(MIX)
        assert torch.equal(tiny.picture(pipe), pictures["mix"][name]), name
        pipe.disable_shira()
        assert torch.equal(tiny.picture(pipe), pictures["base"][name]), name
        pipe.enable_shira()
        assert pipe.get_active_shira() == MIX
    pipe.unload_lora_weights()
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, base)


def test_the_life_of_loras_changes_pictures(pictures: dict[str, dict[str, Tensor]]) -> None:
    base = pictures["base"]
    assert torch.equal(base["unload_lora_weights"], base[""])
    steps = ["", *list(LIFE)[:5]]
    assert not any(torch.equal(base[one], base[other]) for one, other in pairwise(steps))
    assert not any(torch.equal(base[name], pictures["mix"][name]) for name in base)


# -------------------------------------------------------------------- hotswap


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """A count of the graphs that were compiled since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def files(folder: Path) -> dict[str, Path]:
    """The adapters as files: of other density, other layers, and one of them without text encoder."""
    thin = ADAPTERS["a"].part("unet").prefixed("unet")
    named = {**ADAPTERS, "thin": thin}
    return {name: save_adapter(adapter, folder / f"{name}.safetensors") for name, adapter in named.items()}


def anew(file: Path, scale: float = 1.0) -> Tensor:
    pipe = tiny.pipeline()
    pipe.load_shira(file, scale=scale)
    return tiny.picture(pipe)


def test_hotswapping_equals_loading_anew(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    base, stored = tiny.snapshot(pipe), files(tmp_path)
    before = tiny.picture(pipe)
    pipe.load_shira(stored["a"], "style", scale=0.8)
    for name in ("b", "thin", "a", "b"):
        pipe.load_shira(stored[name], "style", hotswap=True)
        assert pipe.get_active_shira() == {"style": 0.8}
        assert torch.equal(tiny.picture(pipe), anew(stored[name], 0.8)), name
    assert list(pipe.list_shira()) == ["style"]
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, base)
    assert torch.equal(tiny.picture(pipe), before)


def test_hotswapping_keeps_the_mix(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    stored, base = files(tmp_path), tiny.snapshot(pipe)
    pipe.load_shira(stored["a"], "x", activate=False)
    pipe.load_shira(stored["b"], "y", activate=False)
    pipe.load_shira(stored["b"], "x", hotswap=True)
    assert pipe.get_active_shira() == {}
    tiny.assert_same_bits(pipe, base)  # what is not active stays so
    pipe.set_shira({"x": 0.3, "y": {"unet": 0.6}})
    pipe.load_shira(stored["a"], "x", hotswap=True)
    assert pipe.get_active_shira() == {"x": 0.3, "y": {"unet": 0.6}}
    expected = reference.apply(base, {"x": ADAPTERS["a"], "y": ADAPTERS["b"]}, {"x": 0.3, "y": {"unet": 0.6}})
    tiny.assert_same_bits(pipe, expected)
    pipe.disable_shira()
    pipe.load_shira(stored["thin"], "x", hotswap=True)
    tiny.assert_same_bits(pipe, base)
    pipe.enable_shira()
    thin = ADAPTERS["a"].part("unet").prefixed("unet")
    expected = reference.apply(base, {"x": thin, "y": ADAPTERS["b"]}, {"x": 0.3, "y": {"unet": 0.6}})
    tiny.assert_same_bits(pipe, expected)


def test_hotswapping_compiles_nothing(pipe: StableDiffusionPipeline, tmp_path: Path, graphs: Callable[[], int]) -> None:
    """No ``enable_lora_hotswap`` before, and text encoders too; diffusers' tests raise on any recompilation."""
    stored = files(tmp_path)
    expected = {name: anew(file) for name, file in stored.items()}
    pipe.unet.compile(backend="aot_eager")
    pipe.text_encoder.compile(backend="aot_eager")
    pipe.load_shira(stored["a"], "style")
    assert torch.allclose(tiny.picture(pipe), expected["a"], rtol=1e-3, atol=1e-3)
    compiled = graphs()
    assert compiled
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("b", "thin", "a"):
            pipe.load_shira(stored[name], "style", hotswap=True)
            picture = tiny.picture(pipe)
            assert torch.allclose(picture, expected[name], rtol=1e-3, atol=1e-3), name
            assert not torch.allclose(picture, expected["b" if name != "b" else "a"], rtol=1e-3, atol=1e-3)
        pipe.unload_shira()
        tiny.picture(pipe)
    assert graphs() == compiled


def test_hotswapping_beside_a_lora(pipe: StableDiffusionPipeline, loras: Path, tmp_path: Path) -> None:
    stored = files(tmp_path)
    pipe.load_lora_weights(loras / "first", adapter_name="first")
    pipe.load_shira(stored["a"], "style")
    pipe.load_shira(stored["b"], "style", hotswap=True)
    twin = dense({"b": 1.0})
    twin.load_lora_weights(loras / "first")
    assert torch.equal(tiny.picture(pipe), tiny.picture(twin))
    assert pipe.get_active_adapters() == ["first"]


# -------------------------------------------------------------------- strengths in LoRA's way


def told(act: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in caught if "SHiRA" in str(warning.message)]


def test_a_scale_that_changes_nothing_is_told_once(pipe: StableDiffusionPipeline) -> None:
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    assert not told(lambda: tiny.picture(pipe, **scaled))  # nothing is active
    pipe.load_shira(ADAPTERS["a"], "a")
    for harmless in ({}, {"cross_attention_kwargs": {}}, {"cross_attention_kwargs": {"scale": 1.0}}):
        assert not told(lambda options=harmless: tiny.picture(pipe, **options))
    full = tiny.picture(pipe)
    (message,) = told(lambda: tiny.picture(pipe, **scaled))
    assert "cross_attention_kwargs={'scale': 0.5} is for LoRAs, and none is active: 'a' of SHiRA" in message
    assert "use pipe.set_shira({'a': ...}), or `with pipe.shira({'a': ...}):`" in message
    assert torch.equal(tiny.picture(pipe, **scaled), full)
    assert not told(lambda: tiny.picture(pipe, **scaled))


class Joint(DiffusionPipeline):
    """A pipeline of the user's own, with names which tiny pipelines do not have."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.register_modules(unet=unet)

    def __call__(self, prompt: str, joint_attention_kwargs: object = None, attention_kwargs: object = None) -> None: ...


@pytest.mark.parametrize("keyword", ["joint_attention_kwargs", "attention_kwargs"])
@pytest.mark.parametrize("by_position", [True, False])
def test_other_names_of_the_scale(keyword: str, by_position: bool) -> None:
    own, options = Joint(tiny.unet()), {"scale": 0.0}
    own.load_shira(ADAPTERS["a"].part("unet").prefixed("unet"), "a")
    before = (None,) if keyword == "attention_kwargs" else ()
    (message,) = told(lambda: own("", *before, options) if by_position else own("", **{keyword: options}))
    assert message.startswith(f"{keyword}={{'scale': 0.0}} is for LoRAs")


def test_the_scale_of_an_encoded_prompt(pipe: StableDiffusionPipeline) -> None:
    pipe.load_shira(ADAPTERS["a"], "a")
    arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    (message,) = told(lambda: pipe.encode_prompt(tiny.PROMPT, **arguments, lora_scale=0.3))
    assert message.startswith("lora_scale=0.3 is for LoRAs")


def test_the_scale_is_for_an_active_lora(pipe: StableDiffusionPipeline, loras: Path) -> None:
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    twin = dense({"a": 1.0})
    for each in (pipe, twin):
        each.load_lora_weights(loras / "first", adapter_name="first")
    pipe.load_shira(ADAPTERS["a"], "a")
    assert not told(lambda: tiny.picture(pipe, **scaled))
    assert torch.equal(tiny.picture(pipe, **scaled), tiny.picture(twin, **scaled))
    pipe.disable_lora()
    assert told(lambda: tiny.picture(pipe, **scaled))
