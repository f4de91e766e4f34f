"""Print how two adapter files differ, as a report or as JSON: ``shira diff``. Loads neither torch nor diffusers."""

import argparse
import sys
from collections.abc import Sequence

from shira_diffusers.cli.inspect import SHORTENED, percent
from shira_diffusers.cli.terminal import printable, say, say_json, table
from shira_diffusers.errors import counted
from shira_diffusers.formats.compare import AdapterDifference, EntryDifference, compare_adapters


def diff(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ShiraError, OSError: see ``compare_adapters``.
    """
    found = compare_adapters(args.a, args.b)
    if args.json:
        say_json(found.as_dict())
    else:
        say(as_text(found, None if args.all or not sys.stdout.isatty() else SHORTENED))


def as_text(found: AdapterDifference, shown: int | None = None) -> str:
    """A report for people.

    Args:
        shown: how many weights to list; None is all.
    """
    lines = [f"A  {printable(found.files[0])}", f"B  {printable(found.files[1])}", "", *table(_summary(found))]
    if found.metadata:
        pairs = [("metadata", "A", "B"), *((key, *values) for key, values in found.metadata.items())]
        lines += ["", *table([[printable(cell or "-") for cell in pair] for pair in pairs])]
    rows = _rows(found)
    if rows:
        head = ("entries A", "entries B", "shared", "sign conflict", "distance", "weight")
        lines += ["", *table([head, *rows[:shown]], right=(0, 1, 2, 3, 4))]
    if shown is not None and len(rows) > shown:
        lines.append(f"... and {counted(len(rows) - shown, 'more weight')}; list them with --all")
    return "\n".join(lines)


def _summary(found: AdapterDifference) -> list[tuple[str, str]]:
    whole = found.whole.as_dict()
    (first, second), (one, other) = whole["entries"], whole["norms"]
    weights = f"{len(found.weights)} in both, {len(found.only[0])} only in A, {len(found.only[1])} only in B"
    differ = f", {len(found.shapes)} of another shape" if found.shapes else ""
    return [
        ("result", "the same weights" if found.same_weights else "other weights"),
        ("components", " and ".join(printable(", ".join(names)) for names in _once(found.components))),
        ("weights", weights + differ),
        (
            "entries",
            f"{first:,} and {second:,}, {whole['shared']:,} shared ({percent(whole['overlap'])} of the smaller)",
        ),
        ("values", f"{whole['equal']:,} of the shared are equal, {percent(whole['sign_conflict'])} differ in sign"),
        ("distance", f"{whole['distance']:.6g}, between adapters of norms {one:.6g} and {other:.6g}"),
    ]


def _once(pair: tuple[list[str], list[str]]) -> Sequence[list[str]]:
    return pair[:1] if pair[0] == pair[1] else pair


def _rows(found: AdapterDifference) -> list[tuple[str, ...]]:
    """A row per weight that differs, sorted by name."""
    rows = {name: _row(name, each) for name, each in found.weights.items() if not each.is_none}
    for mark, names in zip(("only in A", "only in B"), found.only, strict=True):
        rows |= {name: ("", "", "", "", "", f"{printable(name)} ({mark})") for name in names}
    for name, shapes in found.shapes.items():
        one, other = (" x ".join(map(str, shape)) for shape in shapes)
        rows[name] = ("", "", "", "", "", f"{printable(name)} ({one} in A, {other} in B)")
    return [rows[name] for name in sorted(rows)]


def _row(name: str, each: EntryDifference) -> tuple[str, ...]:
    figures = each.as_dict()
    counts = (f"{count:,}" for count in (*figures["entries"], figures["shared"]))
    return (*counts, percent(figures["sign_conflict"]), f"{figures['distance']:.4g}", printable(name))
