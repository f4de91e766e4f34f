"""Write an adapter as folders that PEFT loads: ``shira export-peft``."""

import argparse
import json
import re
from typing import Any

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.cli.terminal import note, printable, say
from shira_diffusers.errors import AdapterMismatchError, counted
from shira_diffusers.formats.opened_adapter import open_adapter
from shira_diffusers.formats.peft_export import rank_for_peft, save_peft_adapters, split_for_peft

_COMPONENTS = ("unet", "transformer", "prior", "text_encoder", "image_encoder", "controlnet", "vae")
_COMPONENT = re.compile(rf"({'|'.join(_COMPONENTS)})(_\d)?")


def export_peft(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        AdapterMismatchError: weights of components that are known, and others.
        ShiraError, OSError: see ``save_peft_adapter``.

    On error nothing is written.
    """
    parts = _parts(open_adapter(args.file).decode(), args.bare)
    left_out: list[str] = []
    if args.partial:
        split = {part: split_for_peft(adapter) for part, adapter in parts.items()}
        parts = {part: linear for part, (linear, _) in split.items() if linear.deltas}
        left_out = [f"{part}.{name}".removeprefix(".") for part, (_, rest) in split.items() for name in rest]
    folders = save_peft_adapters(parts, args.output)
    for name in left_out:
        note(f"note: left out {printable(name)}, which is no Linear layer's")
    facts: list[dict[str, Any]] = [
        {"folder": str(folder), "component": part, "r": rank_for_peft(parts[part]), "layers": len(parts[part].deltas)}
        for part, folder in folders.items()
    ]
    if args.json:
        say(json.dumps({"written": facts, "left_out": left_out}))
        return
    for fact in facts:
        of = f" of {printable(fact['component'])}" if fact["component"] else ""
        say(f"wrote {fact['folder']}: {counted(fact['layers'], 'layer')}{of}, r = {fact['r']}")


def _parts(adapter: ShiraAdapter, bare: bool) -> dict[str, ShiraAdapter]:
    """The part for each component; under an empty name an adapter of a bare module."""
    names = adapter.component_names()
    known = [name for name in names if _COMPONENT.fullmatch(name)]
    if bare or not known:
        return {"": adapter}
    if others := [name for name in names if name not in known]:
        raise AdapterMismatchError(
            f"names of the adapter begin with {', '.join(known)} and others with {', '.join(others)}, expected "
            f"components of {', '.join(_COMPONENTS)} alone; if all are layers of one model, add --bare, else export "
            f"one component after the other with save_peft_adapter(adapter.part({others[0]!r}), folder)"
        )
    return {name: adapter.part(name) for name in names}
