"""Extract an adapter file from a fine-tuned model: ``shira extract``."""

import argparse

from shira_diffusers.cli.convert import output_file, say_energy
from shira_diffusers.cli.fuse import DTYPES
from shira_diffusers.cli.progress_bar import progress_bar
from shira_diffusers.formats.shira_file import save_adapter
from shira_diffusers.integrations.extract import extract_adapter


def extract(args: argparse.Namespace) -> None:
    """Run the command: compare two models and write an adapter, whole or not at all.

    Raises:
        ShiraError: the output exists, or as ``extract_adapter``.
        OSError: a file cannot be read or written.
    """
    target = output_file(args.output, args.tuned, args.force, args.base)
    how = {"ranking": args.ranking, "dtype": DTYPES[args.dtype]}
    with progress_bar(unit="weights") as progress:
        found = extract_adapter(args.base, args.tuned, args.density, progress=progress, **how)
    say_energy(args, save_adapter(found.adapter, target), found.report)
