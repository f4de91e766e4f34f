"""Export a Stable Diffusion pipeline to ONNX with every weight addressable by its name in diffusers.

In: a pipeline. Out: a folder per component with ``model.onnx`` (the graph), ``model.safetensors`` (its weights, which
the graph names as external data) and ``model.json`` (which weights are stored transposed, the UNet's blocks), with
its own ``config.json``; beside them the tokenizer and the scheduler's configuration. Needs torch and onnx.

The graph is traced with weights as inputs, so that none is folded or renamed. (The exporter by torch.export was tried:
it takes 22 s in place of 1.6 s for a tiny UNet.)
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import external_data_helper
from safetensors.torch import save_file
from torch import Tensor, nn

from shira_diffusers.adapters.scales import blocks_of
from shira_diffusers.atomic_write import made_folders, made_whole
from shira_diffusers.edge.exported import ABOUT, FORMAT, FORMAT_VERSION, MODEL, WEIGHTS
from shira_diffusers.errors import ShiraError
from shira_diffusers.formats.safetensors_bytes import spans_of

_CODES = {"F32": onnx.TensorProto.FLOAT, "F16": onnx.TensorProto.FLOAT16}
_PREFIX = "model."  # of parameters' names in what is traced
_NEEDED = ("unet", "text_encoder", "vae", "tokenizer", "scheduler")


class _Denoise(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _Encode(_Denoise):
    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.model(input_ids, return_dict=False)[0]


class _Decode(_Denoise):
    def forward(self, latents: Tensor) -> Tensor:  # type: ignore[override]
        return self.model.decode(latents, return_dict=False)[0]  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class _Traced:
    """How a component is called: the smallest inputs, which of their dimensions may change, and the output's name."""

    module: _Denoise
    inputs: Mapping[str, Tensor]
    dynamic: Mapping[str, Mapping[int, str]]
    output: str


def export_onnx(
    pipe: Any, folder: str | os.PathLike[str], progress: Callable[[int, int], object] = lambda done, total: None
) -> Path:
    """Write UNet, text encoder and VAE decoder of a Stable Diffusion 1.x or 2.x pipeline for ``OnnxResident``.

    Args:
        pipe: a pipeline in float32 or float16; adapters that are active become part of the base.
        folder: a new one.
        progress: called after each model with how many are done, and of how many.

    Returns:
        The folder, whole; on any error it does not exist.

    Raises:
        ShiraError: the folder exists, or a pipeline of other components or another dtype.
    """
    target = Path(folder)
    require_new(target)
    found = [name for name, part in pipe.components.items() if part is not None]
    if not set(_NEEDED) <= set(found) or "text_encoder_2" in found:
        raise ShiraError(
            f"cannot export a {type(pipe).__name__}, which has {', '.join(found)}: expected a StableDiffusionPipeline "
            f"with {', '.join(_NEEDED)}"
        )
    dtypes = {part.dtype for part in (pipe.unet, pipe.text_encoder, pipe.vae)}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float16}:
        raise ShiraError(
            f"cannot export weights of {', '.join(sorted(map(str, dtypes)))}, expected all in float32 or all in "
            "float16; load the pipeline with torch_dtype"
        )
    with made_folders(target.parent), made_whole(target) as whole:
        parts = _components(pipe)
        for number, (name, traced) in enumerate(parts.items(), 1):
            _write(traced, whole / name, str(pipe.config.get("_name_or_path", "")))
            progress(number, len(parts))
        pipe.tokenizer.save_pretrained(whole / "tokenizer")
        pipe.scheduler.save_pretrained(whole / "scheduler")
    return target


def require_new(folder: Path) -> None:
    """Raise ShiraError if a folder exists."""
    if folder.exists():
        raise ShiraError(f"{folder} exists, expected a new folder; choose another name or remove it")


