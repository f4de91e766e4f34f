"""Mix: a prompt, a row for each style, the picture, a strip to compare and the visit's gallery."""

import threading
from collections.abc import Iterator
from typing import Any

import gradio as gr

from app import look
from app.api import DRAWING
from app.cards import Card
from app.messages import readable
from app.picture import Picture
from app.session import OnStep
from app.settings import (
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_STEPS,
    MAX_STRENGTH,
    MIN_STRENGTH,
)
from app.studio import Studio

SUGGESTIONS_SHOWN = 4
GALLERY_HOLDS = 60
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
ROLL_DICE = "() => Math.floor(Math.random() * 1000000)"
SHOW_PICTURE = "() => { document.querySelector('#picture').scrollIntoView({ block: 'nearest', behavior: 'smooth' }) }"

Values = dict[Any, Any]  # component -> its value


class Stopped(Exception):
    """The visitor pressed Stop."""


class MixTab:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio) -> None:
        self._session = studio.session
        self._stops: dict[str, threading.Event] = {}  # by visit, while it draws

    def lay_out(self) -> None:
        """Add the tab to the Blocks that is being built."""
        with gr.Row(elem_id="mixer"):
            with gr.Column(scale=5, min_width=320):
                self._lay_out_prompt()
                self._lay_out_styles()
                self._lay_out_details()
                with gr.Row(elem_id="actions"):
                    self.generate = gr.Button("Generate", variant="primary", size="lg", scale=2, min_width=140)
                    self.compare = gr.Button("Compare", size="lg", min_width=120)
                    self.stop = gr.Button("Stop", variant="stop", size="lg", visible=False)
            with gr.Column(scale=6, min_width=320):
                self._lay_out_results()
        self._connect()

    def _lay_out_prompt(self) -> None:
        suggestions = self._session.suggestions[:SUGGESTIONS_SHOWN]
        self.prompt = gr.Textbox(
            suggestions[0], label="Prompt", lines=2, max_lines=5, elem_id="prompt", submit_btn=False, autofocus=True
        )
        chips = gr.Dataset(
            components=[gr.Textbox(visible=False)],
            samples=[[text] for text in suggestions],
            sample_labels=[text.removeprefix("a picture of ") for text in suggestions],
            label="Try",
            type="values",
            elem_id="suggestions",
        )
        chips.click(lambda row: row[0], chips, self.prompt, **QUIET)

    def _lay_out_styles(self) -> None:
        self.rows: dict[str, tuple[gr.Checkbox, gr.Slider]] = {}
        with gr.Column(elem_id="styles"):
            for card in self._session.cards:
                self.rows[card.name] = self._lay_out_style(card)
            if not self.rows:
                gr.HTML("<p>No styles yet: the folder of adapters holds none that fit.</p>")
            if self._session.library.refused:
                gr.HTML(look.refusals(self._session.library.refused), elem_id="refused", padding=False)

    def _lay_out_style(self, card: Card) -> tuple[gr.Checkbox, gr.Slider]:
        first = not self.rows
        with gr.Row(elem_classes="style"):
            on = gr.Checkbox(first, label=card.name, container=False, min_width=80)
            strength = gr.Slider(
                MIN_STRENGTH,
                MAX_STRENGTH,
                1.0,
                step=0.05,
                label=f"strength of {card.name}",
                show_label=False,
                container=False,
                min_width=80,
                buttons=[],
            )
            gr.HTML(look.hint(card), elem_classes="hint", padding=False)
        strength.input(None, None, on, js="() => true", **QUIET)  # whoever moves a style wants to see it
        return on, strength

    def _lay_out_details(self) -> None:
        with gr.Row(elem_id="details"):
            self.seed = gr.Number(7, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=60)
            dice = gr.Button("🎲", elem_id="dice", min_width=40)
            self.steps = gr.Slider(1, MAX_STEPS, DEFAULT_STEPS, step=1, label="Steps", min_width=60, buttons=[])
            self.guidance = gr.Slider(
                0, MAX_GUIDANCE, DEFAULT_GUIDANCE, step=0.5, label="Guidance", min_width=60, buttons=[]
            )
        dice.click(None, None, self.seed, js=ROLL_DICE, **QUIET)

    def _lay_out_results(self) -> None:
        self.picture = gr.Image(
            label="Picture",
            show_label=False,
            format="png",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="picture",
        )
        self.facts = gr.HTML(elem_id="facts", visible=False, padding=False)
        self.strip = gr.Gallery(label="Side by side", format="png", visible=False, elem_id="strip", interactive=False)
        self.gallery = gr.Gallery(
            label="This visit", format="png", type="filepath", visible=False, elem_id="gallery", interactive=False
        )

    def _connect(self) -> None:
        inputs = {self.prompt, self.seed, self.steps, self.guidance, self.gallery}
        inputs |= {component for row in self.rows.values() for component in row}
        drawing: dict[str, Any] = {
            "inputs": inputs,
            "api_visibility": "private",
            "show_progress_on": self.picture,
            **DRAWING,
        }
        buttons = [self.generate, self.compare, self.stop]

        def connect(starts: Any, draw: Any, outputs: list[Any]) -> None:
            pressed = gr.on(starts, lambda: _buttons(busy=True), outputs=buttons, js=SHOW_PICTURE, **QUIET)
            drawn = pressed.then(draw, outputs=outputs, **drawing)
            for ended in (drawn.then, drawn.failure):  # after an error, browsers follow failure only
                ended(lambda: _buttons(busy=False), outputs=buttons, **QUIET)

        one = [self.picture, self.facts, self.gallery]
        connect([self.generate.click, self.prompt.submit], self._generate, one)
        connect(self.compare.click, self._compare, [*one, self.strip])
        self.stop.click(self._stop, **QUIET)

    # ---------------------------------------------------------------- what the buttons do

    def _generate(self, values: Values, request: gr.Request, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        try:
            with readable():
                picture = self._session.generate(*self._settings(values), on_step=self._on_step(request, progress))
        except Stopped:
            return gr.skip(), gr.skip(), gr.skip()
        finally:
            self._stops.pop(_visit(request), None)
        return self._results(values, [picture])

    def _compare(
        self,
        values: Values,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[Any]:
        strip: list[tuple[str, Picture]] = []
        try:
            with readable():
                pictures = self._session.compare(*self._settings(values), on_step=self._on_step(request, progress))
                for label, picture in pictures:
                    strip.append((label, picture))
                    captioned = [(each.signed(), name) for name, each in strip]
                    newest_first = [each for _, each in reversed(strip)]
                    yield (*self._results(values, newest_first), gr.Gallery(captioned, visible=True))
        except Stopped:
            return
        finally:
            self._stops.pop(_visit(request), None)

    def _results(self, values: Values, new: list[Picture]) -> tuple[Any, Any, Any]:
        """Picture, facts and gallery after new pictures, the newest first."""
        captioned = [(picture.signed(), look.caption(picture.report)) for picture in new]
        gallery = [*captioned, *(values[self.gallery] or [])][:GALLERY_HOLDS]
        report = new[0].report
        return new[0].signed(), gr.HTML(look.facts(report), visible=True), gr.Gallery(gallery, visible=True)

    def _settings(self, values: Values) -> tuple[Any, dict[str, float], Any, Any, Any]:
        mix = {name: values[strength] for name, (on, strength) in self.rows.items() if values[on]}
        return values[self.prompt], mix, values[self.seed], values[self.steps], values[self.guidance]

    def _on_step(self, request: gr.Request, progress: gr.Progress) -> OnStep:
        stop = self._stops.setdefault(_visit(request), threading.Event())

        def on_step(done: int, of: int) -> None:
            if stop.is_set():
                raise Stopped
            progress((done, of), desc="Drawing", unit="steps")

        return on_step

    def _stop(self, request: gr.Request) -> None:
        stop = self._stops.get(_visit(request))
        if stop:
            stop.set()


def _visit(request: gr.Request) -> str:
    return request.session_hash or ""


def _buttons(*, busy: bool) -> list[Any]:
    return [gr.Button(visible=not busy), gr.Button(visible=not busy), gr.Button(visible=busy)]
