"""Define ``shira bake``, ``export-peft`` and ``diff``, which carry adapters elsewhere. Standard library only."""

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = {
    "bake": (
        "shira bake ./my-model bluefire.safetensors --output ./my-blue-model",
        "shira bake ./my-model bluefire.safetensors=0.7 paintings.safetensors=0.6 --output ./my-mix",
        "shira bake --json v1-5-pruned.safetensors bluefire.safetensors --output v1-5-bluefire.safetensors",
    ),
    "export-peft": (
        "shira export-peft style.safetensors --output ./style-peft",
        "shira export-peft llama-maths.safetensors --bare --json --output ./maths-peft",
        "shira export-peft all-layers.safetensors --partial --output ./linear-peft",
    ),
    "diff": (
        "shira diff bluefire.safetensors paintings.safetensors",
        "shira diff --json old/ new/",
    ),
}


def add_exports(commands: Any) -> None:
    """Add the subcommands and their flags to those of a parser."""
    _add_bake(commands)
    _add_export_peft(commands)
    _add_diff(commands)


def _add_bake(commands: Any) -> None:
    command: argparse.ArgumentParser = commands.add_parser(
        "bake",
        help="write a plain checkpoint with adapters in its weights",
        description="Copy a checkpoint with a mix of adapters in its weights, for programs that know no adapters.",
    )
    command.add_argument("base", metavar="BASE", type=Path, help="a diffusers folder, or a .safetensors checkpoint")
    command.add_argument(
        "adapters",
        metavar="ADAPTER[=STRENGTH]",
        type=_with_strength,
        nargs="+",
        help="adapter files, or folders that hold one, each with a strength (1.0)",
    )
    command.add_argument("-o", "--output", type=Path, required=True, help="a folder or file that does not exist yet")
    command.add_argument("--json", action="store_true", help="say what was written as JSON, for programs")


def _with_strength(text: str) -> tuple[Path, float]:
    path, _, strength = text.rpartition("=")
    try:
        return (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        if Path(path).exists() and not Path(text).exists():
            raise argparse.ArgumentTypeError(
                f"expected a number for the strength of {path}, got {strength!r}"
            ) from None
        return Path(text), 1.0  # a name with = in it


def _add_export_peft(commands: Any) -> None:
    command: argparse.ArgumentParser = commands.add_parser(
        "export-peft",
        help="write an adapter as PEFT's SHiRA tuner reads it",
        description="Write a folder for PeftModel.from_pretrained; of an adapter for several models one for each.",
    )
    command.add_argument("file", metavar="FILE", type=Path, help="an adapter file, or a folder that holds one")
    command.add_argument("-o", "--output", type=Path, required=True, help="a folder that does not exist yet")
    command.add_argument("--partial", action="store_true", help="leave out, by name, what PEFT cannot hold")
    command.add_argument(
        "--bare", action="store_true", help="names begin with no component, such as unet or transformer"
    )
    command.add_argument("--json", action="store_true", help="say what was written as JSON, for programs")


def _add_diff(commands: Any) -> None:
    command: argparse.ArgumentParser = commands.add_parser(
        "diff",
        help="show how two adapters differ",
        description="Show how two adapters differ: components, weights, shared entries, values and metadata.",
    )
    for name in ("a", "b"):
        command.add_argument(name, metavar=name.upper(), type=Path, help="an adapter file, or a folder that holds one")
    command.add_argument("--json", action="store_true", help="as JSON, for programs")
    command.add_argument("--all", action="store_true", help="list all weights; on a terminal only the first 20 are")
