"""Endpoints for sheets: several prompts and seeds, or any settings over any values; a labelled picture and a zip."""

import asyncio
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api

from app.history.archive import write_sheet
from app.server.messages import readable
from app.server.served_files import file_data
from app.server.visitors import DRAWING, as_object, visitor_of
from app.settings.axes import Axis, sheet_of
from app.settings.checks import SettingsError, require_mapping
from app.settings.series import prompt_series, prompts_of
from app.settings.settings import Settings, require_settings
from app.settings.sheets import Sheet
from app.studio import Studio


def add_sheets_api(studio: Studio) -> None:
    """Add the endpoints to the Blocks that is being built."""
    session = studio.session
    out = gr.File(visible=False)

    async def drawn(sheet: Sheet, request: gr.Request) -> dict[str, Any]:
        for _, settings in sheet.cells:
            session.drawable(settings)
        done = [each async for each in studio.requests.draw_series(visitor_of(request), sheet.cells)]
        with tempfile.TemporaryDirectory() as folder:
            paths = [path for _, _, path in done]
            picture, archive = await asyncio.to_thread(write_sheet, sheet, paths, Path(folder))
            files = {"sheet": file_data(out, picture), "zip": file_data(out, archive)}
        pictures = [
            {"label": label, "file": file_data(out, path), "report": dict(picture.report)}
            for label, picture, path in done
        ]
        return {**files, "shared": sheet.shared, "pictures": pictures}

    async def series(
        request: gr.Request, prompts: Any, count: float = 1, seeds: str = "next", settings: Any = None
    ) -> dict[str, Any]:
        """Draw each prompt of a list (or of text with one per line) `count` times; at most 100 pictures.

        Seeds: "fixed" (the same for each prompt), "next" (each picture the next one) or "random" (as next, from a seed
        that is drawn). Settings: an object with mix, seed, steps and so on, as /generate takes them. Returns sheet (one
        labelled picture), zip, shared (what all have in common) and pictures: a list of {label, file, report}.
        """
        with readable():
            given = {"prompt": prompts_of(prompts)[0], **_known(settings)}
            return await drawn(prompt_series(Settings.checked(**given), prompts, count, seeds), request)

    async def sheet(request: gr.Request, settings: Any, axes: Any) -> dict[str, Any]:
        """Draw all combinations of one to three axes: across, down, and one table each; at most 100 pictures.

        Settings: an object with prompt, mix, seed, steps and so on, as /generate takes them. Axes: a list of {kind,
        values, style}. Kinds: strength (of the style named), style (each alone), words (the first are those in the
        prompt, in whose place the others come), prompt, negative, seed, steps, guidance, method, size ("128 x 192"),
        change, negative_mix. Values: a list, or text like "0, 0.5, 1" or "0 to 1 (5)". Returns as /series.
        """
        with readable():
            return await drawn(sheet_of(Settings.checked(**_known(settings)), _axes(axes)), request)

    api(series, api_name="series", **DRAWING)
    api(sheet, api_name="sheet", **DRAWING)


def _known(given: Any) -> Mapping[str, Any]:
    """Settings that there are; mix may be JSON text in turn. Raises SettingsError: one that there is not."""
    settings = dict(require_mapping("settings", as_object(given, "settings")))
    require_settings(settings)
    return {**settings, "mix": as_object(settings.get("mix"), "mix")}


def _axes(given: Any) -> list[Axis]:
    axes = as_object(given, "axes")
    if not isinstance(axes, list) or not 1 <= len(axes) <= 3:
        raise SettingsError('axes must be a list of one to three objects, like {"kind": "seed", "values": [1, 2]}')
    told = [require_mapping("axis", each) for each in axes]
    return [Axis.checked(each.get("kind"), each.get("values"), each.get("style")) for each in told]
