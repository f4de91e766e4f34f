"""An adapter per picture of a batch: each is the one drawn alone with its adapter active, and nothing stays changed."""

import threading
from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from peft import LoraConfig
from torch import Tensor, nn

from shira_diffusers import ResidentStateError, ShiraAdapter, ShiraError, SparseDelta, set_shira_attn_processors
from shira_diffusers.integrations.per_picture import adapters_per_picture
from tests import tiny
from tests.integrations.test_pipelines import XL, Made, build, flux, sd3

ALL = ("",)
PROMPTS = ["a red cat", "a dog", "the moon", "a red cat"]
ENTRIES = ["a", None, {"b": 0.5, "c": -0.3}, "a"]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest entry of a latent
Draw = Callable[..., Tensor]


def load(pipe: DiffusionPipeline, components: tuple[str, ...] = ("unet", "text_encoder")) -> DiffusionPipeline:
    """Three adapters for every Linear and Conv2d of some components, none of them active."""
    for seed, name in enumerate("abc"):
        adapter = tiny.adapter_for(pipe, seed + 1, only=ALL, size=0.1, components=components)
        pipe.load_shira(adapter, name, activate=False)
    return pipe


@pytest.fixture
def loaded(pipe: StableDiffusionPipeline) -> DiffusionPipeline:
    return load(pipe)


def noise(count: int) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def draw(pipe: Any, prompts: list[str], latents: Tensor, **options: object) -> Tensor:
    return tiny.picture(pipe, prompt=prompts, latents=latents.to(pipe.unet.dtype), **options)


def per_picture(entries: object, **others: object) -> dict[str, Any]:
    return {"cross_attention_kwargs": {"shira_adapters": entries, **others}}


def assert_each_is_the_one_alone(
    pipe: Any, draw: Draw = draw, *, each: int = 1, dtype: torch.dtype = torch.float32, **options: object
) -> None:
    """Pictures of a batch of four prompts, ``each`` of every prompt, against each prompt by itself."""
    bits, mix, latents = tiny.snapshot(pipe), pipe.get_active_shira(), noise(4 * each)
    key = "joint_attention_kwargs" if hasattr(pipe, "transformer") else "cross_attention_kwargs"
    together = draw(pipe, PROMPTS, latents, **options, **{key: {"shira_adapters": ENTRIES}})
    tiny.assert_same_bits(pipe, bits)
    assert pipe.get_active_shira() == mix
    assert not hooks(pipe)
    others = [draw(pipe, PROMPTS, latents, **options)]  # all with one mix
    for k, (prompt, entry) in enumerate(zip(PROMPTS, ENTRIES, strict=True)):
        own = slice(k * each, (k + 1) * each)
        with pipe.shira(entry or []):
            alone = draw(pipe, [prompt], latents[own], **options)
            others.append(draw(pipe, PROMPTS, latents, **options))
        assert float((together[own] - alone).abs().max() / alone.abs().max()) < TOLERANCE[dtype]
    assert all(float((together - other).abs().max()) > TOLERANCE[dtype] for other in others)


