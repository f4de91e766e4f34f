"""Fuse adapter files into one file: ``shira fuse``."""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.merge import fuse
from shira_diffusers.cli.inspect import written_line
from shira_diffusers.cli.terminal import note, say, say_json
from shira_diffusers.errors import ShiraError, counted
from shira_diffusers.formats.find import PEFT_WEIGHTS, find_local, is_peft_folder, safetensors_in
from shira_diffusers.formats.inspect import inspect_adapter
from shira_diffusers.formats.opened_adapter import open_adapter
from shira_diffusers.formats.paths import OTHER_WEIGHTS, SUFFIX, shown_in
from shira_diffusers.formats.shira_file import WEIGHTS_NAME, file_to_write, save_adapter

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def fuse_files(args: argparse.Namespace) -> None:
    """Run the command: fuse adapters in the order given and write one file, whole or not at all.

    Raises:
        ShiraError: the output exists, or the weights do not fit the files.
        AdapterFormatError: a file that is no adapter, or values too large for the dtype.
        AdapterMismatchError: adapters of different models.
        OSError: a file cannot be read or written.
    """
    new_file(args.output, args.force, *(find_local(file) for file in args.files))
    count, weights = len(args.files), args.weights or [1.0]
    if len(weights) not in (1, count):
        raise ShiraError(
            f"expected one weight per file, got {counted(len(weights), 'weight')} for {counted(count, 'file')}"
        )
    scales = weights if len(weights) == count else weights * count
    adapters = [open_adapter(file).decode() for file in args.files]
    _compare_bases(adapters)
    fused = fuse(adapters, scales, args.method).astype(DTYPES[args.dtype])
    mix = json.dumps(dict(zip(titles(args.files), scales, strict=True)))
    found = inspect_adapter(save_adapter(fused.with_metadata(mix=mix, method=args.method), args.output))
    if args.json:
        say_json({"output": str(found.path), "entries": found.nnz, "bytes": found.size})
    else:
        say(written_line(found))


def new_file(output: Path, force: bool, *sources: Path) -> Path:
    """The file to write, of a name as ``save_adapter`` takes it.

    Args:
        sources: files and folders that it is made from.

    Raises:
        ShiraError: it exists, and is to stay; or the name is that of a file of another kind.
    """
    if output.suffix.lower() in OTHER_WEIGHTS and not output.is_dir():
        raise ShiraError(f"expected a {SUFFIX} file or a folder to write to, got {output}; choose such a name")
    target = file_to_write(output)
    if target.exists() and not force:
        raise ShiraError(f"{target} exists, expected a new file; choose another name or replace it with --force")
    if output.is_file() and output != target:
        raise ShiraError(f"{output} is a file whose name does not end in {SUFFIX}; name such a file, or a folder")
    if target.exists() and any(each.exists() and target.samefile(each) for each in _weights_of(sources)):
        raise ShiraError(f"{target} is what the adapter is made from, and stays; choose another name")
    return target


def _weights_of(sources: Iterable[Path]) -> Iterator[Path]:
    """The files of weights that adapters and models consist of."""
    for source in sources:
        if is_peft_folder(source):
            yield source / PEFT_WEIGHTS
        elif (source / "model_index.json").is_file():
            yield from chain.from_iterable(map(safetensors_in, shown_in(source)))
        else:
            yield from safetensors_in(source) or [source]


def _compare_bases(adapters: Sequence[ShiraAdapter]) -> None:
    """One base may go by several names, so other names are no error."""
    bases = sorted({adapter.metadata["base_model"] for adapter in adapters if "base_model" in adapter.metadata})
    if len(bases) > 1:
        note(f"note: the adapters name different bases: {', '.join(map(repr, bases))}")


def titles(files: Sequence[Path]) -> list[str]:
    """What to call each adapter: its file's name, or its folder's for the default name; the path if two are alike."""
    titles = []
    for file in files:
        path = file.resolve()
        titles.append(path.parent.name if path.name == WEIGHTS_NAME else path.stem if path.is_file() else path.name)
    return titles if len(set(titles)) == len(titles) else [f"{k}: {file}" for k, file in enumerate(files, 1)]
