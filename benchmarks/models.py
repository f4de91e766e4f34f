"""The UNets, SHiRA adapters and LoRAs that the scripts compare, with random weights, and checks of the weights.

In: a model's name and the options. Out: pipelines, adapters, inputs. What other libraries offer is in ``rivals``.
"""

import argparse
import math
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.measure import dtype_of
from shira_diffusers import ShiraAdapter, SparseDelta, build_masks
from shira_diffusers.integrations.pipelines import resident_of
from shira_diffusers.masks.families import MaskContext
from shira_diffusers.weights.targets import select

RANK = 64
"""Of LoRAs, where nothing else is said."""
LATENTS = {"SD 1.5": 64, "SDXL": 128}

UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "SDXL": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""The architectures of the UNets that people adapt, as ``UNet2DConditionModel`` takes them."""
_TINY = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TOY: dict[str, dict[str, Any]] = {
    "SD 1.5": {**_TINY, "cross_attention_dim": 32, "attention_head_dim": 8},
    "SDXL": {
        **_TINY,
        "cross_attention_dim": 64,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
}


def make_unet(config: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A frozen UNet of random weights, see ``fill``."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**config).to(dtype)
    fill(unet.to_empty(device=device).requires_grad_(False).eval())
    return unet


def make_pipe(
    model: str, args: argparse.Namespace, dtype: torch.dtype | None = None, config: dict[str, Any] | None = None
) -> Any:
    """A pipeline of a UNet and a scheduler only, which is all that loading and switching need."""
    unet = make_unet(config or (TOY if args.toy else UNETS)[model], args.device, dtype or dtype_of(args))
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet, "scheduler": DDIMScheduler()}
    if model == "SDXL":
        return StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights at the speed of a copy: normal values, scaled by the inputs of a layer, repeat every 2^20."""
    device = next(model.parameters()).device
    pool = torch.randn(2**20 + 7, generator=torch.Generator(device).manual_seed(0), device=device)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(float(name.endswith("weight")))  # of norms
            continue
        values = (pool * parameter[0].numel() ** -0.5).to(parameter.dtype)
        for part in parameter.view(-1).split(pool.numel()):
            part.copy_(values[: part.numel()])


def rand(weight: Tensor, count: int, context: MaskContext) -> Tensor:
    """As the family ``rand``, drawn as gaps: sorted at once, about ``count`` entries."""
    uniform = torch.rand(count, generator=context.generator).clamp_min_(1e-9)
    gaps = (uniform.log_() / math.log1p(-count / weight.numel())).long()
    at = gaps.cumsum(0) + torch.arange(count)
    return at[at < weight.numel()].to(weight.device)


def shira_adapter(unet: nn.Module, family: str, density: float, seed: int) -> ShiraAdapter:
    """A float16 adapter of random values for attention and feed-forward."""
    models, weights = {"unet": unet}, select({"unet": unet})
    masks = build_masks(models, rand if family == "rand" else family, density, seed=seed)
    deltas = {}
    for name, mask in masks.items():
        generator = torch.Generator(mask.device).manual_seed(seed)
        values = torch.randn(mask.numel(), generator=generator, device=mask.device) * 0.02
        deltas[name] = SparseDelta(mask, values.half(), tuple(weights[name].shape))
    return ShiraAdapter(deltas)


def add_pair(pipe: Any, density: float) -> None:
    """Adapters ``a`` and ``b`` of random masks, not active."""
    for seed, name in enumerate(("a", "b")):
        resident_of(pipe).add(shira_adapter(pipe.unet, "rand", density, seed), name)


def lora_state(unet: nn.Module, seed: int, rank: int = RANK) -> dict[str, Tensor]:
    """A LoRA of the same weights on the CPU, in their dtype, with diffusers' keys; drawn where the weights are."""
    device = next(unet.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, weight in select(unet).items():
        for matrix, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
            key = f"unet.{name.removesuffix('.weight')}.lora_{matrix}.weight"
            drawn = torch.randn(shape, generator=generator, device=device)
            state[key] = (drawn * 0.02).to(weight.dtype).cpu()
    return state


def latents_of(model: str, args: argparse.Namespace) -> int:
    """Side of the latents that a UNet is called with: those of its pictures, fewer on a CPU."""
    return 8 if args.toy else 16 if args.device == "cpu" else LATENTS[model]


def inputs_of(unet: Any, model: str, latents: int, batch: int = 1) -> dict[str, Any]:
    """What a UNet is called with, of noise: latents ``(batch, 4, latents, latents)``, a timestep, text embeddings."""
    generator = torch.Generator(unet.device).manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=unet.device).to(unet.dtype)

    config = unet.config
    inputs: dict[str, Any] = {
        "sample": noise(batch, 4, latents, latents),
        "timestep": torch.full((batch,), 500, device=unet.device),
        "encoder_hidden_states": noise(batch, 77, config.cross_attention_dim),
    }
    if model == "SDXL":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.full((batch, 6), 8.0 * latents, device=unet.device)
        inputs["added_cond_kwargs"] = {"text_embeds": noise(batch, pooled), "time_ids": sizes}
    return inputs


def copies(unet: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights to compare with: all of them where they take less than 6 GB, else every fourth."""
    weights = select({"unet": unet})
    every = 1 if sum(w.nbytes for w in weights.values()) < 6e9 else 4
    return {name: weight.clone() for name, weight in list(weights.items())[::every]}


def require_base(unet: nn.Module, base: dict[str, Tensor]) -> None:
    """Assert that weights have their bits before."""
    now = select({"unet": unet})
    assert all(torch.equal(now[name], weight) for name, weight in base.items()), "the base is not back"


def require_active(unet: nn.Module, base: dict[str, Tensor], mix: Iterable[tuple[ShiraAdapter, float]]) -> None:
    """Assert that weights are what dense arithmetic gives; see ``same``."""
    now, adapters = select({"unet": unet}), list(mix)
    for name, weight in base.items():
        total = torch.zeros(weight.shape, device=weight.device)
        for adapter, scale in adapters:
            total += scale * adapter.deltas[name].to_dense().to(weight.device)
        expected = (weight.float() + total).to(weight.dtype)
        assert same(now[name], expected), f"{name} is not base + scale * delta"


def same(weight: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit; on CUDA up to the last bit, since kernels there may fuse multiply and add."""
    if weight.is_cuda:
        return torch.allclose(weight, expected, rtol=torch.finfo(weight.dtype).eps, atol=1e-7)
    return torch.equal(weight, expected)
