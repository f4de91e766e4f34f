"""Adapters of PEFT's SHiRA tuner: read into ours (Linear only; PEFT stores no shapes, the model gives them).

On disk: ``adapter_config.json`` with ``peft_type`` SHIRA and ``adapter_model.safetensors`` with
``base_model.model.<path>.shira_weight`` ``[nnz]`` and ``.shira_indices`` ``[2, nnz]`` (output row, input column).
Source: https://huggingface.co/docs/peft/package_reference/shira
"""

import json
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.delta import SparseDelta
from shira_diffusers.errors import AdapterFormatError, AdapterMismatchError, ShiraError, counted, listing, verb
from shira_diffusers.formats.shira_file import read_safetensors
from shira_diffusers.weights.finder import Locator, unwrap
from shira_diffusers.weights.targets import weight_shape

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_VALUES, _INDICES = ".shira_weight", ".shira_indices"
_DENOISERS = ("", "unet", "transformer", "prior")  # what most adapters are for; a bare module has no name
_MASKS = {"random": "rand"}  # PEFT's mask types, by our families; a function of the user's own keeps its name


def is_peft_folder(path: Path) -> bool:
    """Whether a folder was written by PEFT's ``save_pretrained``."""
    return path.is_dir() and (path / PEFT_CONFIG).is_file()


def is_peft_state_dict(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of PEFT's SHiRA tuner."""
    return any(key.endswith(_VALUES) for key in tensors)


def load_peft_adapter(folder: str | Path, model: nn.Module) -> ShiraAdapter:
    """Read a PEFT SHiRA folder.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: the module it was trained on, which gives the weights' shapes.

    Returns:
        An adapter named without a component, values in PEFT's float32, sorted.

    Raises:
        AdapterFormatError: another PEFT method, or indices missing, duplicate or out of range.
        AdapterMismatchError: layers that the model does not have.
    """
    tensors, metadata = read_peft_folder(Path(folder))
    return decode_peft(tensors, model, str(folder), metadata)


def read_peft_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a PEFT SHiRA folder, and what its config tells, by our names of metadata.

    Raises:
        AdapterFormatError: another PEFT method, or a damaged or incomplete folder.
    """
    try:
        config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{folder / PEFT_CONFIG} is not JSON ({error}); get an intact copy") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "SHIRA":
        raise AdapterFormatError(
            f"{folder} is a PEFT adapter of type {kind!r}, expected 'SHIRA'; load a LoRA with load_lora_weights"
        )
    if not (folder / PEFT_WEIGHTS).is_file():
        raise AdapterFormatError(f"{folder} has no {PEFT_WEIGHTS}; save it with safe_serialization=True")
    tensors, _ = read_safetensors(folder / PEFT_WEIGHTS)
    mask = str(config.get("mask_type", "random"))
    metadata = {"mask": _MASKS.get(mask, mask), "source": "peft"}
    base = config.get("base_model_name_or_path")
    return tensors, {**metadata, **({"base_model": str(base)} if base else {})}


def peft_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter name -> values ``[nnz]``, in PEFT's order: all that is known of its adapters without a model."""
    return {
        _weight(key.removesuffix(_VALUES)): tensor.flatten() for key, tensor in tensors.items() if key.endswith(_VALUES)
    }


def _weight(layer: str) -> str:
    return f"{layer.removeprefix(_PREFIX)}.weight"


def decode_peft(
    tensors: Mapping[str, Tensor], model: nn.Module, source: str, metadata: Mapping[str, str] | None = None
) -> ShiraAdapter:
    """Build an adapter from the tensors of PEFT's SHiRA tuner, with or without the ``base_model.model.`` prefix.

    Args and Raises: see ``load_peft_adapter``.
    """
    locator = Locator(model)
    deltas: dict[str, SparseDelta] = {}
    damaged: list[str] = []
    misfits: list[str] = []
    for key, tensor in tensors.items():
        path, dot, kind = key.removeprefix(_PREFIX).rpartition(".")
        if dot + kind == _INDICES and path:
            if key.removesuffix(_INDICES) + _VALUES not in tensors:
                damaged.append(f"{path}: its values are missing, expected {path}{_VALUES}")
            continue
        if dot + kind != _VALUES or not path:
            damaged.append(f"{key}: unknown key, expected <layer>.shira_weight and .shira_indices")
            continue
        indices = tensors.get(key.removesuffix(_VALUES) + _INDICES)
        try:
            shape = tuple(locator.locate(f"{path}.weight").weight.shape)
            deltas[f"{path}.weight"] = _decode_layer(tensor, indices, shape)
        except AdapterMismatchError as error:
            misfits.append(str(error))
        except AdapterFormatError as error:
            damaged.append(f"{path}: {error}")
    if damaged:
        raise AdapterFormatError(
            f"{source} is not a valid PEFT SHiRA adapter; get an intact copy, or save it again without modules_to_save:"
            f"{listing(damaged)}"
        )
    if misfits:
        raise AdapterMismatchError(
            f"adapter does not fit: {counted(len(misfits), 'layer', of=len(misfits) + len(deltas))} "
            f"{verb(len(misfits), 'is', 'are')} not in {type(model).__name__}; use it with the model it was trained "
            f"for:{listing(misfits)}"
        )
    return ShiraAdapter(deltas, metadata or {"source": "peft"})


def decode_peft_for(
    models: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    source: str,
    metadata: Mapping[str, str] | None = None,
    *,
    component: str | None = None,
) -> ShiraAdapter:
    """Build an adapter, named by component, for a pipeline's models: ``{component: model}``.

    Args:
        models: the adapter is for the one that has all its layers; where several do, for the one whose shapes it fits.
        tensors: of PEFT's SHiRA tuner.
        source: for messages.
        metadata: of the adapter.
        component: the model that it is for; None looks for it.

    Raises:
        ShiraError: there is no such model, or there are several.
        AdapterFormatError, AdapterMismatchError: see ``load_peft_adapter``.
    """
    chosen = _component_of(tensors, models, source) if component is None else component
    adapter = decode_peft(tensors, models[chosen], source, metadata)
    return adapter.prefixed(chosen) if chosen else adapter


def _component_of(tensors: Mapping[str, Tensor], models: Mapping[str, nn.Module], source: str) -> str:
    fitting = _fitting(tensors, models)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ShiraError(
            f"{source} is PEFT's, which does not say what it is for, and fits several models: {', '.join(fitting)}; "
            f"name the right one, such as load_shira(..., component={fitting[-1]!r}); save_shira then writes a file "
            "that says it"
        )
    denoiser = next((name for name in _DENOISERS if name in models), None)
    if denoiser is None:
        raise ShiraError(
            f"{source} is PEFT's: expected a model with one of {', '.join(_DENOISERS[1:])} or with all layers of the "
            f"adapter, got {', '.join(models) or 'none'}; use it with the model it was trained for"
        )
    return denoiser


def _fitting(tensors: Mapping[str, Tensor], models: Mapping[str, nn.Module]) -> list[str]:
    """The models with all layers of an adapter; of several those whose shapes it fits, where it fits any."""
    values = peft_values(tensors)
    once = {id(unwrap(model)): name for name, model in reversed(list(models.items()))}  # a model may have two names
    shapes = {name: _shapes(models[name], values) for name in models if name in once.values() and values}
    found = {name: its for name, its in shapes.items() if its is not None}
    for fits in (_indices_fit, _counts_fit):
        if len(found) > 1:
            found = {name: its for name, its in found.items() if fits(tensors, its)} or found
    return list(found)


def _shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]] | None:
    """Each weight's shape by its layer's own account, empty for one that is no Linear; None if a layer is missing."""
    locator = Locator(model)
    try:
        return {name: weight_shape(locator.layer(name)) or () for name in names}
    except AdapterMismatchError:
        return None


