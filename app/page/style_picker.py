"""The list of styles: one component for all of them, so that hundreds are as quick as three."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from app.drawing.thumbnails import Thumbnails
from app.library.cards import Card
from app.server.served_files import address
from app.settings.strengths import MAX_STRENGTH, MIN_STRENGTH, Mix

SCRIPTS = Path(__file__).parent / "js"
TEMPLATE = """
<div class="picker-head">
<input type="search" class="picker-filter" placeholder="Filter styles" aria-label="Filter styles">
<span class="picker-count" role="status"></span>
<span class="picker-keys" aria-hidden="true">↑ ↓ other styles</span>
<button type="button" class="picker-clear">all off</button></div>
<ul class="picker-cards" aria-label="Styles; the arrow keys lead from one to the next"></ul>
<button type="button" class="picker-more" hidden></button>
<p class="picker-lost" hidden>No style has this in its name or words.</p>
<p class="picker-none" hidden>No styles yet: no file in the adapters folder fits. Add some in Library or Train.</p>
"""
PAGE = 24  # cards that are shown before somebody asks for more; those that are on always are
BLOCKED = ("unet",)  # components whose strength can differ by block


def make_style_picker(cards: Sequence[dict[str, Any]], mix: Mix) -> gr.HTML:
    """The component; its value is a mix ``{name: strength}``, its events are ``input``, ``words`` and ``gone``.

    ``input`` comes only while the property ``live`` is true; ``gone`` has the names of styles that left the mix.
    """
    return gr.HTML(
        mix,
        label="Styles",
        html_template=TEMPLATE,
        js_on_load=script("style_picker"),
        apply_default_css=False,
        elem_id="style-picker",
        cards=list(cards),
        limits=[MIN_STRENGTH, MAX_STRENGTH],
        blocked=list(BLOCKED),
        page=PAGE,
        live=False,
    )


def script(name: str) -> str:
    """JavaScript of a component, behind what components share."""
    return "".join((SCRIPTS / f"{each}.js").read_text(encoding="utf-8") for each in ("make", name))


def shown(card: Card, thumbnails: Thumbnails) -> dict[str, Any]:
    """What the component shows of a card."""
    path = thumbnails.get(card)
    return {
        "name": card.name,
        "was": list(card.was),
        "trigger": card.trigger,
        "facts": f"{100 * card.density:.2g} % · {card.megabytes:.2g} MB"
        if card.density
        else f"{card.megabytes:.2g} MB",
        "note": card.note,
        "components": list(card.components),
        "thumbnail": address(path) if path else "",
    }
