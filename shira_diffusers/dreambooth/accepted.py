"""Flags of diffusers' DreamBooth scripts that have no meaning here: accepted, with a note of what happens instead.

So that a command line for ``train_dreambooth.py``, ``train_dreambooth_lora.py`` or
``train_dreambooth_lora_sdxl.py`` can be kept as it is.
"""

import argparse
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

logger = logging.getLogger(__name__)

_SWITCH: dict[str, Any] = {"action": "store_true"}
_VALUE: dict[str, Any] = {"type": str}
_VALUES: dict[str, Any] = {"type": str, "nargs": "+"}

_NO_LORA = "there are no low-rank matrices: --density says how many entries of each weight are trained"
_ATTENTION = "attention is PyTorch's scaled_dot_product_attention, which chooses a memory-efficient kernel by itself"
_FRAMING = "the UNet is told where each picture was cropped"

# of --noise_offset, for the switch --offset_noise
OFFSET_NOISE = 0.1

# flag -> (how it is parsed, what happens instead)
_INSTEAD: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "rank": (_VALUE, _NO_LORA),
        "lora_alpha": (_VALUE, _NO_LORA),
        "lora_dropout": (_VALUE, "there are no low-rank matrices to drop: lower --density to regularize more"),
        "output_kohya_format": (_SWITCH, "a SHiRA adapter has a format of its own, docs/format.md"),
        "enable_xformers_memory_efficient_attention": (_SWITCH, _ATTENTION),
        "enable_npu_flash_attention": (_SWITCH, _ATTENTION),
        "local_rank": (_VALUE, "accelerate launch and torchrun tell each process its rank"),
        "tokenizer_name": (_VALUE, "the base's own tokenizers are used"),
        "tokenizer_max_length": (_VALUE, "prompts are padded and cut to the length that the base's tokenizers have"),
        "text_encoder_use_attention_mask": (_SWITCH, "prompts are encoded as the base's pipeline encodes them"),
        "pre_compute_text_embeddings": (
            _SWITCH,
            "prompts are always encoded in advance, but with --train_text_encoder, where they cannot be",
        ),
        "class_labels_conditioning": (_VALUE, "Stable Diffusion's UNets take no class labels"),
        "validation_images": (_VALUES, "validation pictures are made from --validation_prompt alone"),
        "crops_coords_top_left_h": (_VALUE, _FRAMING),
        "crops_coords_top_left_w": (_VALUE, _FRAMING),
        "do_edm_style_training": (
            _SWITCH,
            "the loss is that of the base's own prediction type, epsilon or v_prediction",
        ),
        "set_grads_to_none": (_SWITCH, "gradients are always freed after a step"),
        "skip_save_text_encoder": (_SWITCH, "an adapter's file holds trained entries only, never a text encoder"),
    }
)


def add_accepted(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the flags that have no effect, or another name here; they are not in its ``--help``."""
    for name, (options, _) in _INSTEAD.items():
        parser.add_argument(f"--{name}", **options, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument(  # of diffusers' train_dreambooth.py, which adds a tenth
        "--offset_noise",
        dest="noise_offset",
        action="store_const",
        const=OFFSET_NOISE,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )


def drop_accepted(chosen: dict[str, Any]) -> dict[str, Any]:
    """What was chosen without the flags that have no effect, each of which is told of in a warning."""
    for name in _INSTEAD.keys() & chosen.keys():
        logger.warning("--%s has no effect: %s", name, _INSTEAD[name][1])
    return {name: value for name, value in chosen.items() if name not in _INSTEAD}
