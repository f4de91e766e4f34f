"""Read a model's weights from disk without loading them: files are mapped, so memory holds what is computed with.

In: a pipeline's folder, a component's, or a single ``.safetensors`` file, sharded or not. Out: tensors by name.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from shira_diffusers.errors import AdapterFormatError, listing
from shira_diffusers.formats.find import safetensors_in
from shira_diffusers.formats.paths import SUFFIX, did_you_mean
from shira_diffusers.formats.shira_file import read_safetensors

Checkpoint = dict[str, dict[str, Tensor]]
"""Component ("" for a model alone) -> name -> weight, mapped."""

_INDEX = f"{SUFFIX}.index.json"
_USUAL = ("diffusion_pytorch_model", "model")  # of diffusers, of transformers


def read_checkpoint(path: Path) -> Checkpoint:
    """The floating-point tensors of a model on disk, mapped.

    Args:
        path: the folder of a pipeline, with ``model_index.json``, or of one model; or a ``.safetensors`` file.

    Returns:
        ``{component: {name: tensor}}``; a model alone is the component "". CLIP's ``text_model.``, which transformers
        5.6 dropped, is left out of names; loading an adapter accepts both.

    Raises:
        FileNotFoundError: there is none.
        AdapterFormatError: no ``.safetensors`` weights, a shard that is missing, or a file that is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}: expected a folder or a {SUFFIX} file{did_you_mean(path)}")
    if path.is_file():
        return {"": _named(read_safetensors(path)[0])}
    if not (path / "model_index.json").is_file():
        return {"": _weights(path)}
    parts = {each.name: each for each in sorted(path.iterdir()) if each.is_dir() and safetensors_in(each)}
    if not parts:
        raise AdapterFormatError(f"{path} has no {SUFFIX} weights; save the pipeline with safe_serialization=True")
    return {name: _weights(folder) for name, folder in parts.items()}


def _weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of one model's folder; of several variants, such as fp16, those without a variant."""
    found = {file.name for file in folder.iterdir()}
    for stem in _USUAL:
        if f"{stem}{_INDEX}" in found:
            return _sharded(folder, folder / f"{stem}{_INDEX}")
        if f"{stem}{SUFFIX}" in found:
            return _named(read_safetensors(folder / f"{stem}{SUFFIX}")[0])
    files, indices = safetensors_in(folder), sorted(folder.glob("*.index.*.json")) + sorted(folder.glob(f"*{_INDEX}"))
    if len(indices) == 1:
        return _sharded(folder, indices[0])
    if len(files) == 1:
        return _named(read_safetensors(files[0])[0])
    names = ", ".join(file.name for file in files) or "none"
    raise AdapterFormatError(f"{folder} holds no model: expected {_USUAL[0]}{SUFFIX} or a single file, got {names}")


def _sharded(folder: Path, index: Path) -> dict[str, Tensor]:
    try:
        places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / name for name in sorted(set(places.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterFormatError(f"{index} is no index of shards ({error}); get an intact copy") from error
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        raise AdapterFormatError(f"{index} names shards that are not there; get all files:{listing(missing)}")
    return _named({key: tensor for file in files.values() for key, tensor in read_safetensors(file)[0].items()})


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors of any shapes by name."""
    return {key.removeprefix("text_model."): tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
