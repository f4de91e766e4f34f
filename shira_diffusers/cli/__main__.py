"""Run the ``shira`` command: inspect adapters, verify, fuse and demonstrate them, and export pipelines.

Exit status: 0 when all is well, 1 with one line of error on stderr, 2 for a command that cannot be understood.
"""

import argparse
from collections.abc import Sequence

from shira_diffusers import __version__
from shira_diffusers.cli.arguments import parser
from shira_diffusers.cli.demo import PROMPTS, find_assets, run_demo
from shira_diffusers.cli.export_onnx import export
from shira_diffusers.cli.fuse import DTYPES, fuse_files
from shira_diffusers.cli.inspect import inspect
from shira_diffusers.cli.run import run as run_command
from shira_diffusers.cli.terminal import note, printable, say, table
from shira_diffusers.cli.verify import Verdict, verify_adapter
from shira_diffusers.errors import AdapterMismatchError, counted
from shira_diffusers.formats.inspect import inspect_adapter


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a command that cannot be understood exits with 2 (SystemExit)."""
    return run(parser(__version__).parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed and return its exit status."""
    return run_command(args, _COMMANDS[args.command])


def _verify(args: argparse.Namespace) -> None:
    def report(verdict: Verdict) -> None:
        head, *offenders = verdict.finding.split("\n")
        say(f"{verdict.check:<9}{'ok' if verdict.passed else 'FAILED':<8}{printable(head)}")
        for offender in offenders:
            say(f"{'':17}{printable(offender.strip())}")

    if not verify_adapter(args.file, args.base, report):
        raise AdapterMismatchError(f"{args.file} does not fit {args.base}; use it with the model it was trained for")
    say(f"{args.file} fits {args.base}")


def _fuse(args: argparse.Namespace) -> None:
    written = fuse_files(
        args.files, args.output, weights=args.weights, method=args.method, dtype=DTYPES[args.dtype], force=args.force
    )
    found = inspect_adapter(written)
    say(
        f"wrote {written}: {counted(found.nnz, 'entry')} in "
        f"{counted(len(found.parameters), 'parameter')}, {counted(found.size, 'byte')}"
    )


def _demo(args: argparse.Namespace) -> None:
    base, adapters = find_assets(args.base, args.adapters)
    prompts = tuple(args.prompt or PROMPTS)
    switches = run_demo(base, adapters, args.output, seed=args.seed, steps=args.steps, prompts=prompts, report=note)
    rows = [("switch to", "first time", "again", "weights changed")]
    for switch in switches:
        share = f"{100 * switch.entries / switch.total:.3f} %"
        rows.append((switch.label, f"{switch.first_ms:.2f} ms", f"{switch.again_ms:.2f} ms", share))
    say("\n".join(table(rows, right=(1, 2, 3))))
    say(f"wrote {args.output.resolve()}")


_COMMANDS = {"inspect": inspect, "verify": _verify, "fuse": _fuse, "demo": _demo, "export-onnx": export}

if __name__ == "__main__":
    raise SystemExit(main())
