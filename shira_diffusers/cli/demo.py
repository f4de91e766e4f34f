"""Draw the styles of a folder side by side on one sheet, and time the switches between them: ``shira demo``."""

import argparse
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from shira_diffusers.atomic_write import write_atomically
from shira_diffusers.cli.base_model import fingerprints, open_pipeline
from shira_diffusers.cli.sheet import contact_sheet
from shira_diffusers.cli.terminal import note, say, say_json, table
from shira_diffusers.errors import ResidentStateError, ShiraError, counted, verb
from shira_diffusers.formats.paths import did_you_mean
from shira_diffusers.formats.shira_file import WEIGHTS_NAME
from shira_diffusers.integrations.pipelines import models_of, resident_of
from shira_diffusers.library.folder import adapters_in

ASSETS = Path(__file__).resolve().parents[2] / "assets"
BASE, ADAPTERS = ASSETS / "emoji-diffusion", ASSETS / "adapters"
PROMPTS = (  # of what no picture shows that the bundled styles were trained on; the last one calls the bundled subject
    "a picture of an owl on an orange background",
    "a picture of a teapot on a cyan background",
    "a picture of a dragon on a navy background",
    "a picture of a sks alien on a pink background",
)
GUIDANCE = 3.0
ROUNDS = 9
Mix = Mapping[str, float]
BUNDLED = frozenset({"bluefire", "gold", "paintings"})
MIX: Mix = {"bluefire": 1.0, "paintings": 1.0}
"""Of the bundled pairs, chosen by eye: both styles are seen, and what is drawn; the app opens with it."""


@dataclass(frozen=True, slots=True)
class Switch:
    """What one switch did: to which mix, in how long, and how many of all weights are other than the base's."""

    label: str
    first_ms: float
    again_ms: float
    entries: int
    total: int


def find_assets(base: str | None, adapters: Path | None) -> tuple[str, Path]:
    """What to open: as given, or else the model and the adapters that come with the source code.

    Raises:
        ShiraError: not given and not there.
    """
    defaults = (("--base FOLDER", base, BASE), ("--adapters FOLDER", adapters, ADAPTERS))
    missing = [(flag, path) for flag, given, path in defaults if given is None and not path.is_dir()]
    if missing:
        raise ShiraError(
            f"no folder {' and no folder '.join(str(path) for _, path in missing)}: the demo's files come with the "
            "source code, not with an installed package; install it with pip install -e . in a clone, or name your own "
            f"with {' and '.join(flag for flag, _ in missing)}"
        )
    return base or str(BASE), adapters or ADAPTERS


def check_output(path: Path) -> None:
    """Require that a PNG can be written there, before time is spent on drawing.

    Raises:
        ShiraError: another kind of file, a folder, or a folder that does not exist or takes no files.
    """
    if path.suffix.lower() != ".png":
        raise ShiraError(f"the sheet is a PNG: expected a name that ends in .png, got {path}")
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ShiraError(f"cannot write {path}: expected a file in a folder that exists")
    try:
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise ShiraError(f"cannot write {path}: {error.strerror}; name another place with -o") from error


def demo(args: argparse.Namespace) -> None:
    """Run the command: draw each prompt with the base, each adapter and their mix, write the sheet, and say the times.

    Raises:
        ShiraError: nothing to open, or an adapter that does not fit; nothing is written.
        ResidentStateError: a parameter is not bit-equal to the start after the last switch; nothing is written.
    """
    base, folder = find_assets(args.base, args.adapters)
    prompts = tuple(args.prompt or PROMPTS)
    check_output(args.output)
    files = _adapter_files(folder)
    note(f"loading {base}")
    pipe = open_pipeline(base)
    _load(pipe, files)
    before = fingerprints(models_of(pipe))
    columns = _columns(list(files))
    first: list[Switch] = []
    pictures: list[list[Image]] = []
    for number, (label, mix) in enumerate(columns, 1):
        first.append(_switch(pipe, label, mix))
        start = time.perf_counter()
        pictures.append(_draw(pipe, prompts, args.seed, args.steps))
        seconds = time.perf_counter() - start
        note(f"column {number} of {len(columns)}, {label}: {counted(len(prompts), 'picture')} in {seconds:.1f} s")
    switches = _again(pipe, columns, first)
    _require_restored(before, fingerprints(models_of(pipe)))
    note(f"all {counted(len(before), 'parameter')} {verb(len(before), 'is', 'are')} bit-equal to the start")
    rows = [[column[row] for column in pictures] for row in range(len(prompts))]
    buffer = io.BytesIO()
    contact_sheet([label for label, _ in columns], prompts, rows).save(buffer, "PNG", optimize=True)
    write_atomically(args.output, buffer.getvalue())
    _say_times(args, switches)


