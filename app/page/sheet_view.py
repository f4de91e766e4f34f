"""A sheet on the page: a table of pictures with labels, each of which opens large."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from app.server.served_files import address
from app.settings.sheets import Sheet

SCRIPT = Path(__file__).parent / "js" / "sheet_view.js"
TEMPLATE = """
<div class="sheet-tables"></div><p class="sheet-empty remark">Nothing drawn yet.</p>
<dialog aria-label="Picture"><img alt=""><p></p>
<div class="sheet-actions"><button type="button" class="sheet-before" aria-label="previous picture">←</button>
<button type="button" class="sheet-next" aria-label="next picture">→</button></div>
<button type="button" class="sheet-close" aria-label="close">×</button></dialog>
"""  # noqa: RUF001
ACTIONS = {"send": "Send to Mix", "more": "More like this"}


def make_sheet_view(elem_id: str, label: str) -> gr.HTML:
    """The component; its events ``send`` and ``more`` have the ``index`` of the picture that is large."""
    return gr.HTML(
        None,
        label=label,
        html_template=TEMPLATE,
        js_on_load=SCRIPT.read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=elem_id,
        elem_classes="sheet",
        actions=[{"event": event, "text": text} for event, text in ACTIONS.items()],
    )


def shown(sheet: Sheet, files: Sequence[Path]) -> dict[str, Any]:
    """The value of the component: what of a sheet was drawn so far."""
    captions = sheet.captions or ("",) * len(sheet.cells)
    drawn = zip(files, sheet.cells, captions, strict=False)
    return {
        "axes": sheet.axes,
        "columns": sheet.columns,
        "rows": sheet.rows,
        "tables": sheet.tables,
        "cells": [{"src": address(file), "label": label, "caption": caption} for file, (label, _), caption in drawn],
        "of": len(sheet.cells),
    }
