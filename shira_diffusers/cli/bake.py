"""Write a plain checkpoint with adapters in its weights: ``shira bake``."""

import argparse
import json

from shira_diffusers.cli.fuse import titles
from shira_diffusers.cli.progress_bar import progress_bar
from shira_diffusers.cli.terminal import note, printable, say
from shira_diffusers.errors import counted
from shira_diffusers.formats.opened_adapter import open_adapter
from shira_diffusers.integrations.bake import bake_checkpoint


def bake(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ShiraError, OSError: see ``bake_checkpoint``; nothing is written.
    """
    opened = [(open_adapter(file).decode(), strength) for file, strength in args.adapters]
    mix = dict(zip(titles([file for file, _ in args.adapters]), opened, strict=True))
    with progress_bar(desc="bake", unit="B", unit_scale=True) as progress:
        written = bake_checkpoint(args.base, mix, args.output, progress)
    for name in written.left_out:
        note(f"note: left out {printable(name)}, weights without the mix")
    for name in written.strangers:
        note(f"note: adapter {printable(name)} was trained on another model than {args.base}; expect poor pictures")
    strengths = {name: strength for name, (_, strength) in mix.items()}
    if args.json:
        facts = {"weights": written.weights, "files": written.files, "left_out": written.left_out}
        say(json.dumps({"output": str(written.output), "mix": strengths, **facts, "strangers": written.strangers}))
    else:
        mixed = ", ".join(f"{printable(name)} {strength:g}" for name, strength in strengths.items())
        changed = f"{counted(written.weights, 'weight')} in {counted(len(written.files), 'file')}"
        say(f"wrote {written.output}: {changed} changed by {mixed}")
