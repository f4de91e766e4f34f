"""The methods and locks on diffusers' ``ModularPipeline``: its blocks run alone too, its models are loaded late."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import ComponentsManager, ModularPipeline, ModularPipelineBlocks, StableDiffusionXLPipeline
from diffusers.modular_pipelines import PipelineState, SequentialPipelineBlocks, StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from torch import Tensor

from shira_diffusers import AdapterLibrary, AdapterMismatchError, save_adapter
from shira_diffusers.integrations.pipelines import METHODS, install, models_of
from tests import reference, tiny

XL = ("unet", "text_encoder", "text_encoder_2")
INPUTS = {"prompt": tiny.PROMPT, "num_inference_steps": 2, "height": tiny.SIZE, "width": tiny.SIZE}


@pytest.fixture
def like() -> StableDiffusionXLPipeline:
    return tiny.sdxl_pipeline()


@pytest.fixture
def empty() -> ModularPipeline:
    """No model is loaded yet."""
    pipe = StableDiffusionXLAutoBlocks().get_workflow("text2image").init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def modular(empty: ModularPipeline, like: StableDiffusionXLPipeline) -> ModularPipeline:
    return with_parts(empty, like)


def with_parts(pipe: ModularPipeline, like: StableDiffusionXLPipeline, *names: str) -> ModularPipeline:
    parts = {n: part for n, part in like.components.items() if n in pipe.component_names and part is not None}
    pipe.update_components(**{name: part for name, part in parts.items() if not names or name in names})
    return pipe


def picture(pipe: ModularPipeline, **inputs: object) -> Tensor:
    seeded = torch.Generator().manual_seed(5)
    return pipe(**INPUTS, **inputs, generator=seeded, output="latents").clone()


def adapters_for(like: StableDiffusionXLPipeline) -> dict[str, object]:
    return {name: tiny.adapter_for(like, seed, components=XL) for seed, name in enumerate("ab")}


def test_a_life_of_two_adapters(modular: ModularPipeline, like: StableDiffusionXLPipeline, tmp_path: Path) -> None:
    base, plain = tiny.snapshot(like), picture(modular)
    adapters = adapters_for(like)
    file = save_adapter(adapters["a"], tmp_path / "a.safetensors")
    modular.load_shira(file, "a")
    tiny.assert_same_bits(like, reference.apply(base, adapters, {"a": 1.0}))
    assert not torch.equal(picture(modular), plain)
    assert like.get_active_shira() == {"a": 1.0}  # a plain pipeline with the same models
    modular.load_shira(adapters["b"], "b", activate=False)
    mix = {"a": 0.3, "b": {"unet": {"down": {"block_1": [0.5]}}}}
    modular.set_shira(mix)
    tiny.assert_same_bits(like, reference.apply(base, adapters, mix))
    mixed = picture(modular)
    with modular.shira("b", 0.8) as inside:
        assert inside is modular
        tiny.assert_same_bits(like, reference.apply(base, adapters, {"b": 0.8}))
    assert torch.equal(picture(modular), mixed)
    assert modular.fuse_report().keys() == {("a", "b")}
    assert modular.fuse_report(**INPUTS)["a", "b"]["opposing"] > 0
    assert torch.equal(picture(modular), mixed)
    assert {name: sorted(parts) for name, parts in modular.list_shira().items()} == dict.fromkeys("ab", sorted(XL))
    modular.load_shira(modular.save_shira(tmp_path / "mix"), "c")
    tiny.assert_same_bits(like, reference.apply(base, adapters, mix))
    modular.disable_shira()
    assert torch.equal(picture(modular), plain)
    modular.enable_shira()
    modular.delete_shira(["b", "c"])
    modular.unload_shira()
    tiny.assert_same_bits(like, base)
    with AdapterLibrary(tmp_path, device="cpu") as library, library.use(modular, {"a": 0.5}):
        tiny.assert_same_bits(like, reference.apply(base, adapters, {"a": 0.5}))
    tiny.assert_same_bits(like, base)
    modular.load_shira(file, "again")
    modular.bake_shira()
    tiny.assert_same_bits(like, reference.apply(base, adapters, {"a": 1.0}))


def test_models_that_are_loaded_late(empty: ModularPipeline, like: StableDiffusionXLPipeline) -> None:
    base, adapters = tiny.snapshot(like), adapters_for(like)
    assert models_of(empty) == {}
    assert empty.list_shira() == {}
    message = r"for text_encoder, text_encoder_2, unet, not loaded yet by this pipeline; call load_components\(\)"
    with pytest.raises(AdapterMismatchError, match=message):
        empty.load_shira(adapters["a"], "a")
    with_parts(empty, like, "unet")
    with pytest.raises(AdapterMismatchError, match=r"for text_encoder, text_encoder_2, not loaded yet"):
        empty.load_shira(adapters["a"], "a")
    assert empty.list_shira() == {}
    with pytest.raises(AdapterMismatchError, match="for text_encoder_2, not loaded yet"):
        empty.load_shira(tiny.adapter_for(like.text_encoder_2), "a", component="text_encoder_2")
    empty.load_shira(adapters["b"].part("unet").prefixed("unet"), "b")
    with_parts(empty, like)
    empty.load_shira(adapters["a"], "a", activate=False)
    empty.set_shira({"a": 0.5, "b": {"unet": 0.3}})
    b = adapters["b"].part("unet").prefixed("unet")
    expected = reference.apply(base, {"a": adapters["a"], "b": b}, {"a": 0.5, "b": 0.3})
    tiny.assert_same_bits(like, expected)
    assert picture(empty).isfinite().all()
    empty.unload_shira()
    tiny.assert_same_bits(like, base)


def test_models_that_blocks_make_themselves() -> None:
    """They are in no config."""

    class Made(ModularPipelineBlocks):
        @property
        def expected_components(self) -> list[ComponentSpec]:
            kind = type(tiny.autoencoder())
            config = tiny.autoencoder().config
            return [ComponentSpec("vae", kind, config=config, default_creation_method="from_config")]

    assert list(models_of(Made().init_pipeline())) == ["vae"]


def test_two_pipelines_of_one_manager(like: StableDiffusionXLPipeline) -> None:
    manager, blocks = ComponentsManager(), StableDiffusionXLAutoBlocks().get_workflow("text2image")
    first = with_parts(blocks.init_pipeline(components_manager=manager), like)
    second = blocks.init_pipeline(components_manager=manager)
    second.update_components(**manager.get_components_by_names(list(first.component_names)))
    first.load_shira(adapters_for(like)["a"], "a")
    assert second.get_active_shira() == {"a": 1.0}


def test_a_scale_for_loras_is_told(modular: ModularPipeline, like: StableDiffusionXLPipeline) -> None:
    modular.load_shira(adapters_for(like)["a"], "a")
    with pytest.warns(UserWarning, match=r"cross_attention_kwargs=\{'scale': 0.5\} is for LoRAs"):
        picture(modular, cross_attention_kwargs={"scale": 0.5})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is for LoRAs")
        picture(modular, cross_attention_kwargs={"scale": 0.5})


# -------------------------------------------------------------------- locks


def assert_a_switch_waits(pipe: ModularPipeline, run: Callable[[], object]) -> None:
    """A switch that another thread begins at the UNet's first forward waits until ``run`` has ended."""
    switching = threading.Thread(target=pipe.disable_shira)
    waited: list[bool] = []

    def switch_meanwhile(*_: object) -> None:
        if not waited:
            switching.start()
            switching.join(0.2)
            waited.append(switching.is_alive())

    hook = pipe.unet.register_forward_hook(switch_meanwhile)
    run()
    hook.remove()
    switching.join()
    assert waited == [True]
    assert pipe.get_active_shira() == {}


