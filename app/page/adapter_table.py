"""The table of the library: one component for hundreds of adapters, with a filter and actions for each and for many."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from app.drawing.thumbnails import Thumbnails
from app.library.cards import Card
from app.library.library import Library
from app.page.style_picker import script, shown

COLUMNS = ("Name", "Mask", "Size", "Trigger words", "Origin")
TEMPLATE = f"""
<div class="table-head">
<input type="search" class="table-filter" placeholder="Filter adapters" aria-label="Filter adapters">
<span class="table-count" role="status"></span>
<button type="button" class="table-delete" hidden></button></div>
<div class="scroll" tabindex="0"><table><thead><tr><th scope="col"><input type="checkbox" class="table-all"
aria-label="Choose all that can be deleted"></th>{"".join(f'<th scope="col">{each}</th>' for each in COLUMNS)}
<th scope="col">Actions</th></tr></thead><tbody></tbody></table></div>
<p class="table-none" hidden>No adapters yet: upload one here, or train one.</p>
"""


def make_adapter_table(rows: Sequence[dict[str, Any]]) -> gr.HTML:
    """The component; its events are ``inspect``, ``download``, ``convert`` (name), ``rename`` (name, to), ``delete``
    (names).
    """
    return gr.HTML(
        html_template=TEMPLATE,
        js_on_load=script("adapter_table"),
        apply_default_css=False,
        elem_id="library-table",
        rows=list(rows),
    )


def rows_of(library: Library, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """What the component shows of all adapters; those that were left out with the reason."""
    first: dict[str, str] = {}
    return [_row(card, thumbnails, first.setdefault(card.sha256 or card.name, card.name)) for card in library.entries]


def _row(card: Card, thumbnails: Thumbnails, same: str) -> dict[str, Any]:
    """Of one adapter; ``same`` is the first one of its content, which may be itself."""
    density = f", {100 * card.density:.2g} %" if card.density else ""
    known = (f"{card.mask or 'unknown'}{density}", f"{card.megabytes:.2f} MB", f"“{card.trigger}”" * bool(card.trigger))
    left_out = "a LoRA; Convert makes an adapter of it" if card.lora else card.reason
    return {
        **(shown(card, thumbnails) if card.fits else {"name": card.name}),
        "cells": known if card.fits else (),
        "reason": "" if card.fits else f"Left out: {left_out}",
        "origin": card.origin,
        "yours": card.origin == "yours",
        "lora": card.lora,
        "twin": "" if same == card.name else f"The same file as “{same}”",
    }
