"""Run the ``shira`` command: inspect, verify, fuse, convert and export adapters, and demonstrate what they do.

Exit status: 0 when all is well, 1 with one line of error on stderr, 2 for a command that cannot be understood.
"""

import argparse
from collections.abc import Sequence

from shira_diffusers import __version__
from shira_diffusers.cli.arguments import parse
from shira_diffusers.cli.bake import bake
from shira_diffusers.cli.convert import convert
from shira_diffusers.cli.demo import demo
from shira_diffusers.cli.diff import diff
from shira_diffusers.cli.export_onnx import export
from shira_diffusers.cli.export_peft import export_peft
from shira_diffusers.cli.extract import extract
from shira_diffusers.cli.fuse import fuse_files
from shira_diffusers.cli.inspect import inspect
from shira_diffusers.cli.run import run as run_command
from shira_diffusers.cli.serve import serve
from shira_diffusers.cli.train import train
from shira_diffusers.cli.verify import verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a command that cannot be understood exits with 2 (SystemExit)."""
    args = parse(__version__, argv)
    return train(args.flags, "shira train") if args.command == "train" else run(args)


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed and return its exit status."""
    return run_command(args, _COMMANDS[args.command])


_COMMANDS = {
    "inspect": inspect,
    "verify": verify,
    "fuse": fuse_files,
    "convert": convert,
    "extract": extract,
    "demo": demo,
    "bake": bake,
    "export-peft": export_peft,
    "export-onnx": export,
    "diff": diff,
    "serve": serve,
}

if __name__ == "__main__":
    raise SystemExit(main())
