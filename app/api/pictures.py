"""Endpoints for pictures: one, several that belong together, presets and the history; and what is loaded."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api

from app.drawing.requests import Series
from app.drawing.restore import restore, to_keep
from app.drawing.session import series_of
from app.history.history import page_of
from app.server.messages import readable
from app.server.served_files import file_data
from app.server.visitors import DRAWING, as_object, visitor_of
from app.settings.axes import Axis, sheet_of
from app.settings.checks import SettingsError, require_mapping, whole
from app.settings.settings import (
    DEFAULT_CHANGE,
    DEFAULT_GUIDANCE,
    DEFAULT_METHOD,
    DEFAULT_NEGATIVE_MIX,
    DEFAULT_STEPS,
    require_settings,
)
from app.settings.strengths import checked_mix
from app.studio import Studio

REPORTED = ("model", "adapters", "version", "switch_ms", "entries_changed", "share_changed", "generation_s")
"""What a picture's report has beside its settings."""


def add_api(studio: Studio) -> None:
    """Add the endpoints to the Blocks that is being built."""
    session = studio.session
    paper = gr.Image(format="png", type="pil", visible=False)

    def adapters() -> dict[str, Any]:
        """What is loaded: the model, its adapters by name with their metadata, and files left out with the reason."""
        return {
            "model": session.model,
            "adapters": {card.name: card.as_dict() for card in session.cards},
            "refused": dict(session.library.refused),
        }

    async def generate(
        request: gr.Request,
        prompt: str,
        mix: Any = None,
        seed: float | None = None,
        steps: float = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        method: str = DEFAULT_METHOD,
        negative: str = "",
        width: float = 0,
        height: float = 0,
        start_image: str = "",
        change: float = DEFAULT_CHANGE,
        negative_mix: float = DEFAULT_NEGATIVE_MIX,
    ) -> tuple[gr.FileData, dict[str, Any]]:
        """Draw one picture with a mix of adapters; returns its file and a report."""
        with readable():
            more = (negative, width, height, start_image, change, negative_mix)
            settings = session.checked(prompt, as_object(mix, "mix"), seed, steps, guidance, method, *more)
            picture, file = await studio.requests.draw(visitor_of(request), settings)
        return file_data(paper, file), dict(picture.report)  # type: ignore[return-value]

    def add_start_image(file: str | None) -> str:
        """Keep a picture to start from; returns its name for start_image, which is the SHA-256 of its pixels as PNG."""
        with readable("the picture could not be taken in"):
            if not file:
                raise SettingsError(f"there is no picture to start from: send a file, got {file!r}")
            return session.starts.add(Path(file))

    # files go through components, which take those that the client has uploaded, and no other path
    start, name = gr.File(type="filepath", label="file", visible=False), gr.Textbox(label="start_image", visible=False)
    gr.Button(visible=False).click(add_start_image, start, name, api_name="add_start_image")
    api(adapters, api_name="adapters")
    api(generate, api_name="generate", **DRAWING)