def test_no_switch_tears_a_generation(modular: ModularPipeline, like: StableDiffusionXLPipeline) -> None:
    modular.load_shira(adapters_for(like)["a"], "a")
    expected, got = picture(modular), []
    assert_a_switch_waits(modular, lambda: got.append(picture(modular)))
    assert torch.equal(got[0], expected)


@pytest.mark.parametrize("by_name", [False, True])
def test_no_switch_tears_a_block_that_is_run_alone(
    modular: ModularPipeline, like: StableDiffusionXLPipeline, by_name: bool
) -> None:
    """Its loop over all steps is one picture."""
    modular.load_shira(adapters_for(like)["a"], "a")
    blocks = modular.blocks
    expected, got = picture(modular), []

    def run() -> None:
        state = PipelineState()
        for param in blocks.inputs:
            state.set(
                param.name, {**INPUTS, "generator": torch.Generator().manual_seed(5)}.get(param.name, param.default)
            )
        with torch.no_grad():
            for name, block in blocks.sub_blocks.items():
                if name == "denoise.denoise" and by_name:
                    _, state = block(components=modular, state=state)
                elif name != "decode":
                    _, state = block(modular, state)
        got.append(state.get("latents"))

    assert_a_switch_waits(modular, run)
    assert torch.equal(got[0], expected)


class Denoise(ModularPipelineBlocks):
    """A user's block, made after the methods were installed."""

    model_name = "tiny"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("unet", type(tiny.unet()))]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        state.set("latents", tiny.run_unet(components.unet) + tiny.run_unet(components.unet, 1))
        return components, state


class Twice(SequentialPipelineBlocks):
    block_classes = (Denoise,)
    block_names = ("denoise",)


@pytest.mark.parametrize("blocks", [Denoise, Twice])
def test_blocks_of_the_users_own(blocks: type[ModularPipelineBlocks]) -> None:
    pipe = blocks().init_pipeline()
    pipe.update_components(unet=tiny.unet())
    plain = pipe(output="latents")
    pipe.load_shira(tiny.adapter_for(pipe.unet), "a", component="unet")
    expected, got = pipe(output="latents"), []
    assert not torch.equal(expected, plain)
    assert_a_switch_waits(pipe, lambda: got.append(pipe(output="latents")))
    pipe.enable_shira()
    assert_a_switch_waits(pipe, lambda: got.append(blocks()(pipe, PipelineState())[1].get("latents")))
    assert all(torch.equal(one, expected) for one in got)


def test_an_offload_that_begins_while_an_adapter_is_active() -> None:
    pipe = Denoise().init_pipeline()
    pipe.update_components(unet=tiny.unet())
    pipe.load_shira(tiny.adapter_for(pipe.unet), "a", component="unet")
    expected = pipe(output="latents")
    for run in (lambda: Denoise()(pipe, PipelineState())[1].get("latents"), lambda: pipe(output="latents")):
        accelerate.cpu_offload(pipe.unet, torch.device("cpu"), state_dict=pipe.unet.state_dict())  # which is the base's
        assert torch.equal(run(), expected)
        accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)


def test_a_block_whose_components_are_no_pipeline() -> None:
    class Parts:
        unet = tiny.unet()

    _, state = Denoise()(Parts(), PipelineState())
    assert state.get("latents").isfinite().all()


def test_installing_twice_changes_nothing() -> None:
    before = [dict(vars(cls)) for cls in (ModularPipeline, ModularPipelineBlocks)]
    install()
    assert [dict(vars(cls)) for cls in (ModularPipeline, ModularPipelineBlocks)] == before
    assert all(getattr(ModularPipeline, method.__name__) is method for method in METHODS)