def _indices_fit(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all indices lie inside the weights."""
    indices = {_weight(key.removesuffix(_INDICES)): tensor for key, tensor in tensors.items() if key.endswith(_INDICES)}
    pairs = [(its, shapes.get(name, ())) for name, its in indices.items()]
    return all(its.shape[:1] == (len(shape),) and _below(its, shape) for its, shape in pairs)


def _below(indices: Tensor, shape: tuple[int, ...]) -> bool:
    return not indices.numel() or bool((indices.amax(dim=1).cpu() < torch.tensor(shape)).all())


def _counts_fit(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether each weight has as many values as PEFT gives it: ``r * (in + out)``, with one ``r`` for all."""
    ranks = {Fraction(values.numel(), sum(shapes[name]) or 1) for name, values in peft_values(tensors).items()}
    return len(ranks) == 1 and ranks.pop().denominator == 1


def _decode_layer(values: Tensor, indices: Tensor | None, shape: tuple[int, ...]) -> SparseDelta:
    if indices is None:
        raise AdapterFormatError("its indices are missing; save with PEFT 0.17 or newer, which stores them")
    if indices.ndim != 2 or indices.shape[0] != 2 or indices.shape[1] != values.numel() or len(shape) != 2:
        raise AdapterFormatError(
            f"indices {tuple(indices.shape)} for {counted(values.numel(), 'value')} of a {shape} weight"
        )
    if indices.is_floating_point() and not bool((indices == indices.trunc()).all()):  # NaN differs from itself
        raise AdapterFormatError(f"indices are {indices.dtype} with fractions or NaN, expected whole numbers")
    rows, columns = indices.to(torch.int64)  # float32 when saved on Windows
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    if not bool(inside.all()):
        raise AdapterFormatError(
            f"indices of {counted(int((~inside).sum()), 'entry')} are out of range for a {shape} weight"
        )
    flat, order = (rows * shape[1] + columns).sort()  # (row, column) -> row-major
    return SparseDelta(flat, values.flatten()[order], shape)
