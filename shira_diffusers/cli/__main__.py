"""Run the ``shira`` command: inspect, verify, fuse, convert and export adapters, and demonstrate what they do.

Exit status: 0 when all is well, 1 with one line of error on stderr, 2 for a command that cannot be understood.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shira_diffusers import __version__
from shira_diffusers.cli.arguments import parse
from shira_diffusers.cli.bake import bake
from shira_diffusers.cli.convert import CALIBRATION_PROMPTS, convert_file, energy_table
from shira_diffusers.cli.demo import PROMPTS, find_assets, run_demo
from shira_diffusers.cli.diff import diff
from shira_diffusers.cli.export_onnx import export
from shira_diffusers.cli.export_peft import export_peft
from shira_diffusers.cli.extract import extract_file
from shira_diffusers.cli.fuse import DTYPES, fuse_files
from shira_diffusers.cli.inspect import inspect, written_line
from shira_diffusers.cli.run import run as run_command
from shira_diffusers.cli.serve import serve
from shira_diffusers.cli.terminal import note, printable, say, say_json, table
from shira_diffusers.cli.train import train
from shira_diffusers.cli.verify import Verdict, verify_adapter
from shira_diffusers.errors import AdapterMismatchError
from shira_diffusers.formats.inspect import inspect_adapter
from shira_diffusers.masks.sparsify import EnergyReport


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a command that cannot be understood exits with 2 (SystemExit)."""
    args = parse(__version__, argv)
    return train(args.flags, "shira train") if args.command == "train" else run(args)


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed and return its exit status."""
    return run_command(args, _COMMANDS[args.command])


def _verify(args: argparse.Namespace) -> None:
    verdicts: list[Verdict] = []

    def report(verdict: Verdict) -> None:
        verdicts.append(verdict)
        if args.json:
            return
        head, *offenders = verdict.finding.split("\n")
        say(f"{verdict.check:<9}{'ok' if verdict.passed else 'FAILED':<8}{printable(head)}")
        for offender in offenders:
            say(f"{'':17}{printable(offender.strip())}")

    fits = verify_adapter(args.file, args.base, report)
    if args.json:
        say_json({"fits": fits, "checks": [verdict._asdict() for verdict in verdicts]})
    if not fits:
        raise AdapterMismatchError(f"{args.file} does not fit {args.base}; use it with the model it was trained for")
    if not args.json:
        say(f"{args.file} fits {args.base}")


def _fuse(args: argparse.Namespace) -> None:
    written = fuse_files(
        args.files, args.output, weights=args.weights, method=args.method, dtype=DTYPES[args.dtype], force=args.force
    )
    found = inspect_adapter(written)
    if args.json:
        return say_json({"output": str(written), "entries": found.nnz, "bytes": found.size})
    say(written_line(found))


def _convert(args: argparse.Namespace) -> None:
    dtype = DTYPES[args.dtype]
    given = {"density": args.density, "ranking": args.ranking, "dtype": dtype, "force": args.force}
    prompts = tuple(args.prompt or CALIBRATION_PROMPTS) if args.calibrated or args.prompt else ()
    written, report = convert_file(
        args.file, args.base, args.output, prompts=prompts, component=args.component, **given
    )
    _say_energy(args, written, report)


def _extract(args: argparse.Namespace) -> None:
    dtype = DTYPES[args.dtype]
    given = {"density": args.density, "ranking": args.ranking, "dtype": dtype, "force": args.force}
    _say_energy(args, *extract_file(args.base, args.tuned, args.output, **given))


def _say_energy(args: argparse.Namespace, written: Path, report: EnergyReport) -> None:
    found = inspect_adapter(written)
    effect = {name: float(value) for name, value in found.metadata.items() if name == "effect_kept"}
    if args.json:
        return say_json({"output": str(written), "bytes": found.size, **effect, **report.as_dict()})
    say("\n".join(energy_table(report)))
    for share in effect.values():
        say(f"kept of the update's effect on the calibration pictures' activations: {100 * share:.1f} %")
    say(written_line(found))


def _demo(args: argparse.Namespace) -> None:
    base, adapters = find_assets(args.base, args.adapters)
    prompts = tuple(args.prompt or PROMPTS)
    switches = run_demo(base, adapters, args.output, seed=args.seed, steps=args.steps, prompts=prompts, report=note)
    if args.json:
        return say_json({"output": str(args.output.resolve()), "switches": [asdict(switch) for switch in switches]})
    rows = [("switch to", "first time", "again", "weights changed")]
    for switch in switches:
        share = f"{100 * switch.entries / switch.total:.3f} %"
        rows.append((switch.label, f"{switch.first_ms:.2f} ms", f"{switch.again_ms:.2f} ms", share))
    say("\n".join(table(rows, right=(1, 2, 3))))
    say(f"wrote {args.output.resolve()}")


_COMMANDS = {
    "inspect": inspect,
    "verify": _verify,
    "fuse": _fuse,
    "convert": _convert,
    "extract": _extract,
    "demo": _demo,
    "bake": bake,
    "export-peft": export_peft,
    "export-onnx": export,
    "diff": diff,
    "serve": serve,
}

if __name__ == "__main__":
    raise SystemExit(main())
