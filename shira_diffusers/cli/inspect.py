"""Print what an adapter file holds, as a report or as JSON: ``shira inspect``. Loads neither torch nor diffusers."""

import argparse
import sys

from shira_diffusers.cli.terminal import printable, say, say_json, table
from shira_diffusers.errors import counted
from shira_diffusers.formats.adapter_file import AdapterFile
from shira_diffusers.formats.block import Weight
from shira_diffusers.formats.inspect import inspect_adapter

SHORTENED = 20


_NO_SHAPES = "unknown: PEFT stores no shapes; run 'shira verify' with --base to check it against its base"


def inspect(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ShiraError, OSError: see ``inspect_adapter``.
    """
    found = inspect_adapter(args.file)
    if args.json:
        say_json(found.as_dict())
    else:
        say(as_text(found, None if args.all or not sys.stdout.isatty() else SHORTENED))


def as_text(found: AdapterFile, shown: int | None = None) -> str:
    """A report for people.

    Args:
        shown: how many parameters to list; None is all.
    """
    lines = [printable(str(found.path)), *(f"  {line}" for line in table(_summary(found)))]
    if found.metadata:
        pairs = [(printable(key), printable(value)) for key, value in sorted(found.metadata.items())]
        lines += ["", "metadata", *(f"  {line}" for line in table(pairs))]
    rows = [("density", "entries", "shape", "parameter"), *map(_row, found.parameters[:shown])]
    lines += ["", *table(rows, right=(0, 1))]
    left = len(found.parameters) - (len(rows) - 1)
    if left:
        lines.append(f"... and {counted(left, 'more parameter')}; list them with --all")
    return "\n".join(lines)


def written_line(found: AdapterFile) -> str:
    """What to say about a file that was just written."""
    return (
        f"wrote {found.path}: {counted(found.nnz, 'entry')} in "
        f"{counted(len(found.parameters), 'parameter')}, {counted(found.size, 'byte')}"
    )


def _summary(found: AdapterFile) -> list[tuple[str, ...]]:
    version = f", format version {found.format_version}" if found.format_version else ""
    each = "" if found.bytes_per_entry is None else f", {found.bytes_per_entry:.2f} bytes per entry"
    whole = "" if found.numel is None else f" of {found.numel:,}"
    probes = "a few values are kept, to recognise it" if found.tells_base else "no values are kept to recognise it"
    return [
        ("kind", found.kind + version),
        ("base model", printable(found.metadata.get("base_model", "unknown")) + f" ({probes})"),
        ("mask", printable(found.metadata.get("mask", "unknown"))),
        ("density", percent(found.density) if found.numel is not None else _NO_SHAPES),
        ("entries", f"{found.nnz:,}{whole} in {counted(len(found.parameters), 'parameter')}{_parts(found)}"),
        ("values", ", ".join(found.dtypes)),
        ("size", f"{counted(found.size, 'byte')}{each}"),
        ("checksum", checksum_finding(found)),
    ]


def checksum_finding(found: AdapterFile) -> str:
    """What the checksum says about a file; one whose tensors do not match it cannot be inspected at all."""
    if found.sha256 is None:
        return "none in this file, so values changed by damage go unnoticed"
    return f"SHA-256 of the tensors matches ({found.sha256[:16]}...); it does not cover the header"


def _parts(found: AdapterFile) -> str:
    """How many parameters each component has, for names that begin with one."""
    if found.format_version is None:
        return ""  # PEFT names layers of one model
    counts: dict[str, int] = {}
    for parameter in found.parameters:
        part = printable(parameter.name.partition(".")[0])
        counts[part] = counts.get(part, 0) + 1
    return f" ({', '.join(f'{part} {count}' for part, count in counts.items())})" if len(counts) <= 6 else ""


def _row(parameter: Weight) -> tuple[str, ...]:
    shape = "?" if parameter.shape is None else " x ".join(map(str, parameter.shape))
    density = "?" if parameter.density is None else percent(parameter.density)
    return density, f"{parameter.nnz:,}", shape, printable(parameter.name)


def percent(fraction: float | None) -> str:
    """A fraction as per cent, with three digits after the point."""
    return "0.000 %" if fraction is None else f"{100 * fraction:.3f} %"
