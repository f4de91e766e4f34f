"""Read a model's weights from disk one at a time, without loading the model.

In: a pipeline's folder, a model's, or a single ``.safetensors`` file, sharded or not. Out: a ``StoredWeight`` per name.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from shira_diffusers.errors import AdapterFormatError, listing
from shira_diffusers.formats.find import safetensors_in
from shira_diffusers.formats.paths import SUFFIX, did_you_mean, shown_in
from shira_diffusers.formats.safetensors_bytes import open_safetensors
from shira_diffusers.weights.text_model import PREFIX


class StoredWeight(NamedTuple):
    """A weight of a file: its shape, and what reads it, anew at each call."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Checkpoint = dict[str, dict[str, StoredWeight]]
"""Component ("" for a model alone) -> name -> weight."""

_INDEX = f"{SUFFIX}.index.json"
_USUAL = ("diffusion_pytorch_model", "model")  # of diffusers, of transformers


def read_checkpoint(path: Path) -> Checkpoint:
    """The floating-point weights of a model on disk; only headers are read.

    Args:
        path: the folder of a pipeline, with ``model_index.json``, or of one model; or a ``.safetensors`` file.

    Returns:
        ``{component: {name: weight}}``; a model alone is the component "". CLIP's ``text_model.``, which transformers
        5.6 dropped, is left out of names; loading an adapter accepts both.

    Raises:
        FileNotFoundError: there is none.
        AdapterFormatError: no ``.safetensors`` weights, a shard that is missing, or a file that is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}: expected a folder or a {SUFFIX} file{did_you_mean(path)}")
    if path.is_file():
        return {"": _named(stored_in(path))}
    if not (path / "model_index.json").is_file():
        return {"": _weights(path)}
    parts = {each.name: each for each in sorted(path.iterdir()) if each.is_dir() and _has_weights(each)}
    if not parts:
        raise AdapterFormatError(f"{path} has no {SUFFIX} weights; save the pipeline with safe_serialization=True")
    return {name: _weights(folder) for name, folder in parts.items()}


def _has_weights(folder: Path) -> bool:
    """Whether there are weights, or links to weights that are not there, which ``stored_in`` reports."""
    return any(path.suffix.lower() == SUFFIX and (path.is_file() or path.is_symlink()) for path in shown_in(folder))


def _weights(folder: Path) -> dict[str, StoredWeight]:
    """The tensors of one model's folder; of several variants, such as fp16, those without a variant."""
    found = {file.name for file in folder.iterdir()}
    for stem in _USUAL:
        if f"{stem}{_INDEX}" in found:
            return _sharded(folder, folder / f"{stem}{_INDEX}")
        if f"{stem}{SUFFIX}" in found:
            return _named(stored_in(folder / f"{stem}{SUFFIX}"))
    files, indices = safetensors_in(folder), _indices_in(folder)
    if len(indices) == 1:
        return _sharded(folder, indices[0])
    if len(files) == 1:
        return _named(stored_in(files[0]))
    names = ", ".join(file.name for file in files) or "none"
    raise AdapterFormatError(f"{folder} holds no model: expected {_USUAL[0]}{SUFFIX} or a single file, got {names}")


def _indices_in(folder: Path) -> list[Path]:
    """The indices of shards, also of variants: ``NAME.safetensors.index.fp16.json``."""
    return sorted(folder.glob(f"*{SUFFIX}.index.*.json")) + sorted(folder.glob(f"*{_INDEX}"))


def _sharded(folder: Path, index: Path) -> dict[str, StoredWeight]:
    files = sorted(set(_shards_of(index).values()))
    _require_there(index, files)
    return _named({key: weight for file in files for key, weight in stored_in(file).items()})


def _shards_of(index: Path) -> dict[str, Path]:
    """The file of each tensor, by key, as an index has them. Raises AdapterFormatError: no such index."""
    try:
        places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {key: index.parent / name for key, name in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterFormatError(f"{index} is no index of shards ({error}); get an intact copy") from error


def _require_there(index: Path, files: Iterable[Path]) -> None:
    if missing := [str(file) for file in files if not file.is_file()]:
        raise AdapterFormatError(f"{index} names shards that are not there; get all files:{listing(missing)}")


def require_shards(folder: Path, keys: Iterable[str]) -> None:
    """Refuse a folder that lacks the files in which its indices place these tensors.

    Raises:
        AdapterFormatError: names the files; or an index that is none.
    """
    keys = set(keys)
    for index in _indices_in(folder):
        _require_there(index, sorted({file for key, file in _shards_of(index).items() if key in keys}))


def stored_in(file: Path) -> dict[str, StoredWeight]:
    """The floating-point weights of a ``.safetensors`` file by key.

    Raises:
        AdapterFormatError: it is damaged, or no such file, or its path is not UTF-8.
    """
    if not file.is_file():
        raise AdapterFormatError(f"{file} is a link to nothing, or no file: expected weights; get all files")
    open_safetensors(file)  # says what is wrong with it
    _require_utf8(file)
    with safe_open(file, framework="pt") as opened:
        parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  no mapping
        return {
            key: StoredWeight(tuple(part.get_shape()), partial(_read, file, key))
            for key, part in parts.items()
            if part.get_dtype().lstrip("B").startswith("F")
        }


def _require_utf8(file: Path) -> None:
    try:
        os.fspath(file).encode()
    except UnicodeEncodeError as error:
        raise AdapterFormatError(
            f"{str(file)!r} cannot be read: safetensors opens files with UTF-8 names only; rename the file or folder"
        ) from error


def _read(file: Path, key: str) -> Tensor:
    """One tensor, mapped for as long as it is held."""
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key)


def _named(weights: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    return {key.removeprefix(PREFIX): weight for key, weight in weights.items()}
