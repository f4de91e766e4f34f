"""The methods on pipelines other than Stable Diffusion's plain ones, each with one short call of the pipeline."""

import copy
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from shira_diffusers.formats.shira_file import encode
from tests import reference, tiny

Made = tuple[DiffusionPipeline, tuple[str, ...], Callable[[Any], Tensor]]
SHORT = {"prompt": tiny.PROMPT, "num_inference_steps": 2, "output_type": "latent"}
SIZED = {"height": tiny.SIZE, "width": tiny.SIZE}
PICTURE = torch.full((1, 3, tiny.SIZE, tiny.SIZE), 0.3)
XL = ("unet", "text_encoder", "text_encoder_2")


def build(cls: type[DiffusionPipeline], like: DiffusionPipeline, **parts: object) -> DiffusionPipeline:
    """A pipeline of another class, with the parts of one that it takes and others."""
    takes = signature(cls.__init__).parameters
    shared = {name: part for name, part in like.components.items() if name in takes}
    if "requires_safety_checker" in takes:
        parts["requires_safety_checker"] = False
    return cls(**(shared | parts))


def pictures(**options: object) -> Callable[[Any], Tensor]:
    def run(pipe: Any) -> Tensor:
        return pipe(generator=torch.Generator().manual_seed(5), **(SHORT | options)).images.clone()

    return run


def refiner() -> Made:
    unet = tiny.unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=5 * 8 + 32
    )
    parts = {"unet": unet, "text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    pipe = build(diffusers.StableDiffusionXLImg2ImgPipeline, tiny.sdxl_pipeline(), add_watermarker=False, **parts)
    return pipe, ("unet", "text_encoder_2"), pictures(image=PICTURE, strength=1.0)


def inpainting() -> Made:
    pipe = build(diffusers.StableDiffusionXLInpaintPipeline, tiny.sdxl_pipeline(), add_watermarker=False)
    return pipe, XL, pictures(image=PICTURE, mask_image=torch.ones(1, 1, tiny.SIZE, tiny.SIZE), strength=1.0, **SIZED)


def t2i_adapter() -> Made:
    torch.manual_seed(0)
    adapter = diffusers.T2IAdapter(3, [32, 64], 1, downscale_factor=2)
    unet = tiny.unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
    pipe = build(diffusers.StableDiffusionAdapterPipeline, tiny.pipeline(), adapter=adapter, unet=unet)
    return pipe, ("unet", "text_encoder", "adapter"), pictures(image=PICTURE, **SIZED)


def controlnet() -> Made:
    like = tiny.sdxl_pipeline()
    control = diffusers.ControlNetModel.from_unet(like.unet, conditioning_embedding_out_channels=(8, 16))
    parts = {"controlnet": control, "add_watermarker": False}
    pipe = build(diffusers.StableDiffusionXLControlNetPipeline, like, **parts)
    return pipe, (*XL, "controlnet"), pictures(image=PICTURE, **SIZED)


def edited() -> Made:
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2)
    pipe = build(diffusers.LEditsPPPipelineStableDiffusion, tiny.pipeline(), scheduler=scheduler)

    def run(pipe: Any) -> Tensor:
        seeded = torch.Generator().manual_seed(5)
        pipe.invert(image=Image.new("RGB", (32, 32), "red"), num_inversion_steps=4, skip=0.1, generator=seeded)
        masks = {"use_cross_attn_mask": False, "use_intersect_mask": False}
        return pipe(editing_prompt=["a dog"], generator=seeded, output_type="latent", **masks).images.clone()

    return pipe, ("unet", "text_encoder"), run


def t5() -> T5EncoderModel:
    torch.manual_seed(1)
    sizes = {"vocab_size": 54, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(**sizes)).eval()


def clip() -> CLIPTextModelWithProjection:
    torch.manual_seed(3)
    return CLIPTextModelWithProjection(tiny.text_config()).eval()


def autoencoder(**sizes: object) -> diffusers.AutoencoderKL:
    torch.manual_seed(2)
    return diffusers.AutoencoderKL(norm_num_groups=4, shift_factor=0.1, scaling_factor=1.0, **sizes).eval()


def sd3() -> Made:
    torch.manual_seed(4)
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "pos_embed_max_size": 8}
    heads = {"attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
    text = {"joint_attention_dim": 32, "pooled_projection_dim": 64}
    transformer = diffusers.SD3Transformer2DModel(**sizes, **heads, **text).eval()
    encoders = {"text_encoder": clip(), "text_encoder_2": clip(), "text_encoder_3": t5()}
    tokenizers = {name: tiny.tokenizer() for name in ("tokenizer", "tokenizer_2", "tokenizer_3")}
    vae = autoencoder(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    )  # fmt: skip
    parts = {"transformer": transformer, "vae": vae, **encoders, **tokenizers}
    pipe = diffusers.StableDiffusion3Pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts)
    return pipe, ("transformer", *encoders), pictures(max_sequence_length=16, **SIZED)