def _say_times(args: argparse.Namespace, switches: list[Switch]) -> None:
    """Say how long the switches took, one per column, the one back to the base last."""
    if args.json:
        return say_json({"output": str(args.output.resolve()), "switches": [asdict(switch) for switch in switches]})
    rows = [("switch to", "first time", "again", "weights changed")]
    for switch in switches:
        share = f"{100 * switch.entries / switch.total:.3f} %"
        rows.append((switch.label, f"{switch.first_ms:.2f} ms", f"{switch.again_ms:.2f} ms", share))
    say("\n".join(table(rows, right=(1, 2, 3))))
    say(f"wrote {args.output.resolve()}")


def _adapter_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ShiraError(f"no folder of adapters at {folder}; name one with --adapters{did_you_mean(folder)}")
    listed = adapters_in(folder)
    found = dict(listed)
    if not found:
        raise ShiraError(f"folder {folder} holds no adapters, expected NAME.safetensors or NAME/{WEIGHTS_NAME}")
    twice = [str(path) for name, path in listed if sum(name == other for other, _ in listed) > 1]
    if twice:
        raise ShiraError(f"each adapter needs a name of its own, got {' and '.join(twice)}; rename one of each name")
    return found


def _load(pipe: Any, files: Mapping[str, Path]) -> None:
    for name, path in files.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                pipe.load_shira(path, name, activate=False)
            except ShiraError as error:
                raise type(error)(f"{path}: {error}") from error
        for warning in caught:
            note(f"note: {warning.message}")


def _columns(names: list[str]) -> list[tuple[str, Mix]]:
    """Labels and mixes: the base, each adapter alone and a mix: the bundled pair where it is there, or else of all."""
    columns: list[tuple[str, Mix]] = [("base", {}), *((name, {name: 1.0}) for name in names)]
    if set(names) >= BUNDLED:
        columns.append((" + ".join(MIX), MIX))
    elif len(names) > 1:
        strength = round(len(names) ** -0.5, 1)  # deltas that are strangers to each other add up like noise
        columns.append((f"mix, {strength:g} each", dict.fromkeys(names, strength)))
    return columns


def _switch(pipe: Any, label: str, mix: Mix) -> Switch:
    start = time.perf_counter()
    pipe.set_shira(list(mix), list(mix.values()))
    milliseconds = 1000 * (time.perf_counter() - start)
    return Switch(label, milliseconds, milliseconds, *resident_of(pipe).changed())


def _again(pipe: Any, columns: list[tuple[str, Mix]], first: list[Switch]) -> list[Switch]:
    """The same switches in turn, several times over; the base comes last and stays."""
    order = [*range(1, len(columns)), 0]
    times: list[list[float]] = [[] for _ in columns]
    for _ in range(ROUNDS):
        for k in order:
            times[k].append(_switch(pipe, *columns[k]).first_ms)
    return [replace(first[k], again_ms=statistics.median(times[k])) for k in order]


def _draw(pipe: Any, prompts: tuple[str, ...], seed: int, steps: int) -> list[Image]:
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    result = pipe(list(prompts), num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators)
    return result.images


def _require_restored(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        raise ResidentStateError(
            f"{counted(len(changed), 'parameter', of=len(before))} {verb(len(changed), 'differs', 'differ')} from "
            f"the start: {changed[0]}, ..."
        )
