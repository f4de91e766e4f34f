"""The ``shira`` command: look into adapters, check them, fuse them, show what they do.

Exit status: 0 when all is well, 1 with one line of error on stderr, 2 for a command that cannot be understood.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from shira_diffusers import ShiraError, __version__
from shira_diffusers.demo import PROMPTS, find_assets, run_demo
from shira_diffusers.errors import AdapterMismatchError, counted
from shira_diffusers.fuse import MERGE_METHODS
from shira_diffusers.fusing import DTYPES, fuse_files
from shira_diffusers.inspection import SHORTENED, as_text, inspect_adapter
from shira_diffusers.terminal import note, one_line, printable, say, table
from shira_diffusers.verification import Verdict, verify_adapter


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a command that cannot be understood exits with 2 (SystemExit)."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ShiraError, OSError) as error:
        note(f"error: {one_line(error)}")
        return 1
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    return 0


def _inspect(args: argparse.Namespace) -> None:
    found = inspect_adapter(args.file)
    if args.json:
        say(json.dumps(found.as_dict(), indent=2))
    else:
        say(as_text(found, None if args.all or not sys.stdout.isatty() else SHORTENED))


def _verify(args: argparse.Namespace) -> None:
    def tell(verdict: Verdict) -> None:
        head, *offenders = verdict.finding.split("\n")
        say(f"{verdict.check:<9}{'ok' if verdict.passed else 'FAILED':<8}{printable(head)}")
        for offender in offenders:
            say(f"{'':17}{printable(offender.strip())}")

    if not verify_adapter(args.file, args.base, tell):
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
    switches = run_demo(base, adapters, args.output, seed=args.seed, steps=args.steps, prompts=prompts, tell=note)
    rows = [("switch to", "first time", "again", "weights changed")]
    for switch in switches:
        share = f"{100 * switch.entries / switch.total:.3f} %"
        rows.append((switch.label, f"{switch.first_ms:.2f} ms", f"{switch.again_ms:.2f} ms", share))
    say("\n".join(table(rows, right=(1, 2, 3))))
    say(f"wrote {args.output.resolve()}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shira", description="Sparse high rank adapters (SHiRA) for diffusers.")
    parser.add_argument("--version", action="version", version=f"shira_diffusers {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    inspect = commands.add_parser("inspect", help="tell what a file holds", description="Tell what a file holds.")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("file", metavar="FILE", type=Path, help="an adapter file, or a folder that holds one")
    inspect.add_argument("--json", action="store_true", help="as JSON, for programs")
    inspect.add_argument("--all", action="store_true", help="list all parameters; on a terminal only the first 20 are")

    verify = commands.add_parser(
        "verify",
        help="check that an adapter fits a base",
        description="Check names, shapes and base, apply the adapter, remove it and compare every bit.",
    )
    verify.set_defaults(run=_verify)
    verify.add_argument("file", metavar="FILE", type=Path, help="an adapter file, or a folder that holds one")
    verify.add_argument("--base", required=True, help="a diffusers pipeline: a folder, or a Hub id")

    fuse = commands.add_parser("fuse", help="fuse adapters into one file", description="Fuse adapters into one file.")
    fuse.set_defaults(run=_fuse)
    fuse.add_argument("files", metavar="FILE", type=Path, nargs="+", help="adapter files, or folders that hold one")
    fuse.add_argument("-o", "--output", type=Path, required=True, help="a .safetensors file, or a folder for it")
    fuse.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each adapter (1.0)")
    fuse.add_argument("--method", choices=sorted(MERGE_METHODS), default="sum", help="how to merge (%(default)s)")
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
        description="Draw a sheet, base | each style | the mix, and tell how long switching took.",
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--base", help="a diffusers pipeline (the bundled emoji-diffusion)")
    demo.add_argument("--adapters", type=Path, metavar="FOLDER", help="a folder of adapters (the bundled styles)")
    demo.add_argument("-o", "--output", type=Path, default=Path("shira-demo.png"), help="the sheet (%(default)s)")
    demo.add_argument("--prompt", action="append", metavar="TEXT", help="a row of the sheet; may be repeated")
    demo.add_argument("--seed", type=_whole(0, 2**32), default=0, help="of the first row (%(default)s)")
    demo.add_argument("--steps", type=_whole(1, 1000), default=20, help="of each picture (%(default)s)")
    return parser


def _whole(low: int, high: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not from {low} to {high}")
        return value

    return whole_number
