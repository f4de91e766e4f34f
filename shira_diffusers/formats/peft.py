"""Read adapters of PEFT's SHiRA tuner (Linear only; PEFT stores no shapes, so the model provides them).

On disk: ``adapter_config.json`` with ``peft_type`` SHIRA and ``adapter_model.safetensors`` with
``base_model.model.<path>.shira_weight`` ``(nnz,)`` and ``.shira_indices`` ``(2, nnz)`` (output row, input column).
Source: https://huggingface.co/docs/peft/package_reference/shira
"""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.delta import SparseDelta
from shira_diffusers.errors import AdapterFormatError, AdapterMismatchError, ShiraError, counted, listing, verb
from shira_diffusers.formats.adapter_file import AdapterFile
from shira_diffusers.formats.find import PEFT_CONFIG, PEFT_WEIGHTS, is_peft_folder
from shira_diffusers.formats.header import (
    INDICES,
    PREFIX,
    VALUES,
    is_peft_state_dict,
    peft_weight,
    read_peft_header,
)
from shira_diffusers.formats.shira_file import tensor_of
from shira_diffusers.weights.finder import WeightMap, unwrap
from shira_diffusers.weights.targets import weight_shape

__all__ = ["PEFT_CONFIG", "PEFT_WEIGHTS", "is_peft_folder", "is_peft_state_dict", "load_peft_adapter"]

_DENOISERS = ("", "unet", "transformer", "prior")  # what most adapters are for; a bare module has no name


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
    """The tensors of a PEFT SHiRA folder, and the metadata in its config, by our names.

    Raises:
        AdapterFormatError: another PEFT method, or a damaged or incomplete folder.
    """
    file = read_peft_header(folder)
    return peft_tensors(file), dict(file.metadata)


def peft_tensors(file: AdapterFile) -> dict[str, Tensor]:
    """The tensors of a file of PEFT's, which share its memory."""
    return {key: tensor_of(raw) for key, raw in file.tensors.items()}


def peft_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter name -> values ``(nnz,)``, in PEFT's order: all that is known of its adapters without a model.

    Args:
        tensors: of PEFT's SHiRA tuner: values ``(nnz,)`` and indices ``(2, nnz)`` per layer.
    """
    return {
        peft_weight(key.removesuffix(VALUES)): tensor.flatten()
        for key, tensor in tensors.items()
        if key.endswith(VALUES)
    }


def decode_peft(
    tensors: Mapping[str, Tensor], model: nn.Module, source: str, metadata: Mapping[str, str] | None = None
) -> ShiraAdapter:
    """Build an adapter from the tensors of PEFT's SHiRA tuner, with or without the ``base_model.model.`` prefix.

    Args:
        tensors: values ``(nnz,)`` and indices ``(2, nnz)`` per layer.
        model: the one that the adapter is for.
        source: for messages.
        metadata: of the adapter.

    Raises:
        AdapterFormatError, AdapterMismatchError: see ``load_peft_adapter``.
    """
    weights = WeightMap(model)
    deltas: dict[str, SparseDelta] = {}
    damaged: list[str] = []
    misfits: list[str] = []
    for key, tensor in tensors.items():
        path, dot, kind = key.removeprefix(PREFIX).rpartition(".")
        if dot + kind == INDICES and path:
            if key.removesuffix(INDICES) + VALUES not in tensors:
                damaged.append(f"{path}: its values are missing, expected {path}{VALUES}")
            continue
        if dot + kind != VALUES or not path:
            damaged.append(f"{key}: unknown key, expected <layer>.shira_weight and .shira_indices")
            continue
        indices = tensors.get(key.removesuffix(VALUES) + INDICES)
        try:
            shape = tuple(weights[f"{path}.weight"].shape)
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
        tensors: of PEFT's SHiRA tuner: values ``(nnz,)`` and indices ``(2, nnz)`` per layer.
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
            "that says so"
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
    weights = WeightMap(model)
    try:
        return {name: weight_shape(weights.layer(name)) or () for name in names}
    except AdapterMismatchError:
        return None


def _indices_fit(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all indices lie inside the weights."""
    indices = {
        peft_weight(key.removesuffix(INDICES)): tensor for key, tensor in tensors.items() if key.endswith(INDICES)
    }
    pairs = [(its, shapes.get(name, ())) for name, its in indices.items()]
    return all(_are_indices(its, len(shape)) and _below(its, shape) for its, shape in pairs)


def _are_indices(indices: Tensor, dimensions: int) -> bool:
    """Whether a tensor is ``(dimensions, nnz)`` of a dtype that PEFT writes; what is not is refused when decoded."""
    return indices.ndim == 2 and len(indices) == dimensions and indices.dtype in (torch.int32, torch.int64)


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
