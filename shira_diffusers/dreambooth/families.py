"""The model families that can be trained: one record each, found by the class of the pipeline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shira_diffusers.errors import ShiraError

# a DiffusionPipeline: diffusers' classes are typed in part only
Pipe = Any

Conditions = dict[str, Tensor]
"""What a denoiser is given for ``n`` prompts, by name; the first dimension of each tensor is ``n``."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the trainer must know of a model family.

    Args:
        denoiser: the component that predicts.
        flow: it is trained by flow matching; otherwise by diffusion.
        patch: latents' sides must be multiples of this.
        text_encoders: the components that ``train_text_encoder`` adapts beside the denoiser.
        frozen_encoders: those that a base must have as well; a T5 is never adapted.
        optional: components that a base may lack.
        unread: component -> pattern of the weights of its last layer, ``{last}``, that nothing reads, so that they
            cannot learn.
        embed: ``(pipe, prompts, max_sequence_length) -> conditions``, as the pipeline itself encodes prompts.
        denoise: ``(pipe, noisy latents (n, c, h, w), timesteps (n,), conditions, time ids (n, 6), guidance scale)
            -> prediction (n, c, h, w)``.
        defaults: of the settings that are not given; those of diffusers' script for this family.
        idle: the settings that have no effect on this family.
    """

    denoiser: str = "unet"
    flow: bool = False
    patch: int = 1
    text_encoders: tuple[str, ...]
    frozen_encoders: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    embed: Callable[[Pipe, Sequence[str], int | None], Conditions]
    denoise: Callable[[Pipe, Tensor, Tensor, Conditions, Tensor, float], Tensor]
    defaults: Mapping[str, Any]
    idle: tuple[str, ...]

    @property
    def needed(self) -> tuple[str, ...]:
        """The components that a base must have."""
        encoders = (*self.text_encoders, *self.frozen_encoders)
        tokenizers = (name.replace("text_encoder", "tokenizer") for name in encoders)
        return (self.denoiser, "vae", "scheduler", *encoders, *tokenizers)


def _embed(pipe: Pipe, prompts: Sequence[str], _: int | None) -> Conditions:
    """``encoder_hidden_states`` ``(n, tokens, width)``."""
    encoded = pipe.encode_prompt(list(prompts), pipe.unet.device, 1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": encoded[0]}


def _denoise(pipe: Pipe, noisy: Tensor, timesteps: Tensor, given: Conditions, _: Tensor, __: float) -> Tensor:
    return pipe.unet(noisy, timesteps, **given, return_dict=False)[0]


def _embed_xl(pipe: Pipe, prompts: Sequence[str], _: int | None) -> Conditions:
    """``encoder_hidden_states`` ``(n, tokens, width)`` of both encoders, ``text_embeds`` ``(n, width)`` of one."""
    hidden, _, pooled, _ = pipe.encode_prompt(
        list(prompts), device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": hidden, "text_embeds": pooled}


def _denoise_xl(pipe: Pipe, noisy: Tensor, timesteps: Tensor, given: Conditions, time_ids: Tensor, _: float) -> Tensor:
    pooled = given["text_embeds"]
    return pipe.unet(
        noisy,
        timesteps,
        encoder_hidden_states=given["encoder_hidden_states"],
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids.to(pooled)},
        return_dict=False,
    )[0]


def _embed_3(pipe: Pipe, prompts: Sequence[str], tokens: int | None) -> Conditions:
    """``encoder_hidden_states`` ``(n, tokens, width)`` of both CLIPs, then T5; ``pooled_projections`` of both CLIPs."""
    hidden, _, pooled, _ = pipe.encode_prompt(
        list(prompts), None, None, pipe.transformer.device, do_classifier_free_guidance=False,
        max_sequence_length=tokens,
    )  # fmt: skip
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def _denoise_3(pipe: Pipe, noisy: Tensor, timesteps: Tensor, given: Conditions, _: Tensor, __: float) -> Tensor:
    model = pipe.transformer
    given = _cast(given, model.dtype)
    return model(noisy.to(model.dtype), timestep=timesteps, **given, return_dict=False)[0]


def _embed_flux(pipe: Pipe, prompts: Sequence[str], tokens: int | None) -> Conditions:
    """``encoder_hidden_states`` ``(n, tokens, width)`` of T5, ``pooled_projections`` ``(n, width)`` of CLIP."""
    hidden, pooled, _ = pipe.encode_prompt(list(prompts), None, pipe.transformer.device, max_sequence_length=tokens)
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def _denoise_flux(
    pipe: Pipe, noisy: Tensor, timesteps: Tensor, given: Conditions, _: Tensor, guidance_scale: float
) -> Tensor:
    model, (count, channels, height, width) = pipe.transformer, noisy.shape
    given = _cast(given, model.dtype)
    # (n, c, h, w) -> (n, h/2 * w/2, 4c)
    packed = pipe._pack_latents(noisy.to(model.dtype), count, channels, height, width)
    guidance = torch.full((count,), guidance_scale, device=noisy.device) if model.config.guidance_embeds else None
    predicted = model(
        packed,
        timestep=timesteps / 1000,  # which the model multiplies by 1000
        guidance=guidance,
        **given,
        txt_ids=noisy.new_zeros(given["encoder_hidden_states"].shape[1], 3),
        img_ids=pipe._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype),
        return_dict=False,
    )[0]
    return unpack(pipe, predicted, height * pipe.vae_scale_factor, width * pipe.vae_scale_factor)


def unpack(pipe: Pipe, latents: Tensor, height: int, width: int) -> Tensor:
    """Make latents ``(n, c, h, w)`` of Flux's, ``(n, h/2 * w/2, 4c)``; others stay as they are.

    Args:
        height, width: of the picture, in pixels.
    """
    if latents.ndim == 4:
        return latents
    return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)


def _cast(given: Conditions, dtype: torch.dtype) -> Conditions:
    return {name: tensor.to(dtype) for name, tensor in given.items()}


_OF_FLOW = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs")
_OF_DIFFUSION = ("snr_gamma", "validation_scheduler")
_LARGE_DEFAULTS = {
    "learning_rate": 1e-4,
    "text_encoder_lr": 5e-6,
    "adam_weight_decay": 1e-4,
    "adam_weight_decay_text_encoder": 1e-3,
}
_FLOW_DEFAULTS = {
    "mask_type": "wm",  # gradients of all weights, in float32, beside such a model would not fit
    "resolution": 512,
    **_LARGE_DEFAULTS,
}

FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": Family(  # 1.x and 2.x
        text_encoders=("text_encoder",),
        embed=_embed,
        denoise=_denoise,
        defaults={"mask_type": "grad_mean", "resolution": 512, "learning_rate": 5e-4, "adam_weight_decay": 1e-2},
        idle=(*_OF_FLOW, "max_sequence_length", "guidance_scale"),
    ),
    "StableDiffusionXLPipeline": Family(
        text_encoders=("text_encoder", "text_encoder_2"),
        # the UNet reads the layer before it; of the second the last is pooled
        unread={"text_encoder": r".*layers\.{last}\..*"},
        embed=_embed_xl,
        denoise=_denoise_xl,
        defaults={"mask_type": "grad_mean", "resolution": 1024, **_LARGE_DEFAULTS},
        idle=(*_OF_FLOW, "max_sequence_length", "guidance_scale"),
    ),
    "StableDiffusion3Pipeline": Family(  # 3 and 3.5; without T5 its tokens are zeros
        denoiser="transformer",
        flow=True,
        patch=2,
        text_encoders=("text_encoder", "text_encoder_2"),
        optional=("text_encoder_3", "tokenizer_3"),
        # the last block's text is dropped, so nothing reads what it asks for
        unread={"transformer": r"transformer_blocks\.{last}\.attn\.add_q_proj\..*"},
        embed=_embed_3,
        denoise=_denoise_3,
        defaults=_FLOW_DEFAULTS
        | {"weighting_scheme": "logit_normal", "precondition_outputs": True, "max_sequence_length": 77},
        idle=(*_OF_DIFFUSION, "guidance_scale"),
    ),
    "FluxPipeline": Family(  # dev and schnell
        denoiser="transformer",
        flow=True,
        patch=2,
        text_encoders=("text_encoder",),
        frozen_encoders=("text_encoder_2",),
        embed=_embed_flux,
        denoise=_denoise_flux,
        defaults=_FLOW_DEFAULTS
        | {"weighting_scheme": "none", "precondition_outputs": False, "max_sequence_length": 512},
        idle=_OF_DIFFUSION,
    ),
}


def find_family(kind: str, base: str) -> Family:
    """Find the family of a pipeline class.

    Raises:
        ShiraError: it is not one that can be trained; ``base`` is named.
    """
    if kind not in FAMILIES:
        raise ShiraError(
            f"{base!r} is a {kind}, expected a {' or a '.join(FAMILIES)} "
            "(Stable Diffusion 1.x, 2.x, XL, 3.x or Flux.1, text to image)"
        )
    return FAMILIES[kind]


def family_of(pipe: Pipe) -> Family:
    """Return the family of a loaded base."""
    return find_family(type(pipe).__name__, str(pipe.config.get("_name_or_path")))


def denoiser_of(pipe: Pipe) -> Any:
    """Return the component of a base that predicts: its UNet or transformer."""
    return getattr(pipe, family_of(pipe).denoiser)


def text_encoders_of(pipe: Pipe) -> list[nn.Module]:
    """Return all text encoders of a base, those that are never trained too."""
    parts = pipe.components.items()
    return [part for name, part in parts if name.startswith("text_encoder") and part is not None]


def embed(pipe: Pipe, prompts: Sequence[str], max_sequence_length: int | None = None) -> Conditions:
    """Encode prompts for the denoiser as the pipeline itself does.

    Args:
        max_sequence_length: tokens of a T5; families without one need none.
    """
    return family_of(pipe).embed(pipe, prompts, max_sequence_length)