def hooks(pipe: DiffusionPipeline) -> list[object]:
    """Those of ours."""
    modules = [module for model in tiny.modules_of(pipe).values() for module in model.modules()]
    found = [h for module in modules for h in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
    return [hook for hook in found if hook.__module__ == adapters_per_picture.__module__]


# ---------------------------------------------------------------- the picture alone


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("each", [1, 2])
def test_stable_diffusion(loaded: DiffusionPipeline, guidance: float, each: int) -> None:
    loaded.set_shira("c")  # put aside meanwhile
    assert_each_is_the_one_alone(loaded, each=each, guidance_scale=guidance, num_images_per_prompt=each)


def test_every_dtype(dtype: torch.dtype) -> None:
    assert_each_is_the_one_alone(load(tiny.pipeline(dtype)), dtype=dtype)


def test_sdxl_with_negative_prompts() -> None:
    assert_each_is_the_one_alone(load(tiny.sdxl_pipeline(), XL), negative_prompt="ugly")


def test_controlnet() -> None:
    like = tiny.pipeline()
    control = diffusers.ControlNetModel.from_unet(like.unet, conditioning_embedding_out_channels=(8, 16))
    nn.init.normal_(control.controlnet_mid_block.weight)
    pipe = build(diffusers.StableDiffusionControlNetPipeline, like, controlnet=control)
    load(pipe, ("unet", "text_encoder", "controlnet"))

    def controlled(pipe: Any, prompts: list[str], latents: Tensor, **options: object) -> Tensor:
        return draw(pipe, prompts, latents, image=torch.full((1, 3, tiny.SIZE, tiny.SIZE), 0.3), **options)

    assert_each_is_the_one_alone(pipe, controlled)
    assert_each_is_the_one_alone(pipe, controlled, guess_mode=True)


def test_perturbed_guidance_triples_the_batch(pipe: StableDiffusionPipeline) -> None:
    pag = build(diffusers.StableDiffusionPAGPipeline, pipe, pag_applied_layers="mid")
    assert_each_is_the_one_alone(load(pag), pag_scale=2.0)


def test_frames_of_a_video_are_rows_of_one_picture(pipe: StableDiffusionPipeline) -> None:
    motion = diffusers.MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=8,
        motion_mid_block_layers_per_block=1,
    )  # fmt: skip
    video = build(diffusers.AnimateDiffPipeline, pipe, motion_adapter=motion)
    load(video)

    def frames(pipe: Any, prompts: list[str], latents: Tensor, **options: object) -> Tensor:
        latents = torch.stack([latents, latents.flip(-1)], dim=2)  # (n, 4, 8, 8) -> (n, 4, frames, 8, 8)
        size = {"height": tiny.SIZE, "width": tiny.SIZE}
        return pipe(
            prompts, num_frames=2, latents=latents, num_inference_steps=2, output_type="latent", **size, **options
        ).frames.clone()

    video.set_progress_bar_config(disable=True)
    assert_each_is_the_one_alone(video, frames)


@pytest.mark.parametrize("make", [sd3, flux])
def test_transformers_with_their_text_encoders(make: Callable[[], Made]) -> None:
    pipe, components, _ = make()
    pipe.set_progress_bar_config(disable=True)

    def seeded(pipe: Any, prompts: list[str], latents: Tensor, **options: object) -> Tensor:
        seeds = range(4) if len(prompts) == 4 else [PROMPTS.index(prompts[0])]
        generators = [torch.Generator().manual_seed(seed % 3) for seed in seeds]  # the fourth prompt is the first
        size = {"height": tiny.SIZE, "width": tiny.SIZE, "max_sequence_length": 16}
        options |= {"num_inference_steps": 2, "output_type": "latent", "generator": generators}
        return pipe(prompts, **size, **options).images.clone()

    assert_each_is_the_one_alone(load(pipe, components), seeded)


def test_embeddings_are_used_as_they_are() -> None:
    def embedded(pipe: Any, prompts: list[str], latents: Tensor, **options: object) -> Tensor:
        rows = [PROMPTS.index(prompt) for prompt in prompts]
        text = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(1))[rows]
        pooled = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))[rows]
        return pipe(
            prompt_embeds=text, pooled_prompt_embeds=pooled, latents=latents, height=64, width=64,
            num_inference_steps=2, guidance_scale=0.0, output_type="latent", **options,
        ).images.clone()  # fmt: skip

    assert_each_is_the_one_alone(load(tiny.sd3_pipeline(), ("transformer",)), embedded)


def test_modular_pipelines() -> None:
    like = tiny.sdxl_pipeline()
    pipe: ModularPipeline = StableDiffusionXLAutoBlocks().get_workflow("text2image").init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(**{n: part for n, part in like.components.items() if n in pipe.component_names and part})
    load(like, XL)
    options = {"num_inference_steps": 2, "height": tiny.SIZE, "width": tiny.SIZE, "output": "latents"}
    latents = noise(4)
    together = pipe(prompt=PROMPTS, latents=latents, **options, **per_picture(ENTRIES))
    for k, entry in enumerate(ENTRIES):
        with pipe.shira(entry or []):
            alone = pipe(prompt=[PROMPTS[k]], latents=latents[k : k + 1], **options)
        assert float((together[k] - alone[0]).abs().max() / alone.abs().max()) < TOLERANCE[torch.float32]


