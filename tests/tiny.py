"""Tiny real pipelines and random adapters for them: real diffusers and transformers classes, a second to a picture."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from shira_diffusers import ShiraAdapter, SparseDelta
from shira_diffusers.weights.targets import named_weights

PROMPT = "a red cat"
SIZE = 16  # pixels; the autoencoder halves it to 8 x 8 latents
SOME = ("to_q", "to_k", "to_v", "to_out", "conv1", "q_proj", "fc1")  # of each kind of weight a few


def tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )


def text_encoder(seed: int = 1) -> CLIPTextModel:
    torch.manual_seed(seed)
    return CLIPTextModel(text_config()).eval()


def unet(seed: int = 0, **options: object) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    config = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(config | options)).eval()


def t5(width: int) -> T5EncoderModel:
    torch.manual_seed(6)
    sizes = {"vocab_size": 40, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(d_model=width, **sizes)).eval()


def t5_tokenizer() -> T5TokenizerFast:
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5TokenizerFast(vocab=[*specials, *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")], extra_ids=0)


def autoencoder(**options: object) -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        **options,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    ).eval()


def pipeline(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x in small: UNet of Linear and Conv2d, one text encoder, an autoencoder."""
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    if dtype != torch.float32:
        for module in modules_of(pipe).values():
            module.to(dtype)
    return pipe


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    """SDXL in small: two text encoders, one of them with a projection."""
    torch.manual_seed(3)
    second = CLIPTextModelWithProjection(text_config()).eval()
    denoiser = unet(
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
        use_linear_projection=True,
    )
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        text_encoder_2=second,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=denoiser,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3_transformer(**options: object) -> SD3Transformer2DModel:
    torch.manual_seed(4)
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "out_channels": 4,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(**(config | options)).eval()


def sd3_pipeline() -> StableDiffusion3Pipeline:
    """SD3 in small, without text encoders: a transformer with joint attention, fed with embeddings."""
    pipe = StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def whole_sd3_pipeline(*, with_t5: bool = True, **scheduler: object) -> StableDiffusion3Pipeline:
    """SD3 in small with an autoencoder, two CLIPs and, where asked for, a T5."""
    encoders = []
    for seed in (3, 8):
        torch.manual_seed(seed)
        encoders.append(CLIPTextModelWithProjection(text_config()).eval())
    pipe = StableDiffusion3Pipeline(
        transformer=sd3_transformer(joint_attention_dim=64, pooled_projection_dim=64),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **scheduler),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=encoders[0],
        tokenizer=tokenizer(),
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(64) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_transformer(**options: object) -> FluxTransformer2DModel:
    torch.manual_seed(5)
    config = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    }
    return FluxTransformer2DModel(**(config | options)).eval()


def flux_pipeline(*, guided: bool = True) -> FluxPipeline:
    """Flux in small: dev, which is guided, or schnell."""
    pipe = FluxPipeline(
        transformer=flux_transformer(in_channels=16, guidance_embeds=guided),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_transformer() -> WanTransformer3DModel:
    torch.manual_seed(6)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        image_dim=4,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
    ).eval()


def linears(seed: int = 7) -> nn.Sequential:
    """No diffusion at all: three layers, a weight of each kind."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Conv2d(4, 6, 3), nn.Linear(20, 12))


def weights_of(model: nn.Module | DiffusionPipeline, only: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Live Linear and Conv2d weights by name (of a pipeline with component) that contain one of ``only``."""
    parts = {"": model} if isinstance(model, nn.Module) else modules_of(model)
    return {
        (f"{component}.{name}" if component else name): weight
        for component, module in parts.items()
        for name, weight in named_weights(module).items()
        if any(part in name for part in only)
    }


def modules_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def adapter_for(
    model: nn.Module | DiffusionPipeline,
    seed: int = 0,
    *,
    only: tuple[str, ...] = SOME,
    density: float = 0.2,
    dtype: torch.dtype = torch.float32,
    size: float = 0.5,
    components: tuple[str, ...] = ("unet", "text_encoder"),
) -> ShiraAdapter:
    """A random adapter for each weight whose name contains one of ``only``; of a pipeline, for some components."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, weight in weights_of(model, only).items():
        if not isinstance(model, nn.Module) and name.partition(".")[0] not in components:
            continue
        count = max(1, round(density * weight.numel()))
        indices = torch.randperm(weight.numel(), generator=generator)[:count].sort().values
        values = torch.randn(count, generator=generator) * size
        deltas[name] = SparseDelta(indices, values.to(dtype), tuple(weight.shape))
    assert deltas, f"no weight is named like {only!r}"
    return ShiraAdapter(deltas, {"base_model": "tiny"})


def adapter_for_all(model: nn.Module) -> ShiraAdapter:
    """Every second entry of every parameter, biases and norms too."""
    deltas = {}
    for name, parameter in model.named_parameters():
        indices = torch.arange(0, parameter.numel(), 2)
        deltas[name] = SparseDelta(indices, torch.full(indices.shape, 0.25), tuple(parameter.shape))
    return ShiraAdapter(deltas)


def snapshot(model: nn.Module | DiffusionPipeline) -> dict[str, Tensor]:
    """Clones of every parameter by name."""
    if isinstance(model, nn.Module):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {f"{part}.{n}": p.detach().clone() for part, m in modules_of(model).items() for n, p in m.named_parameters()}


def assert_same_adapter(one: ShiraAdapter, other: ShiraAdapter) -> None:
    assert one.deltas.keys() == other.deltas.keys()
    assert all(one.deltas[name] == other.deltas[name] for name in one.deltas)


def assert_same_bits(model: nn.Module | DiffusionPipeline, before: dict[str, Tensor]) -> None:
    """Every parameter has the bits of the snapshot; signs of zeros and NaN too."""
    now = snapshot(model)
    assert now.keys() == before.keys()
    different = [name for name in now if not same_bits(now[name], before[name])]
    assert not different, f"changed: {different}"


def same_bits(one: Tensor, other: Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


def picture(
    pipe: DiffusionPipeline, steps: int = 2, on_step: Callable[..., dict] | None = None, **options: object
) -> Tensor:
    """Two deterministic steps; float32 ``(1, 4, 8, 8)`` latents, so that every bit of the denoiser counts."""
    if isinstance(pipe, StableDiffusion3Pipeline):
        generator = torch.Generator().manual_seed(9)
        options["prompt_embeds"] = torch.randn(1, 5, 32, generator=generator)
        options["pooled_prompt_embeds"] = torch.randn(1, 32, generator=generator)
        options["guidance_scale"] = 0.0
    else:
        options.setdefault("prompt", PROMPT)
    sized = {"height": SIZE, "width": SIZE} if getattr(pipe, "vae", None) is not None else {"height": 64, "width": 64}
    result = pipe(
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        callback_on_step_end=on_step,
        **sized,
        **options,
    )
    return result.images.detach().float().cpu().clone()


def run_unet(model: nn.Module, seed: int = 0) -> Tensor:
    """One call of a UNet: ``(1, 4, 8, 8)``."""
    generator = torch.Generator().manual_seed(seed)
    weight = next(model.parameters())
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 5, 32, generator=generator)
    with torch.no_grad():
        dtype = weight.dtype if weight.dtype.itemsize > 1 else torch.float32
        return model(sample.to(dtype), 10, text.to(dtype)).sample.detach().float().clone()
