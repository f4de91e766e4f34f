"""Convert a LoRA to an adapter file: ``shira convert``."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from shira_diffusers.cli.base_model import open_pipeline
from shira_diffusers.cli.fuse import DTYPES, new_file
from shira_diffusers.cli.inspect import written_line
from shira_diffusers.cli.progress_bar import progress_bar
from shira_diffusers.cli.terminal import say, say_json, table
from shira_diffusers.formats.find import PEFT_WEIGHTS, find_lora
from shira_diffusers.formats.inspect import inspect_adapter
from shira_diffusers.formats.lora import convert_lora
from shira_diffusers.formats.shira_file import save_adapter
from shira_diffusers.masks.sparsify import DENSITIES, Energy, EnergyReport, require_density

CALIBRATION_PROMPTS = ("a picture of a cat", "a portrait of a woman", "a red car on a street", "a house by a lake")
_STEPS = 8


def convert(args: argparse.Namespace) -> None:
    """Run the command: read a LoRA, convert it and write an adapter, whole or not at all.

    Raises:
        ShiraError: the output exists, the base cannot be loaded, or as ``convert_lora``.
        OSError: a file cannot be read or written.
    """
    require_density(args.density)
    # before the base is loaded, which takes long
    target = output_file(args.output, find_lora(args.file), args.force, Path(args.base))
    prompts = args.prompt or (CALIBRATION_PROMPTS if args.calibrated else ())
    pipe = open_pipeline(args.base)
    with progress_bar(unit="weights") as progress:
        found = convert_lora(
            args.file,
            pipe,
            args.density,
            ranking=args.ranking,
            calibration=calibration_of(pipe, prompts) if prompts else None,
            dtype=DTYPES[args.dtype],
            component=args.component,
            progress=progress,
        )
    say_energy(args, save_adapter(found.adapter.with_metadata(base_model=args.base), target), found.report)


def calibration_of(pipe: Any, prompts: Sequence[str]) -> Callable[[], None]:
    """Draw pictures of prompts, the same ones each time, and keep none of them."""

    def draw() -> None:
        for seed, prompt in enumerate(prompts):
            generator = torch.Generator("cpu").manual_seed(seed)
            pipe(prompt, num_inference_steps=_STEPS, generator=generator, output_type="latent")

    return draw


def output_file(output: Path | None, source: Path, force: bool, *others: Path) -> Path:
    """The file to write: what the user asks for, or ``NAME-shira.safetensors`` here, after what it is made from.

    Args:
        others: files and folders that it is made from too.

    Raises:
        ShiraError: as ``new_file``.
    """
    path = (source.parent if source.name == PEFT_WEIGHTS else source).resolve()
    name = path.stem if path.is_file() else path.name
    return new_file(output or Path(f"{name}-shira.safetensors"), force, source, *others)


def say_energy(args: argparse.Namespace, written: Path, report: EnergyReport) -> None:
    """Say what of an update a file that was just written keeps."""
    found = inspect_adapter(written)
    effect = {name: float(value) for name, value in found.metadata.items() if name == "effect_kept"}
    if args.json:
        return say_json({"output": str(written), "bytes": found.size, **effect, **report.as_dict()})
    say("\n".join(_energy_table(report)))
    for share in effect.values():
        say(f"kept of the update's effect on the calibration pictures' activations: {100 * share:.1f} %")
    say(written_line(found))


def _energy_table(report: EnergyReport) -> list[str]:
    """A report as lines for people: what is kept, and what each density would keep."""
    head = ("", "entries", "density", "energy kept", *(f"at {100 * density:g} %" for density in DENSITIES))
    rows = [(part, energy) for part, energy in report.components.items() if part]
    cells = [_cells(part, energy) for part, energy in [*rows, ("total", report.total)]]
    return table([head, *cells], right=tuple(range(1, len(head))))


def _cells(part: str, energy: Energy) -> tuple[str, ...]:
    shares = (energy.entries / energy.numel, energy.kept, *energy.at.values())
    return (part, f"{energy.entries:,}", *(f"{100 * share:.1f} %" for share in shares))