def add_pictures_api(studio: Studio) -> None:
    """Add the endpoints to the Blocks that is being built."""
    session = studio.session
    paper = gr.Image(format="png", type="pil", visible=False)

    async def drawn(series: Series, request: gr.Request) -> list[dict[str, Any]]:
        pictures = studio.requests.draw_series(visitor_of(request), series)
        return [
            {"label": label, "file": file_data(paper, file), "report": dict(picture.report)}
            async for label, picture, file in pictures
        ]

    async def compare(
        request: gr.Request,
        prompt: str,
        mix: Any = None,
        seed: float | None = None,
        steps: float = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        method: str = DEFAULT_METHOD,
        negative: str = "",
        width: float = 0,
        height: float = 0,
        start_image: str = "",
        change: float = DEFAULT_CHANGE,
        negative_mix: float = DEFAULT_NEGATIVE_MIX,
    ) -> list[dict[str, Any]]:
        """Draw the base, each style of a mix alone and the mix, at one seed: a list of {label, file, report}."""
        with readable():
            more = (negative, width, height, start_image, change, negative_mix)
            settings = session.checked(prompt, as_object(mix, "mix"), seed, steps, guidance, method, *more)
            return await drawn(series_of(settings), request)

    async def sweep(
        request: gr.Request,
        prompt: str,
        adapter: str,
        strengths: Any,
        other: str | None = None,
        other_strengths: Any = None,
        mix: Any = None,
        seed: float | None = None,
        steps: float = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        method: str = DEFAULT_METHOD,
        negative: str = "",
        width: float = 0,
        height: float = 0,
        start_image: str = "",
        change: float = DEFAULT_CHANGE,
        negative_mix: float = DEFAULT_NEGATIVE_MIX,
    ) -> list[dict[str, Any]]:
        """Draw a style at a list of strengths, at one seed, beside the rest of a mix: a list of {label, file, report}.

        With another style and its strengths, a grid, row by row: the first style changes across, the other down.

        Args:
            adapter: Its name.
            strengths: Of it, a list of numbers like [0, 0.5, 1], or its JSON text.
            other: Another adapter's name, for a grid.
            other_strengths: Of the other one.
        """
        with readable():
            across = Axis.of_strengths(adapter, as_object(strengths, "strengths"))
            down = None
            if other not in (None, "") or other_strengths not in (None, ""):
                down = Axis.of_strengths(other, as_object(other_strengths, "other strengths"))
            axes = [axis for axis in (across, down) if axis]
            others = {axis.what: 0.0 for axis in axes}
            mixed = {**checked_mix(as_object(mix, "mix")), **others}
            more = (negative, width, height, start_image, change, negative_mix)
            settings = session.checked(prompt, mixed, seed, steps, guidance, method, *more)
            return await drawn(sheet_of(settings, axes).cells, request)

    def presets() -> dict[str, Any]:
        """All presets: settings by name."""
        return {name: studio.presets.get(name) for name in studio.presets.names}

    def save_preset(name: str, settings: Any) -> str:
        """Keep settings under a name; returns the name.

        Args:
            name: 1 to 60 characters.
            settings: An object with prompt, mix, seed, steps, guidance and method, or its JSON text; or a report.
        """
        with readable():
            given = require_mapping("settings", as_object(settings, "settings"))
            require_settings(given, REPORTED)
            session.require_known(checked_mix(given.get("mix", {})))
            return studio.presets.save(name, to_keep(restore(given, session).settings, session))

    def delete_preset(name: str) -> list[str]:
        """Forget a preset; returns the names of those that are left.

        Args:
            name: Of the preset.
        """
        with readable():
            studio.presets.delete(name)
        return list(studio.presets.names)

    def history(
        request: gr.Request,
        page: float = 1,
        words: str = "",
        favourites: bool = False,
    ) -> list[dict[str, Any]]:
        """A page of the pictures that were drawn, the newest first: a list of {name, file, settings, favourite}.

        Where histories are not shared: of those that this user, or else this client, has drawn.

        Args:
            page: From 1, the newest.
            words: All of them are in its prompts, the names of its styles or its seed; empty finds all.
            favourites: Whether to list only those.
        """
        with readable():
            return [
                {
                    "name": kept.name,
                    "file": file_data(paper, kept.path),
                    "settings": kept.settings,
                    "favourite": kept.favourite,
                }
                for kept in page_of(
                    studio.galleries.of(visitor_of(request)).find(words, favourites=favourites),
                    whole("page", page, 1, 10**9),
                )
            ]

    def star_picture(request: gr.Request, name: str, on: bool = True) -> bool:
        """Make a picture a favourite, which is kept longest, or none; returns which it is now.

        Args:
            name: Of the picture, as /history lists it.
            on: False makes it none.
        """
        with readable():
            studio.galleries.of(visitor_of(request)).star(name, on=on)
        return on

    def delete_picture(request: gr.Request, name: str) -> int:
        """Remove a picture from the history for good; returns how many are left.

        Args:
            name: Of the picture, as /history lists it.
        """
        history = studio.galleries.of(visitor_of(request))
        with readable():
            history.delete(name)
        return len(history)

    api(compare, api_name="compare", **DRAWING)
    api(sweep, api_name="sweep", **DRAWING)
    for endpoint in (presets, save_preset, delete_preset, history, star_picture, delete_picture):
        api(endpoint, api_name=endpoint.__name__)
