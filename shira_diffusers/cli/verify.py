"""Try out whether an adapter fits a base: ``shira verify``."""

import argparse
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.cli.base_model import fingerprints, open_pipeline
from shira_diffusers.cli.inspect import checksum_finding
from shira_diffusers.cli.terminal import printable, say, say_json
from shira_diffusers.engine.resident import Resident
from shira_diffusers.errors import AdapterMismatchError, counted, listing, verb
from shira_diffusers.formats.opened_adapter import open_adapter
from shira_diffusers.integrations.pipelines import models_of, resident_of
from shira_diffusers.weights.finder import WeightMap

NAME = "adapter"
_MATCHES = {
    "same": "same: it was trained on this base",
    "sibling": "sibling: it was trained on a relative of this base, such as a fine-tune; expect it to work",
    "other": "other: it was trained on another model, which only has the same shapes",
    None: "unknown: the file keeps no base values to compare",
}


class Verdict(NamedTuple):
    """The outcome of one check: what was checked, whether it passed, and the finding."""

    check: str
    passed: bool
    finding: str


Report = Callable[[str, bool, str], None]
"""Takes what a ``Verdict`` holds, as soon as it is known."""


def verify(args: argparse.Namespace) -> None:
    """Run the command: check that an adapter fits a base, and that every bit is as it was once it is removed.

    Raises:
        OSError, AdapterFormatError: the adapter cannot be read.
        AdapterMismatchError: a check has failed.
        ShiraError: the base cannot be loaded, or its weights cannot be overwritten.
    """
    verdicts: list[Verdict] = []

    def report(check: str, passed: bool, finding: str) -> None:
        verdicts.append(Verdict(check, passed, finding))
        if not args.json:
            _say(verdicts[-1])

    _verify(args.file, args.base, report)
    fits = all(verdict.passed for verdict in verdicts)
    if args.json:
        say_json({"fits": fits, "checks": [verdict._asdict() for verdict in verdicts]})
    if not fits:
        raise AdapterMismatchError(f"{args.file} does not fit {args.base}; use it with the model it was trained for")
    if not args.json:
        say(f"{args.file} fits {args.base}")


def _say(verdict: Verdict) -> None:
    head, *offenders = verdict.finding.split("\n")
    say(f"{verdict.check:<9}{'ok' if verdict.passed else 'FAILED':<8}{printable(head)}")
    for offender in offenders:
        say(f"{'':17}{printable(offender.strip())}")


def _verify(path: Path, base: str, report: Report) -> None:
    """Make all checks; those that cannot be made after a failure are left out."""
    found = open_adapter(path)
    found.check()
    entries, parameters = counted(found.nnz, "entry"), counted(len(found.parameters), "parameter")
    report("file", True, f"{found.kind}, {entries} in {parameters}")
    report("checksum", True, checksum_finding(found))
    pipe = open_pipeline(base)
    models, resident = models_of(pipe), resident_of(pipe)
    adapter = found.decode(models=models)
    strangers, misshapen = _misfits(adapter, models)
    total = len(adapter.deltas)
    report("names", not strangers, _finding(strangers, total, f"in this {type(pipe).__name__}"))
    report("shapes", not misshapen, _finding(misshapen, total - len(strangers), "shaped as in the base"))
    if strangers or misshapen:
        return
    match = resident.check(adapter)
    report("base", match != "other", _MATCHES[match])
    before = fingerprints(models)
    report("apply", *_apply(adapter, resident))
    resident.clear()
    after = fingerprints(models)
    changed = [name for name in before if before[name] != after[name]]
    report("restore", not changed, _finding(changed, len(before), "bit-equal after removal"))


def _misfits(adapter: ShiraAdapter, models: Mapping[str, nn.Module]) -> tuple[list[str], list[str]]:
    """Parameters that the base does not have, and those that have another shape there."""
    maps = {part: WeightMap(model) for part, model in models.items()}
    strangers, misshapen = [], []
    for full_name, delta in adapter.deltas.items():
        part, _, name = full_name.partition(".")
        if part not in maps:
            strangers.append(f"{full_name}: no component {part!r}, there are {', '.join(models)}")
            continue
        try:
            shape = tuple(maps[part][name].shape)
        except AdapterMismatchError as error:
            strangers.append(f"{part}.{error}")
            continue
        if shape != delta.shape:
            misshapen.append(f"{full_name}: expected {shape}, got {delta.shape}")
    return strangers, misshapen


def _finding(offenders: list[str], total: int, fine: str) -> str:
    if offenders:
        return (
            f"{counted(len(offenders), 'parameter', of=total)} {verb(len(offenders), 'is', 'are')} not {fine}:"
            f"{listing(offenders)}"
        )
    return f"all {counted(total, 'parameter')} {fine}"


def _apply(adapter: ShiraAdapter, resident: Resident) -> tuple[bool, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of another base, which is a verdict of its own
        resident.add(adapter, NAME)
    start = time.perf_counter()
    resident.set({NAME: 1.0})
    milliseconds = 1000 * (time.perf_counter() - start)
    entries, total = resident.changed()
    finding = (
        f"{entries:,} entries overwritten, {100 * entries / total:.3f} % of the pipeline, in {milliseconds:.1f} ms"
    )
    return entries > 0, finding
