"""Define the command line of ``shira``: its subcommands, flags and help.

Needs the standard library only, so that help, version and usage errors come without loading torch.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from shira_diffusers.cli import export_arguments

METHODS = ("sum",)  # those of MERGE_METHODS
DTYPES = ("float32", "float16", "bfloat16")
EXAMPLES = {
    "inspect": ("shira inspect bluefire.safetensors", "shira inspect --json --all adapters/bluefire"),
    "verify": (
        "shira verify bluefire.safetensors --base stable-diffusion-v1-5/stable-diffusion-v1-5",
        "shira verify --json adapters/bluefire --base ./my-model",
    ),
    "fuse": (
        "shira fuse bluefire.safetensors paintings.safetensors -o mix.safetensors",
        "shira fuse a.safetensors b.safetensors --weights 0.8 0.4 -o mix.safetensors",
        "shira fuse a.safetensors b.safetensors --weights 0.5 --dtype float16 --json -o mixes/both",
    ),
    "convert": (
        "shira convert lora.safetensors --base ./my-model",
        "shira convert lora.safetensors --base ./my-model --density 0.05 --ranking layer --json -o style.safetensors",
        'shira convert peft-folder --base ./my-model --calibrated --prompt "a cat in zxc style"',
    ),
    "extract": (
        "shira extract ./my-model ./my-fine-tune -o tuned.safetensors",
        "shira extract ./my-model/unet ./my-fine-tune/unet --density 0.05 --json -o tuned.safetensors",
        "shira extract ./my-model fine-tune.safetensors --ranking layer -o tuned.safetensors",
    ),
    "demo": (
        "shira demo",
        'shira demo --prompt "a picture of a red apple" --seed 7 -o apple.png',
        "shira demo --json --base ./my-model --adapters ./my-adapters",
    ),
    "serve": (
        "shira serve",
        "shira serve ./my-model --adapters ./styles --keys keys.txt --port 8000 --json",
        "shira serve ./my-model --adapters s3://bucket/styles --device cuda --cuda-graphs --set max_steps=50",
    ),
    "export-onnx": (
        "shira export-onnx ./my-model exported",
        "shira export-onnx stable-diffusion-v1-5/stable-diffusion-v1-5 exported --dtype fp16 --json",
    ),
    **export_arguments.EXAMPLES,
}


def _without_strength(text: str) -> Path:
    path = text.rpartition("=")[0]
    if path and Path(path).exists() and not Path(text).exists():
        raise argparse.ArgumentTypeError(
            f"expected a file, got {text}; give strengths with --weights, in the order of the files"
        )
    return Path(text)


def parse(version: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; all that follows ``train`` is for the trainer's own parser, as ``flags``."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        return argparse.Namespace(command="train", flags=words[1:])
    return parser(version).parse_args(words)


def parser(version: str) -> argparse.ArgumentParser:
    """What parses the command line; ``command`` in its result is the subcommand's name."""
    whole = argparse.ArgumentParser(prog="shira", description="Sparse high rank adapters (SHiRA) for diffusers.")
    whole.add_argument("--version", action="version", version=f"shira_diffusers {version}")
    commands = whole.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    inspect = commands.add_parser("inspect", help="show what a file holds", description="Show what a file holds.")
    inspect.add_argument("file", metavar="FILE", type=Path, help="an adapter file, or a folder that holds one")
    _add_json(inspect)
    inspect.add_argument("--all", action="store_true", help="list all parameters; on a terminal only the first 20 are")

    verify = commands.add_parser(
        "verify",
        help="check that an adapter fits a base",
        description="Check names, shapes and base, apply the adapter, remove it and compare every bit.",
    )
    verify.add_argument("file", metavar="FILE", type=Path, help="an adapter file, or a folder that holds one")
    verify.add_argument("--base", required=True, help="a diffusers pipeline: a folder, or a Hub id")
    _add_json(verify)

    fuse = commands.add_parser("fuse", help="fuse adapters into one file", description="Fuse adapters into one file.")
    fuse.add_argument(
        "files", metavar="FILE", type=_without_strength, nargs="+", help="adapter files, or folders that hold one"
    )
    fuse.add_argument("-o", "--output", type=Path, required=True, help="a .safetensors file, or a folder for it")
    fuse.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one for each adapter, or one for all (1.0)"
    )
    fuse.add_argument("--method", choices=METHODS, default="sum", help="how to merge (%(default)s)")
    _add_output(fuse, "float32")

    convert = commands.add_parser(
        "convert",
        help="convert a LoRA to an adapter",
        description="Convert a LoRA (diffusers, kohya, PEFT): keep the top entries of its update of the weights, and "
        "report how much of the update's energy (squared norm) they hold.",
    )
    convert.add_argument("file", metavar="FILE", type=Path, help="a LoRA file, or the folder that it was saved to")
    convert.add_argument("--base", required=True, help="the diffusers pipeline that it is for: a folder, or a Hub id")
    convert.add_argument("-o", "--output", type=Path, help="a .safetensors file, or a folder (NAME-shira.safetensors)")
    _add_sparse(convert)
    convert.add_argument(
        "--calibrated",
        action="store_true",
        help="draw a few pictures to choose entries by what reaches them, and to correct their values",
    )
    convert.add_argument("--prompt", action="append", metavar="TEXT", help="to calibrate with; may be repeated")
    convert.add_argument(
        "--component", metavar="NAME", help="convert for this model of the pipeline only, such as text_encoder"
    )

    extract = commands.add_parser(
        "extract",
        help="extract an adapter from a fine-tuned model",
        description="Keep the top entries of what a fine-tuned model changes, reading both models weight by weight, "
        "and report how much of the difference's energy (squared norm) they hold.",
    )
    extract.add_argument("base", metavar="BASE", type=Path, help="a folder of diffusers, or a .safetensors file")
    extract.add_argument("tuned", metavar="TUNED", type=Path, help="the same model after training; folder or file")
    extract.add_argument("-o", "--output", type=Path, help="a .safetensors file, or a folder (NAME-shira.safetensors)")
    _add_sparse(extract)

    demo = commands.add_parser(
        "demo",
        help="draw styles side by side and time the switches",
        description="Draw a sheet, base | each style | the mix, and report how long switching took.",
    )
    demo.add_argument("--base", help="a diffusers pipeline (the bundled emoji-diffusion)")
    demo.add_argument("--adapters", type=Path, metavar="FOLDER", help="a folder of adapters (the bundled styles)")
    demo.add_argument("-o", "--output", type=Path, default=Path("shira-demo.png"), help="the sheet (%(default)s)")
    demo.add_argument("--prompt", action="append", metavar="TEXT", help="a row of the sheet; may be repeated")
    demo.add_argument("--seed", type=_whole(0, 2**32), default=0, help="of the first row (%(default)s)")
    demo.add_argument("--steps", type=_whole(1, 1000), default=20, help="of each picture (%(default)s)")
    _add_json(demo)

    _add_serve(commands)

    export = commands.add_parser(
        "export-onnx",
        help="export a pipeline for devices without torch",
        description="Write UNet, text encoder and VAE decoder for ONNX Runtime, where OnnxResident switches adapters.",
    )
    export.add_argument("base", metavar="BASE", help="a Stable Diffusion 1.x or 2.x pipeline: a folder, or a Hub id")
    export.add_argument("output", metavar="OUT", type=Path, help="the folder to write, a new one")
    export.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the weights (%(default)s)")
    _add_json(export)

    export_arguments.add_exports(commands)
    commands.add_parser("train", help="train an adapter from a few pictures (shira train --help)", add_help=False)
    for name, subparser in commands.choices.items():
        if name in EXAMPLES:
            _show_examples(subparser, *EXAMPLES[name])
    return whole


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="serve pictures over HTTP",
        description="Serve pictures of one model with any mix of many adapters, for many clients, by Ray Serve.",
    )
    serve.add_argument("model", metavar="MODEL", nargs="?", help="a diffusers pipeline (the bundled emoji-diffusion)")
    serve.add_argument("--adapters", metavar="FOLDER", help="or s3://..., hf://... (the bundled styles, read-only)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    serve.add_argument("--port", type=_whole(1, 65535), default=8000, help="port to listen on (%(default)s)")
    serve.add_argument("--keys", metavar="FILE", help="lines CLIENT:KEY or CLIENT:KEY:admin; without it all are admins")
    serve.add_argument("--replicas", type=_whole(1, 10_000), help="processes that draw (1)")
    serve.add_argument("--device", help="cpu or cuda (cpu)")
    serve.add_argument("--dtype", choices=DTYPES, help="of the weights (float32)")
    serve.add_argument(
        "--cuda-graphs",
        action="store_const",
        const=True,
        help="replay the kernels of a step: faster, with the same bits, and more memory",
    )
    serve.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting, see docs/serving.md"
    )
    serve.add_argument("--json", action="store_true", help="say the address as JSON when it is ready, for programs")


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="as JSON, for programs")


def _add_output(command: argparse.ArgumentParser, dtype: str) -> None:
    help_text = "of the values (%(default)s; float16 is half the size of float32, which is exact)"
    command.add_argument("--dtype", choices=DTYPES, default=dtype, help=help_text)
    command.add_argument("--force", action="store_true", help="replace an output that exists")
    _add_json(command)


def _add_sparse(command: argparse.ArgumentParser) -> None:
    command.add_argument("--density", type=float, default=0.02, metavar="D", help="fraction of entries (%(default)s)")
    command.add_argument(
        "--ranking",
        choices=("global", "layer"),
        default="global",
        help="keep that fraction of all weights together, or of each weight (%(default)s)",
    )
    _add_output(command, "float16")


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
