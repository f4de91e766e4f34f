"""Export a pipeline for devices without torch: ``shira export-onnx``."""

import argparse

import torch

from shira_diffusers.cli.base_model import open_pipeline
from shira_diffusers.cli.progress_bar import progress_bar
from shira_diffusers.cli.terminal import say, say_json
from shira_diffusers.errors import ShiraError, counted

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def export(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ShiraError: onnx or onnxruntime is missing, no such pipeline, or see ``edge.export.export_onnx``.
    """
    try:
        from shira_diffusers.edge.export import export_onnx, require_new
    except ModuleNotFoundError as error:
        raise ShiraError(f"{error}: exporting needs it; pip install 'shira-diffusers[export]'") from error
    require_new(args.output)
    pipe = open_pipeline(args.base, _DTYPES[args.dtype])
    with progress_bar(unit="models") as progress:
        folder = export_onnx(pipe, args.output, progress)
    sizes = {path.parent.name: path.stat().st_size for path in sorted(folder.glob("*/*.safetensors"))}
    if args.json:
        say_json({"folder": str(folder), "dtype": args.dtype, "bytes": sizes})
    else:
        parts = ", ".join(f"{name} {counted(size, 'byte')}" for name, size in sizes.items())
        say(f"wrote {folder} ({args.dtype}): {parts}")
