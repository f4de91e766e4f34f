"""The fold of Mix with what few change: a negative prompt, styles in its half, a size, a picture to start from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from app.drawing.session import Session
from app.page import theme
from app.page.tabs.events import QUIET, TELLING
from app.server.messages import readable
from app.server.served_files import cached
from app.settings.settings import DEFAULT_CHANGE, DEFAULT_NEGATIVE_MIX, size_of

SHAPES = ((1, 1), (4, 5), (3, 4), (2, 3), (9, 16), (5, 4), (4, 3), (3, 2), (16, 9))


class MoreSettings:
    """Components by their field in ``Settings``; those that the base does not allow are hidden."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def lay_out(self) -> Mapping[str, Any]:
        """Add the components to the Blocks that is being built; returns those that hold settings, by field."""
        can = self._session.abilities
        negative = gr.Textbox(
            "",
            label="Negative prompt: what is not wanted",
            lines=1,
            max_lines=4,
            visible=can.negative,
            interactive=True,
        )
        negative_mix = gr.Slider(
            0,
            1,
            DEFAULT_NEGATIVE_MIX,
            step=0.05,
            label="Styles in guidance's negative half",
            info="1 is as usual; at 0.5 guidance drives the styles too, and pairs keep more of both.",
            visible=bool(can.negative_mix),
            buttons=[],
        )
        with gr.Row(visible=bool(can.side)):
            shape = gr.Dropdown(self._shapes(), value=None, label="Shape", min_width=110, interactive=True)
            width = gr.Number(0, label=f"Width, 0 is {can.side}", precision=0, min_width=80)
            height = gr.Number(0, label=f"Height, 0 is {can.side}", precision=0, min_width=80)
        shape.input(lambda size: size_of(size), shape, [width, height], **QUIET)
        with gr.Row(visible=bool(can.image_to_image)):
            self._picture = gr.Image(
                label="Start from a picture", type="filepath", image_mode=None, format="png",
                sources=["upload", "clipboard"], height=150, min_width=140, elem_id="start", buttons=[],
            )  # fmt: skip
            change = gr.Slider(
                0.05, 1, DEFAULT_CHANGE, step=0.05, label="How much of it to change", min_width=140, buttons=[]
            )
        start_image = gr.Textbox("", visible="hidden", label="Picture to start from", elem_id="start-image")
        # not preprocessed: Gradio has no sentence for a file that is no picture
        self._picture.upload(self._add, self._picture, start_image, preprocess=False, **TELLING).failure(
            lambda: None, outputs=self._picture, **QUIET
        )
        self._picture.clear(lambda: "", outputs=start_image, **QUIET)
        start_image.change(self._show, start_image, self._picture, **QUIET)
        sized = {"width": width, "height": height, "start_image": start_image, "change": change}
        return {"negative": negative, **sized, "negative_mix": negative_mix}

    def _shapes(self) -> list[tuple[str, str]]:
        """Names and sizes of what has about as many pixels as the model's own square, where it can be drawn."""
        side, multiple = self._session.abilities.side, self._session.abilities.multiple
        shapes: dict[str, str] = {}
        for across, down in SHAPES:
            exact = (side * (across / down) ** 0.5, side * (down / across) ** 0.5)
            size = theme.size(*(round(each / multiple) * multiple for each in exact))
            shapes.setdefault(size, f"{across}:{down}, {size}")
        return [(name, size) for size, name in shapes.items()]

    def _add(self, file: Mapping[str, Any] | None) -> str:
        with readable("the picture could not be taken in"):
            return self._session.starts.add(Path((file or {}).get("path") or ""))

    def _show(self, start_image: str) -> str | None:
        path = self._session.starts.path(start_image) if start_image else None
        return cached(self._picture, path) if path else None
