"""Fuse adapter files into one file: ``shira fuse``."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.merge import fuse
from shira_diffusers.cli.terminal import note
from shira_diffusers.errors import ShiraError, counted
from shira_diffusers.formats.opened_adapter import open_adapter
from shira_diffusers.formats.paths import SUFFIX
from shira_diffusers.formats.shira_file import WEIGHTS_NAME, file_to_write, save_adapter

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def fuse_files(
    files: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "sum",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    report: Callable[[str], None] = note,
) -> Path:
    """Read adapters, fuse them in this order and write one file, whole or not at all.

    Args:
        files: files, or folders that hold one.
        output: a ``.safetensors`` file, or a folder, made if needed, for the default name.
        weights: the scale of each adapter, or one for all; None is 1.0.
        method: a name in ``shira_diffusers.MERGE_METHODS``.
        dtype: of the values; float32 gives bit for bit the weights that the adapters give together.
        force: replace an output that exists.
        report: called with each remark.

    Returns:
        The file written.

    Raises:
        ShiraError: the output exists, or the weights do not fit the files.
        AdapterFormatError: a file that is no adapter, or values too large for ``dtype``.
        AdapterMismatchError: adapters of different models.
        OSError: a file cannot be read or written.
    """
    new_file(output, force)
    if weights is not None and len(weights) == 1:
        weights = list(weights) * len(files)
    if weights is not None and len(weights) != len(files):
        raise ShiraError(
            f"expected one weight per file, got {counted(len(weights), 'weight')} for {counted(len(files), 'file')}"
        )
    adapters = [open_adapter(file).decode() for file in files]
    _compare_bases(adapters, report)
    fused = fuse(adapters, weights, method).astype(dtype)
    scales = [1.0] * len(files) if weights is None else list(weights)
    mix = dict(zip(titles(files), scales, strict=True))
    return save_adapter(fused.with_metadata(mix=json.dumps(mix), method=method), output)


def new_file(output: Path, force: bool) -> Path:
    """The file to write, of a name as ``save_adapter`` takes it.

    Raises:
        ShiraError: it exists, and is to stay; or the name is that of a file of another kind.
    """
    target = file_to_write(output)
    if target.exists() and not force:
        raise ShiraError(f"{target} exists, expected a new file; choose another name or replace it with --force")
    if output.is_file() and output != target:
        raise ShiraError(f"{output} is a file whose name does not end in {SUFFIX}; name such a file, or a folder")
    return target


def _compare_bases(adapters: Sequence[ShiraAdapter], report: Callable[[str], None]) -> None:
    """One base may go by several names, so other names are no error."""
    bases = sorted({adapter.metadata["base_model"] for adapter in adapters if "base_model" in adapter.metadata})
    if len(bases) > 1:
        report(f"note: the adapters name different bases: {', '.join(map(repr, bases))}")


def titles(files: Sequence[Path]) -> list[str]:
    """What to call each adapter: its file's name, or its folder's for the default name; the path if two are alike."""
    titles = []
    for file in files:
        path = file.resolve()
        titles.append(path.parent.name if path.name == WEIGHTS_NAME else path.stem if path.is_file() else path.name)
    return titles if len(set(titles)) == len(titles) else [f"{k}: {file}" for k, file in enumerate(files, 1)]
