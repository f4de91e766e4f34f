"""A pipeline's weights under the keys of Stable Diffusion's first code, as single files have them; written by hand."""

import re

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def unet_key(name: str, layers: int) -> str:
    """The key of a UNet's parameter, below ``model.diffusion_model.``."""
    for end, key in _ENDS.items():
        if name.startswith(end + "."):
            return key + name.removeprefix(end)
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)|mid_block\.(\w+)\.(\d+)\.(.*)", name)
    assert found, name
    way, block, kind, layer, rest, mid_kind, mid_layer, mid_rest = found.groups()
    if way is None:
        place = f"middle_block.{1 if mid_kind == 'attentions' else 2 * int(mid_layer)}"
        return f"{place}.{_resnet(mid_rest) if mid_kind == 'resnets' else mid_rest}"
    start = (layers + 1) * int(block)
    if kind == "downsamplers":
        return f"input_blocks.{start + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        inner = 2 if block == "0" else 1  # the tiny UNet's first up block has attention before it
        return f"output_blocks.{start + layers}.{inner}.{rest}"
    place = f"input_blocks.{start + int(layer) + 1}" if way == "down" else f"output_blocks.{start + int(layer)}"
    return f"{place}.0.{_resnet(rest)}" if kind == "resnets" else f"{place}.1.{rest}"


def _resnet(rest: str) -> str:
    part, _, leaf = rest.rpartition(".")
    return f"{_RESNET[part]}.{leaf}"


def unet_weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block
    return {f"model.diffusion_model.{unet_key(n, layers)}": p.detach().clone() for n, p in unet.named_parameters()}


def clip_weights(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Of transformers' CLIP, with the ``text_model.`` that transformers 5.6 dropped."""
    named = {n.removeprefix("text_model."): p.detach().clone() for n, p in model.named_parameters()}
    return {f"{prefix}text_model.{name}": weight for name, weight in named.items()}


def open_clip_weights(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Of OpenCLIP's encoder: q, k and v one below the other in one tensor, the projection transposed."""
    named = {n.removeprefix("text_model."): p.detach().clone() for n, p in model.named_parameters()}
    found = {f"{prefix}text_projection": named.pop("text_projection.weight").T.contiguous()}
    for name, weight in named.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
        if layer is None:
            continue
        number, part, leaf = layer.groups()
        block = f"{prefix}transformer.resblocks.{number}"
        if part.endswith(("k_proj", "v_proj")):
            continue
        if part.endswith("q_proj"):
            joint = [named[name.replace("q_proj", each)] for each in ("q_proj", "k_proj", "v_proj")]
            found[f"{block}.attn.in_proj_{leaf}"] = torch.cat(joint)
        else:
            found[f"{block}.{_OPEN_CLIP[part]}.{leaf}"] = weight
    return found


def single_file(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """All of a tiny pipeline of Stable Diffusion 1.x or XL, but for its autoencoder."""
    if not hasattr(pipe, "text_encoder_2"):
        return unet_weights(pipe.unet) | clip_weights(pipe.text_encoder, "cond_stage_model.transformer.")
    first = clip_weights(pipe.text_encoder, "conditioner.embedders.0.transformer.")
    return unet_weights(pipe.unet) | first | open_clip_weights(pipe.text_encoder_2, "conditioner.embedders.1.model.")