def _components(pipe: Any) -> dict[str, _Traced]:
    unet, text, vae = pipe.unet, pipe.text_encoder, pipe.vae
    side, tokens = 2 ** len(unet.config.down_block_types), text.config.max_position_embeddings
    picture = {0: "batch", 2: "height", 3: "width"}
    hidden = unet.conv_in.weight.new_zeros(1, tokens, unet.config.cross_attention_dim)
    sample = hidden.new_zeros(1, unet.config.in_channels, side, side)
    latents = hidden.new_zeros(1, vae.config.latent_channels, side, side)
    ids, times = hidden.new_zeros(1, tokens, dtype=torch.int64), hidden.new_zeros(1, dtype=torch.int64)
    denoised = {"sample": sample, "timestep": times, "encoder_hidden_states": hidden}
    changing = {"sample": picture, "timestep": {0: "batch"}, "encoder_hidden_states": {0: "batch"}}
    return {
        "unet": _Traced(_Denoise(unet), denoised, changing, "noise"),
        "text_encoder": _Traced(_Encode(text), {"input_ids": ids}, {"input_ids": {0: "batch"}}, "hidden_states"),
        "vae": _Traced(_Decode(vae), {"latents": latents}, {"latents": picture}, "picture"),
    }


def _write(traced: _Traced, folder: Path, base: str) -> None:
    folder.mkdir(parents=True)
    with _plain_attention(traced.module.model):
        graph = _trace(traced, folder / MODEL)
    parameters = {f"{_PREFIX}{name}": own.detach() for name, own in traced.module.model.named_parameters()}
    given = [each for each in graph.graph.input if each.name in parameters]
    transposed = _store_transposed(graph.graph, {each.name for each in given})
    weights = {}
    for each in given:
        own = parameters[each.name]
        weights[each.name.removeprefix(_PREFIX)] = (own.T if each.name in transposed else own).contiguous()
    save_file(weights, folder / WEIGHTS)
    shutil.copymode(folder / MODEL, folder / WEIGHTS)  # safetensors writes files that are their owner's only
    _name_weights(graph.graph, folder / WEIGHTS)
    onnx.save(graph, str(folder / MODEL))
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_model": base,
        "transposed": sorted(name.removeprefix(_PREFIX) for name in transposed),
        "blocks": blocks_of(traced.module.model),
        "inputs": {name: list(tensor.shape) for name, tensor in traced.inputs.items()},
    }
    model: Any = traced.module.model
    (model.save_config if hasattr(model, "save_config") else model.config.save_pretrained)(folder)
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _trace(traced: _Traced, file: Path) -> onnx.ModelProto:
    """The graph, with all parameters as inputs named ``model.<name>``."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing: sizes of a batch and picture are not constants, see ``dynamic``
        torch.onnx.export(
            traced.module.eval(),
            tuple(traced.inputs.values()),
            str(file),
            dynamo=False,
            export_params=False,
            keep_initializers_as_inputs=True,  # else weights of equal values become one
            do_constant_folding=False,
            input_names=list(traced.inputs),
            output_names=[traced.output],
            dynamic_axes=traced.dynamic,
        )
    return onnx.load(str(file))


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Trace a text encoder without fused attention, whose masks are exported as float32 even in a float16 model."""
    config: Any = model.config
    before = getattr(config, "_attn_implementation", None)
    if before is not None:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        if before is not None:
            config._attn_implementation = before


def _store_transposed(graph: Any, names: set[str]) -> set[str]:
    """Take out the nodes that transpose a weight ``(out, in)``, and return the names of the weights to store so."""
    uses: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node)
    found = {name for name in names if name in uses and all(_turns(node) for node in uses[name])}
    for each in graph.input:
        if each.name in found:
            each.type.tensor_type.shape.dim.reverse()
    for name in found:
        for node in uses[name]:
            for user in uses[node.output[0]]:
                user.input[list(user.input).index(node.output[0])] = name
            graph.node.remove(node)
    return found


def _turns(node: Any) -> bool:
    return node.op_type == "Transpose" and list(node.attribute[0].ints) == [1, 0]


def _name_weights(graph: Any, file: Path) -> None:
    """Make the weights in a file the values of the graph's inputs of their names, unless others are given.

    As inputs they are no constants, so no session folds, reorders or prepacks them: it computes with the memory itself.
    """
    for name, span in spans_of(file).items():
        tensor = onnx.TensorProto(name=name, data_type=_CODES[span.dtype], dims=span.shape, raw_data=b"")
        external_data_helper.set_external_data(tensor, file.name, span.start, span.end - span.start)
        tensor.ClearField("raw_data")
        graph.initializer.append(tensor)
    for node in graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = name.removeprefix(_PREFIX)
    for each in graph.input:
        each.name = each.name.removeprefix(_PREFIX)
