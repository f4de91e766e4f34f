"""Find a pipeline's weights in a single-file checkpoint of Stable Diffusion or Flux, under its own keys.

diffusers' conversion knows the names, and which weights are rows of one joint tensor, as q, k and v in OpenCLIP are. It
is given the numbers of rows in place of weights, so what it returns says where each weight is.
"""

from bisect import bisect_right
from collections.abc import Mapping
from contextlib import suppress
from itertools import accumulate
from types import SimpleNamespace
from typing import NamedTuple

import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from torch import Tensor

_UNET = "model.diffusion_model."
_OPEN_CLIP = {
    "cond_stage_model.model.": "text_encoder",  # 2.x
    "conditioner.embedders.1.model.": "text_encoder_2",  # XL
    "conditioner.embedders.0.model.": "text_encoder_2",  # XL's refiner
}
_TRANSFORMERS = {
    "double_blocks.0.img_attn.qkv.weight": convert_flux_transformer_checkpoint_to_diffusers,
    "joint_blocks.0.x_block.attn.qkv.weight": convert_sd3_transformer_checkpoint_to_diffusers,
}


class Rows(NamedTuple):
    """A weight's place: rows ``[first, first + height)`` of the tensor ``key``."""

    key: str
    first: int
    height: int


def rows_by_name(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Rows]:
    """The weights of a checkpoint by ``component.name``, as a diffusers pipeline names them.

    Args:
        shapes: of all its tensors, by key. Of a file with other keys nothing is found.
    """
    counts = [shape[0] if shape else 1 for shape in shapes.values()]
    firsts = list(accumulate(counts, initial=0))
    numbers = {
        key: torch.arange(first, first + count).view(-1, 1)
        for key, first, count in zip(shapes, firsts, counts, strict=False)
    }
    keys, found = list(shapes), {}
    for name, own in _converted(numbers).items():
        tensor = bisect_right(firsts, int(own[0])) - 1
        found[name] = Rows(keys[tensor], int(own[0]) - firsts[tensor], len(own))
    return found


def _converted(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each weight, by ``component.name``, the numbers ``(rows, 1)`` of its rows, counted over the whole file."""
    found = {f"text_encoder.{name}": own for name, own in convert_ldm_clip_checkpoint(numbers).items()}
    if any(key.startswith(_UNET) for key in numbers):
        extra = "text_time" if f"{_UNET}label_emb.0.0.weight" in numbers else None  # XL's size and crop
        config = {"layers_per_block": _layers_per_block(numbers), "addition_embed_type": extra}
        unet = convert_ldm_unet_checkpoint(numbers, config)
        found |= {f"unet.{name}": own for name, own in unet.items()}
    for prefix, component in _OPEN_CLIP.items():
        joint = [own for key, own in numbers.items() if key.startswith(prefix) and key.endswith(".in_proj_weight")]
        if joint:
            model = SimpleNamespace(config=SimpleNamespace(hidden_size=len(joint[0]) // 3))
            converted = convert_open_clip_checkpoint(model, numbers, prefix)
            found |= {f"{component}.{name}": own for name, own in converted.items()}
    for mark, convert in _TRANSFORMERS.items():
        if any(key.endswith(mark) for key in numbers):
            with suppress(KeyError):  # a relative of theirs, with other keys
                found |= {f"transformer.{name}": own for name, own in convert(dict(numbers)).items()}
    return {name: own for name, own in found.items() if _is_a_row_range(own)}


def _is_a_row_range(numbers: Tensor) -> bool:
    """Whether a weight is stored as it is: not transposed, and with its rows in their order."""
    return numbers.shape[1:] == (1,) and int(numbers[-1] - numbers[0]) == len(numbers) - 1


def _layers_per_block(numbers: Mapping[str, Tensor]) -> int:
    """How many layers come before the first of the UNet's downsamplers; two where there is none."""
    return next((i - 1 for i in range(1, 20) if f"{_UNET}input_blocks.{i}.0.op.weight" in numbers), 2)
