"""Write adapters as PEFT's SHiRA tuner reads them: ``PeftModel.from_pretrained(model, folder)``.

PEFT holds ``r * (in + out)`` entries of each Linear weight, with one ``r`` for all of them: the smallest that holds
every mask is taken, and zeros at unused places fill up the rest.
Source: https://huggingface.co/docs/peft/package_reference/shira
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.delta import SparseDelta
from shira_diffusers.atomic_write import made_folders, made_whole, write_atomically
from shira_diffusers.errors import AdapterMismatchError, ShiraError, counted, listing, verb
from shira_diffusers.formats.find import PEFT_CONFIG, PEFT_WEIGHTS
from shira_diffusers.formats.header import INDICES, PREFIX, VALUES
from shira_diffusers.formats.safetensors_bytes import to_bytes
from shira_diffusers.formats.shira_file import raw_of

_WEIGHT = ".weight"
# How many entries may be nearly all zeros, and else how many per entry of the adapter: a file can claim any shape.
_MANY, _MOST_ZEROS = 2**24, 64


def split_for_peft(adapter: ShiraAdapter) -> tuple[ShiraAdapter, list[str]]:
    """The part of an adapter that PEFT can hold, and the names of the weights that it cannot: all but those of Linear.

    Weights without entries are left out unnamed: they change nothing.
    """
    held = {n: d for n, d in adapter.deltas.items() if len(d.shape) == 2 and n.endswith(_WEIGHT) and d.nnz}
    rest = [name for name, delta in adapter.deltas.items() if name not in held and delta.nnz]
    return ShiraAdapter(held, adapter.metadata), rest


def rank_for_peft(adapter: ShiraAdapter) -> int:
    """The smallest ``r`` with which each weight's ``r * (in + out)`` entries hold the adapter's.

    Raises:
        AdapterMismatchError: some weights have fewer entries than that, or there would be hardly anything but zeros.
    """
    rank = max(-(-delta.nnz // sum(delta.shape)) for delta in adapter.deltas.values())
    small = [
        f"{name}: {rank} * {sum(delta.shape)} of {delta.numel} entries"
        for name, delta in adapter.deltas.items()
        if rank * sum(delta.shape) > delta.numel
    ]
    if small:
        raise AdapterMismatchError(
            f"PEFT has one r for all layers, and r = {rank}, which the densest mask needs, is more than "
            f"{counted(len(small), 'weight', of=len(adapter.deltas))} can hold; train with fewer entries or fewer "
            f"targets, or export parts of the adapter one by one:{listing(small)}"
        )
    _require_few_zeros(adapter, rank)
    return rank


def _require_few_zeros(adapter: ShiraAdapter, rank: int) -> None:
    held = sum(delta.nnz for delta in adapter.deltas.values())
    total = sum(rank * sum(delta.shape) for delta in adapter.deltas.values())
    if total > max(_MANY, _MOST_ZEROS * held):
        largest = sorted(adapter.deltas.items(), key=lambda each: -sum(each[1].shape))
        raise AdapterMismatchError(
            f"PEFT holds r * (in + out) entries of each layer: the adapter's {counted(held, 'entry')} would be filled "
            f"up with {total - held:,} zeros, expected fewer than {_MOST_ZEROS} per entry; get an intact copy, or "
            f"export parts of the adapter one by one:{listing([f'{name}: {delta.shape}' for name, delta in largest])}"
        )


def save_peft_adapter(adapter: ShiraAdapter, folder: str | os.PathLike[str]) -> Path:
    """Write a folder that PEFT loads: its model has the weights that this adapter gives at strength 1.

    Args:
        adapter: of one model, with plain parameter names, of Linear layers only; see ``split_for_peft``, and
            ``ShiraAdapter.part`` for an adapter of a pipeline. Values are written in float32.
        folder: a name not in use.

    Returns:
        The folder.

    Raises:
        ShiraError: the folder exists.
        AdapterMismatchError: weights that PEFT cannot hold, all of them named, or an adapter without entries.

    On error nothing has been written.
    """
    return save_peft_adapters({"": adapter}, folder)[""]


def save_peft_adapters(parts: Mapping[str, ShiraAdapter], folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Write the adapters of several models, all or none: each into a folder of its own inside, one alone into it.

    Args and Raises: as ``save_peft_adapter``, by component.

    Returns:
        The folder of each.
    """
    target = Path(folder)
    if target.exists():
        raise ShiraError(f"{target} exists, expected a new folder; choose another name")
    if not parts:
        raise AdapterMismatchError("the adapter has no entries in weights of Linear layers: there is nothing to export")
    files = {part: _files_of(adapter) for part, adapter in parts.items()}
    inside = {part: Path(part if len(parts) > 1 else "") for part in parts}
    with made_folders(target.parent), made_whole(target) as temporary:
        for part, contents in files.items():
            (temporary / inside[part]).mkdir(parents=True)
            for name, content in contents.items():
                write_atomically(temporary / inside[part] / name, content)
    return {part: target / inside[part] for part in parts}


def _files_of(adapter: ShiraAdapter) -> dict[str, bytes]:
    """The content of each file of a folder."""
    linear, rest = split_for_peft(adapter)
    if rest:
        raise AdapterMismatchError(
            f"PEFT's SHiRA holds weights of Linear layers only, and {counted(len(rest), 'weight')} of this adapter "
            f"{verb(len(rest), 'is', 'are')} of other layers; leave them out (shira export-peft --partial), or train "
            f"without them:{listing(rest)}"
        )
    if not linear.deltas:
        raise AdapterMismatchError("the adapter has no entries in weights of Linear layers: there is nothing to export")
    rank = rank_for_peft(linear)
    tensors: dict[str, Tensor] = {}
    for name, delta in linear.deltas.items():
        layer = PREFIX + name.removesuffix(_WEIGHT)
        tensors[layer + INDICES], tensors[layer + VALUES] = _padded(delta, rank * sum(delta.shape))
    content = to_bytes({key: raw_of(tensor) for key, tensor in tensors.items()}, {"format": "pt"})
    return {PEFT_WEIGHTS: content, PEFT_CONFIG: json.dumps(_config(linear, rank), indent=2).encode()}


def _padded(delta: SparseDelta, count: int) -> tuple[Tensor, Tensor]:
    """Indices, int32 ``(2, count)`` (output row, input column), and values, float32 ``(count,)``.

    Zeros are put at the first places that the mask leaves free.
    """
    own = delta.indices.cpu().long()
    free = torch.ones(count, dtype=torch.bool, device="cpu")
    free[own[own < count]] = False
    spare = free.nonzero().flatten()[: count - delta.nnz]  # so many are free among the first ``count``
    flat, order = torch.cat([own, spare]).sort()
    values = torch.cat([delta.values.cpu().float(), torch.zeros(len(spare), device="cpu")])[order]
    return torch.stack([flat // delta.shape[1], flat % delta.shape[1]]).int(), values


def _config(adapter: ShiraAdapter, rank: int) -> Mapping[str, object]:
    """What ``adapter_config.json`` says. Layers are named by one regular expression: of a list, PEFT compares ends."""
    layers = "|".join(re.escape(name.removesuffix(_WEIGHT)) for name in adapter.deltas)
    return {
        "peft_type": "SHIRA",
        "r": rank,
        "mask_type": "random",  # of the layers' own masks, which loading replaces by those of the file
        "target_modules": f"({layers})",
        "base_model_name_or_path": adapter.metadata.get("base_model"),
        "inference_mode": True,
    }