def flux() -> Made:
    encoders = {"text_encoder": tiny.text_encoder(), "text_encoder_2": t5()}
    tokenizers = {"tokenizer": tiny.tokenizer(), "tokenizer_2": tiny.tokenizer()}
    vae = autoencoder(block_out_channels=(8,), latent_channels=1)
    parts = {"transformer": tiny.flux_transformer(), "vae": vae, **encoders, **tokenizers}
    pipe = diffusers.FluxPipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts)
    return pipe, ("transformer", *encoders), pictures(max_sequence_length=16, height=8, width=8)


def cascade() -> Made:
    torch.manual_seed(0)
    layers = {"down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1), "switch_level": (False,)}
    text = {"conditioning_dim": 32, "clip_text_in_channels": 32, "clip_text_pooled_in_channels": 32}
    prior = diffusers.models.StableCascadeUNet(
        block_out_channels=(32, 64), num_attention_heads=(2, 4), clip_image_in_channels=32, **layers, **text
    ).eval()
    parts = {"prior": prior, "text_encoder": clip(), "tokenizer": tiny.tokenizer()}
    pipe = diffusers.StableCascadePriorPipeline(scheduler=diffusers.DDPMWuerstchenScheduler(), **parts)

    def run(pipe: Any) -> Tensor:
        seeded = torch.Generator().manual_seed(5)
        torch.manual_seed(0)  # its scheduler draws from the global generator
        return pipe(tiny.PROMPT, height=64, width=64, num_inference_steps=2, generator=seeded)[0].clone()

    return pipe, ("prior", "text_encoder"), run


PIPELINES = (refiner, inpainting, t2i_adapter, controlnet, edited, sd3, flux, cascade)


@pytest.mark.parametrize("make", PIPELINES)
def test_a_life_of_two_adapters(make: Callable[[], Made], tmp_path: Path) -> None:
    pipe, components, run = make()
    pipe.set_progress_bar_config(disable=True)
    base, plain = tiny.snapshot(pipe), run(pipe)
    adapters = {name: tiny.adapter_for(pipe, i, only=("",), components=components) for i, name in enumerate("ab")}
    mix = {"a": 0.3, "b": 1.0}
    mixed = reference.apply(base, adapters, mix)

    pipe.load_shira(encode(adapters["a"])[0], "a")
    tiny.assert_same_bits(pipe, reference.apply(base, adapters, {"a": 1.0}))
    pipe.load_shira(adapters["b"], "b", activate=False)
    pipe.set_shira(list(mix), list(mix.values()))
    tiny.assert_same_bits(pipe, mixed)
    picture = run(pipe)
    assert picture.isfinite().all()
    assert not torch.equal(picture, plain)
    assert pipe.fuse_report().keys() == {("a", "b")}
    assert {name: sorted(parts) for name, parts in pipe.list_shira().items()} == dict.fromkeys("ab", sorted(components))

    twin = copy.deepcopy(pipe)
    twin.unload_shira()
    tiny.assert_same_bits(twin, base)
    pipe.save_pretrained(tmp_path / "pipe")
    assert_saved_the_base(tmp_path / "pipe" / components[0], components[0], base)
    with pipe.shira("a", 0.8):
        tiny.assert_same_bits(pipe, reference.apply(base, adapters, {"a": 0.8}))
    tiny.assert_same_bits(pipe, mixed)
    assert torch.equal(run(pipe), picture)

    pipe.load_shira(pipe.save_shira(tmp_path, "a"), "again")
    tiny.assert_same_bits(pipe, reference.apply(base, adapters, {"a": 1.0}))
    pipe.disable_shira()
    tiny.assert_same_bits(pipe, base)
    assert torch.equal(run(pipe), plain)
    pipe.enable_shira()
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, base)
    assert pipe.list_shira() == {}


def assert_saved_the_base(folder: Path, component: str, base: dict[str, Tensor]) -> None:
    saved = load_file(next(folder.glob("*.safetensors")))
    weights = {name: weight for name, weight in base.items() if name.startswith(f"{component}.")}
    assert weights
    assert all(torch.equal(weight, saved[name.removeprefix(f"{component}.")]) for name, weight in weights.items())
