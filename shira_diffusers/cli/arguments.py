"""Define the command line of ``shira``: its subcommands, flags and help.

Needs the standard library only, so that help, version and usage errors come without loading torch.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

METHODS = ("sum",)  # those of MERGE_METHODS
DTYPES = ("float32", "float16", "bfloat16")
EXAMPLES = {
    "inspect": ("shira inspect bluefire.safetensors", "shira inspect --json --all adapters/bluefire"),
    "verify": (
        "shira verify bluefire.safetensors --base stable-diffusion-v1-5/stable-diffusion-v1-5",
        "shira verify adapters/bluefire --base ./my-model",
    ),
    "fuse": (
        "shira fuse bluefire.safetensors paintings.safetensors -o mix.safetensors",
        "shira fuse a.safetensors b.safetensors --weights 0.8 0.4 -o mix.safetensors",
        "shira fuse a.safetensors b.safetensors --weights 0.5 --dtype float16 -o mixes/both",
    ),
    "demo": (
        "shira demo",
        'shira demo --prompt "a picture of a red apple" --seed 7 -o apple.png',
        "shira demo --base ./my-model --adapters ./my-adapters",
    ),
    "export-onnx": (
        "shira export-onnx ./my-model exported",
        "shira export-onnx stable-diffusion-v1-5/stable-diffusion-v1-5 exported --dtype fp16",
    ),
}


def parser(version: str) -> argparse.ArgumentParser:
    """What parses the command line; ``command`` in its result is the subcommand's name."""
    whole = argparse.ArgumentParser(prog="shira", description="Sparse high rank adapters (SHiRA) for diffusers.")
    whole.add_argument("--version", action="version", version=f"shira_diffusers {version}")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)

    inspect = commands.add_parser("inspect", help="show what a file holds", description="Show what a file holds.")
    inspect.set_defaults(command="inspect")
    _show_examples(inspect, *EXAMPLES["inspect"])
    inspect.add_argument("file", metavar="FILE", type=Path, help="an adapter file, or a folder that holds one")
    inspect.add_argument("--json", action="store_true", help="as JSON, for programs")
    inspect.add_argument("--all", action="store_true", help="list all parameters; on a terminal only the first 20 are")

    verify = commands.add_parser(
        "verify",
        help="check that an adapter fits a base",
        description="Check names, shapes and base, apply the adapter, remove it and compare every bit.",
    )
    verify.set_defaults(command="verify")
    _show_examples(verify, *EXAMPLES["verify"])
    verify.add_argument("file", metavar="FILE", type=Path, help="an adapter file, or a folder that holds one")
    verify.add_argument("--base", required=True, help="a diffusers pipeline: a folder, or a Hub id")

    fuse = commands.add_parser("fuse", help="fuse adapters into one file", description="Fuse adapters into one file.")
    fuse.set_defaults(command="fuse")
    _show_examples(fuse, *EXAMPLES["fuse"])
    fuse.add_argument("files", metavar="FILE", type=Path, nargs="+", help="adapter files, or folders that hold one")
    fuse.add_argument("-o", "--output", type=Path, required=True, help="a .safetensors file, or a folder for it")
    fuse.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one for each adapter, or one for all (1.0)"
    )
    fuse.add_argument("--method", choices=METHODS, default="sum", help="how to merge (%(default)s)")
    fuse.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the values (%(default)s, exact; float16 is half the size)",
    )
    fuse.add_argument("--force", action="store_true", help="replace an output that exists")

    demo = commands.add_parser(
        "demo",
        help="draw styles side by side and time the switches",
        description="Draw a sheet, base | each style | the mix, and report how long switching took.",
    )
    demo.set_defaults(command="demo")
    _show_examples(demo, *EXAMPLES["demo"])
    demo.add_argument("--base", help="a diffusers pipeline (the bundled emoji-diffusion)")
    demo.add_argument("--adapters", type=Path, metavar="FOLDER", help="a folder of adapters (the bundled styles)")
    demo.add_argument("-o", "--output", type=Path, default=Path("shira-demo.png"), help="the sheet (%(default)s)")
    demo.add_argument("--prompt", action="append", metavar="TEXT", help="a row of the sheet; may be repeated")
    demo.add_argument("--seed", type=_whole(0, 2**32), default=0, help="of the first row (%(default)s)")
    demo.add_argument("--steps", type=_whole(1, 1000), default=20, help="of each picture (%(default)s)")

    export = commands.add_parser(
        "export-onnx",
        help="export a pipeline for devices without torch",
        description="Write UNet, text encoder and VAE decoder for ONNX Runtime, where OnnxResident switches adapters.",
    )
    export.set_defaults(command="export-onnx")
    _show_examples(export, *EXAMPLES["export-onnx"])
    export.add_argument("base", metavar="BASE", help="a Stable Diffusion 1.x or 2.x pipeline: a folder, or a Hub id")
    export.add_argument("output", metavar="OUT", type=Path, help="the folder to write, a new one")
    export.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the weights (%(default)s)")
    export.add_argument("--json", action="store_true", help="tell what was written as JSON, for programs")
    return whole


def _whole(low: int, high: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not from {low} to {high}")
        return value

    return whole_number


def _show_examples(command: argparse.ArgumentParser, *lines: str) -> None:
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = "\n".join(("examples:", *(f"  {line}" for line in lines)))
