"""The pictures of a training, each with its caption beside it: one component for all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from app.page.style_picker import script

TEMPLATE = """
<p class="caption-count" role="status"></p>
<ul class="captions" aria-label="Pictures and their captions"></ul>
"""


def make_caption_list() -> gr.HTML:
    """The component; its value is a list of captions, in the order of the pictures."""
    return gr.HTML(
        [],
        label="Captions",
        html_template=TEMPLATE,
        js_on_load=script("caption_list"),
        apply_default_css=False,
        elem_id="train-pictures",
        visible=False,
        pictures=[],
    )


def showing(pictures: Sequence[tuple[str, Path]], captions: Sequence[str]) -> gr.HTML:
    """An update that shows uploaded pictures, by name and file; captions that were typed for them stay."""
    shown: list[dict[str, Any]] = [
        {"name": name, "src": f"gradio_api/file={quote(str(path))}"} for name, path in pictures
    ]
    return gr.HTML(list(captions), pictures=shown, visible=bool(shown))
