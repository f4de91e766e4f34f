"""The model families that can be trained: one record each, found by the class of the pipeline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from shira_diffusers.errors import ShiraError

# a DiffusionPipeline: diffusers' classes are typed in part only
Pipe = Any

Conditions = dict[str, Tensor]
"""What a denoiser is given for ``n`` prompts, by name; the first dimension of each tensor is ``n``."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the trainer must know of a model family.

    Args:
        text_encoders: the components that ``train_text_encoder`` adapts beside the UNet.
        last_layer_unread: those of which nothing reads the last layer, which therefore cannot learn.
        embed: ``(pipe, prompts) -> conditions``, as the pipeline itself encodes prompts.
        denoise: ``(pipe, noisy latents (n, c, h, w), timesteps (n,), conditions, time ids (n, 6)) -> prediction``.
        defaults: of the settings that are not given; those of diffusers' script for this family.
    """

    text_encoders: tuple[str, ...]
    last_layer_unread: tuple[str, ...] = ()
    embed: Callable[[Pipe, Sequence[str]], Conditions]
    denoise: Callable[[Pipe, Tensor, Tensor, Conditions, Tensor], Tensor]
    defaults: Mapping[str, Any]

    @property
    def needed(self) -> tuple[str, ...]:
        """The components that a base must have."""
        tokenizers = (name.replace("text_encoder", "tokenizer") for name in self.text_encoders)
        return ("unet", "vae", "scheduler", *self.text_encoders, *tokenizers)


def _embed(pipe: Pipe, prompts: Sequence[str]) -> Conditions:
    """``encoder_hidden_states`` ``(n, tokens, width)``."""
    encoded = pipe.encode_prompt(list(prompts), pipe.unet.device, 1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": encoded[0]}


def _denoise(pipe: Pipe, noisy: Tensor, timesteps: Tensor, given: Conditions, _: Tensor) -> Tensor:
    predicted: Tensor = pipe.unet(noisy, timesteps, **given, return_dict=False)[0]
    return predicted


def _embed_xl(pipe: Pipe, prompts: Sequence[str]) -> Conditions:
    """``encoder_hidden_states`` ``(n, tokens, width)`` of both encoders, ``text_embeds`` ``(n, width)`` of one."""
    hidden, _, pooled, _ = pipe.encode_prompt(
        list(prompts), device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": hidden, "text_embeds": pooled}


def _denoise_xl(pipe: Pipe, noisy: Tensor, timesteps: Tensor, given: Conditions, time_ids: Tensor) -> Tensor:
    pooled = given["text_embeds"]
    predicted: Tensor = pipe.unet(
        noisy,
        timesteps,
        encoder_hidden_states=given["encoder_hidden_states"],
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids.to(pooled)},
        return_dict=False,
    )[0]
    return predicted


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "StableDiffusionPipeline": Family(  # 1.x and 2.x
            text_encoders=("text_encoder",),
            embed=_embed,
            denoise=_denoise,
            defaults=MappingProxyType({"resolution": 512, "learning_rate": 5e-4, "adam_weight_decay": 1e-2}),
        ),
        "StableDiffusionXLPipeline": Family(
            text_encoders=("text_encoder", "text_encoder_2"),
            last_layer_unread=("text_encoder",),  # the UNet reads the layer before it; of the second the last is pooled
            embed=_embed_xl,
            denoise=_denoise_xl,
            defaults=MappingProxyType(
                {
                    "resolution": 1024,
                    "learning_rate": 1e-4,
                    "text_encoder_lr": 5e-6,
                    "adam_weight_decay": 1e-4,
                    "adam_weight_decay_text_encoder": 1e-3,
                }
            ),
        ),
    }
)


def find_family(kind: str, base: str) -> Family:
    """Find the family of a pipeline class.

    Raises:
        ShiraError: it is not one that can be trained; ``base`` is named.
    """
    if kind not in FAMILIES:
        raise ShiraError(
            f"{base!r} is a {kind}, expected a {' or a '.join(FAMILIES)} "
            "(Stable Diffusion 1.x, 2.x or XL, text to image)"
        )
    return FAMILIES[kind]


def family_of(pipe: Pipe) -> Family:
    """Return the family of a loaded base."""
    return find_family(type(pipe).__name__, str(pipe.config.get("_name_or_path")))


def embed(pipe: Pipe, prompts: Sequence[str]) -> Conditions:
    """Encode prompts for the denoiser as the pipeline itself does."""
    return family_of(pipe).embed(pipe, prompts)