# ---------------------------------------------------------------- with what diffusers does


def sequentially_offloaded(pipe: StableDiffusionPipeline) -> None:
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))


def with_lora(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "conv1"], init_lora_weights=False))


def with_a_branch_for_all(pipe: StableDiffusionPipeline) -> None:
    set_shira_attn_processors(pipe.unet, tiny.adapter_for(pipe.unet, 7, only=("attn",), size=0.1))


@pytest.mark.parametrize(
    "configure",
    [
        pytest.param(lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()), id="plain processor"),
        pytest.param(lambda pipe: pipe.unet.set_attn_processor(SlicedAttnProcessor(2)), id="sliced"),
        pytest.param(lambda pipe: pipe.fuse_qkv_projections(), id="fused projections"),
        pytest.param(with_a_branch_for_all, id="side branch"),
        pytest.param(with_lora, id="lora"),
        pytest.param(sequentially_offloaded, id="offloaded"),
        pytest.param(lambda pipe: pipe.unet.to(memory_format=torch.channels_last), id="channels last"),
    ],
)
def test_beside_what_diffusers_does(
    loaded: DiffusionPipeline, configure: Callable[[StableDiffusionPipeline], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(loaded)
    if configure is sequentially_offloaded:  # parameters without memory
        monkeypatch.setattr(tiny, "snapshot", lambda pipe: {})
    assert_each_is_the_one_alone(loaded)


def test_without_a_sparse_kernel_the_product_is_dense(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(torch.sparse, "mm", None)
    assert_each_is_the_one_alone(load(tiny.pipeline(dtype)), dtype=dtype)


def test_a_tied_weight_is_changed_in_all_its_layers(loaded: DiffusionPipeline) -> None:
    one, other = (loaded.unet.get_submodule(f"mid_block.resnets.{k}.conv1") for k in range(2))
    loaded.unload_shira()
    other.weight = one.weight
    load(loaded)
    assert_each_is_the_one_alone(loaded)


def test_another_option_for_processors_arrives(loaded: DiffusionPipeline) -> None:
    with_lora(loaded)
    one, other = (draw(loaded, PROMPTS, noise(4), **per_picture([None] * 4, scale=scale)) for scale in (1.0, 0.0))
    assert not torch.equal(one, other)


# ---------------------------------------------------------------- what stays as it was


def test_the_active_mix_is_put_aside(loaded: DiffusionPipeline) -> None:
    base = draw(loaded, PROMPTS, noise(4))
    with loaded.shira({"a": 0.5, "b": 1.0}):
        assert torch.equal(draw(loaded, PROMPTS, noise(4), **per_picture([None] * 4)), base)
        assert loaded.get_active_shira() == {"a": 0.5, "b": 1.0}
    loaded.set_shira("c")
    loaded.disable_shira()
    draw(loaded, PROMPTS, noise(4), **per_picture(ENTRIES))
    loaded.enable_shira()
    assert loaded.get_active_shira() == {"c": 1.0}


def test_an_error_while_drawing_leaves_nothing_behind(loaded: DiffusionPipeline) -> None:
    loaded.set_shira("c")
    before, bits = draw(loaded, PROMPTS, noise(4)), tiny.snapshot(loaded)

    def fail(*_: object) -> dict[str, Any]:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        draw(loaded, PROMPTS, noise(4), on_step=fail, **per_picture(ENTRIES))
    tiny.assert_same_bits(loaded, bits)
    assert not hooks(loaded)
    assert torch.equal(draw(loaded, PROMPTS, noise(4)), before)


def test_others_who_draw_wait(loaded: DiffusionPipeline) -> None:
    before, seen = draw(loaded, PROMPTS, noise(4)), list[Tensor]()
    other = threading.Thread(target=lambda: seen.append(draw(loaded, PROMPTS, noise(4))))

    def begin(pipe: object, step: int, time: object, kept: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            other.start()
            other.join(0.2)
        return kept

    draw(loaded, PROMPTS, noise(4), on_step=begin, **per_picture(ENTRIES))
    other.join()
    assert torch.equal(seen[0], before)


# ---------------------------------------------------------------- what is refused


def of_norms(pipe: DiffusionPipeline) -> ShiraAdapter:
    delta = SparseDelta(torch.tensor([0]), torch.tensor([1.0]), (32,))
    return ShiraAdapter({"unet.conv_norm_out.weight": delta, "unet.conv_in.bias": delta})


def of_tokens(pipe: DiffusionPipeline) -> ShiraAdapter:
    name = "text_encoder.embeddings.token_embedding.weight"
    shape = tuple(dict(tiny.modules_of(pipe)["text_encoder"].named_parameters())[name.partition(".")[2]].shape)
    return ShiraAdapter({name: SparseDelta(torch.tensor([0]), torch.tensor([1.0]), shape)})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        pytest.param(["a"], "one entry .* for each of 4 prompts, got 1 entry; .* repeat it", id="too few"),
        pytest.param(["a"] * 8, "for each of 4 prompts, got 8 entries", id="too many"),
        pytest.param("a", "expected a list .*, got 'a'", id="no list"),
        pytest.param({"a": 1.0}, "expected a list .*, got {'a': 1.0}", id="a mapping"),
        pytest.param(["a", "x", {"y": 1}, None], "no adapter named 'x', 'y', loaded are 'a', 'b', 'c'", id="unknown"),
        pytest.param(["a", "", None, None], "no adapter named ''", id="empty name"),
        pytest.param(["a", 3, None, None], "expected the name of an adapter or a list of names, got 3", id="a number"),
        pytest.param([{"a": float("nan")}] * 4, "must be a finite number", id="not finite"),
        pytest.param([{"a": {"vae": 1.0}}] * 4, "'vae': no such component", id="no component"),
        pytest.param(
            [None, "norms", None, None],
            r"2 of 2 parameters .*(?s:.*)conv_in\.bias of Conv2d(?s:.*)conv_norm_out\.weight of GroupNorm",
            id="norms and biases",
        ),
        pytest.param(["tokens"] * 4, r"token_embedding\.weight of Embedding", id="embeddings"),
        pytest.param(["vae"] * 4, "'vae' changes vae, .* expected adapters of unet, transformer", id="vae"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_drawn(
    loaded: DiffusionPipeline, entries: object, message: str
) -> None:
    loaded.load_shira(of_norms(loaded), "norms", activate=False)
    loaded.load_shira(of_tokens(loaded), "tokens", activate=False)
    loaded.load_shira(tiny.adapter_for(loaded, components=("vae",)), "vae", activate=False)
    for name in ("norms", "tokens", "vae") if "a', 'b'" in message else ():
        loaded.delete_shira(name)
    loaded.set_shira("c")
    bits = tiny.snapshot(loaded)
    for model in (loaded.unet, loaded.text_encoder):
        model.register_forward_pre_hook(drawn)
    with pytest.raises(ShiraError, match=message):
        draw(loaded, PROMPTS, noise(4), **per_picture(entries))
    tiny.assert_same_bits(loaded, bits)
    assert loaded.get_active_shira() == {"c": 1.0}
    assert not hooks(loaded)


def drawn(*_: object) -> None:
    raise AssertionError("drawn")


def test_a_compiled_model_is_refused(loaded: DiffusionPipeline) -> None:
    loaded.unet.compile(backend="aot_eager")
    with pytest.raises(ResidentStateError, match=r"unet is compiled.*hooks that are added later are not seen"):
        draw(loaded, PROMPTS, noise(4), **per_picture(ENTRIES))


def test_a_batch_that_is_none_of_pictures_is_refused(loaded: DiffusionPipeline) -> None:
    def halve(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        return (args[0][:3], *args[1:]), kwargs

    loaded.unet.register_forward_pre_hook(halve, with_kwargs=True)
    with pytest.raises(
        ShiraError, match=r"UNet2DConditionModel is given a batch of 3, expected 4 prompts or a multiple of 4"
    ):
        draw(loaded, PROMPTS, noise(4), **per_picture(ENTRIES))


def test_a_call_without_prompts_is_refused(loaded: DiffusionPipeline) -> None:
    with pytest.raises(ShiraError, match="give prompt or prompt_embeds"):
        loaded(**per_picture(["a"]))
