"""Try out whether an adapter fits a base: ``shira verify``."""

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.cli.base_model import fingerprints, open_pipeline
from shira_diffusers.cli.inspect import checksum_finding
from shira_diffusers.engine.resident import Resident
from shira_diffusers.errors import AdapterMismatchError, counted, listing, verb
from shira_diffusers.formats.adapter_file import AdapterFile
from shira_diffusers.formats.inspect import inspect_adapter
from shira_diffusers.formats.shira_file import load_adapter
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


def verify_adapter(path: Path, base: str, report: Callable[[Verdict], None]) -> bool:
    """Check that an adapter fits a base, and that applying and removing it leaves every bit as it was.

    Args:
        path: a file or a folder, PEFT's SHiRA folders too.
        base: a diffusers folder or a Hub id.
        report: called with each verdict as soon as it is known.

    Returns:
        Whether all checks passed. Checks that cannot be made after a failure are left out.

    Raises:
        OSError, AdapterFormatError: the adapter cannot be read.
        ShiraError: the base cannot be loaded, or its weights cannot be overwritten.
    """
    passed = True

    def note(check: str, ok: bool, finding: str) -> None:
        nonlocal passed
        passed &= ok
        report(Verdict(check, ok, finding))

    found = inspect_adapter(path)
    note("file", True, f"{found.kind}, {counted(found.nnz, 'entry')} in {counted(len(found.parameters), 'parameter')}")
    note("checksum", True, checksum_finding(found))
    pipe = open_pipeline(base)
    models, resident = models_of(pipe), resident_of(pipe)
    adapter = _read(found, pipe, path)
    strangers, misshapen = _misfits(adapter, models)
    total = len(adapter.deltas)
    note("names", not strangers, _finding(strangers, total, f"in this {type(pipe).__name__}"))
    note("shapes", not misshapen, _finding(misshapen, total - len(strangers), "shaped as in the base"))
    if not passed:
        return False
    match = resident.check(adapter)
    note("base", match != "other", _MATCHES[match])
    before = fingerprints(models)
    note("apply", *_apply(adapter, resident))
    resident.clear()
    after = fingerprints(models)
    changed = [name for name in before if before[name] != after[name]]
    note("restore", not changed, _finding(changed, len(before), "bit-equal after removal"))
    return passed


def _read(found: AdapterFile, pipe: Any, path: Path) -> ShiraAdapter:
    """The adapter with component names; PEFT's needs the model for its shapes."""
    if found.format_version is not None:
        return load_adapter(found.path)
    pipe.load_shira(path, NAME, activate=False)
    adapter = resident_of(pipe).adapter(NAME)
    pipe.unload_shira()
    return adapter


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
