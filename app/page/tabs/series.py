"""Series: several prompts, each drawn several times, and more pictures like one that was drawn."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from app.page import theme
from app.page.tabs.browser_memory import keep_fields
from app.page.tabs.events import TELLING, DrawButtons, Values, picked
from app.page.tabs.mix import MixTab
from app.page.tabs.sheet_results import SheetResults
from app.server.visitors import visitor_of
from app.settings.series import prompt_series, prompts_of
from app.settings.settings import Settings
from app.settings.sheets import Sheet
from app.studio import Studio

SEEDS = [
    ("Fixed: each prompt with the same seeds", "fixed"),
    ("+1: each picture with the next seed", "next"),
    ("Random: from a seed that is drawn, and then shown below", "random"),
]
SUGGESTED = 3  # prompts, to begin with
LIKE, CHANGE = 4, 0.7  # how many pictures like another, and how much of it each draws anew


class SeriesTab:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio, mix: MixTab, tabs: gr.Tabs) -> None:
        self._studio, self._session, self._mix, self._tabs = studio, studio.session, mix, tabs
        self.results = SheetResults(studio, mix, "pictures")

    def lay_out(self) -> None:
        """Add the tab to the Blocks that is being built."""
        with gr.Row(elem_id="series"):
            with gr.Column(scale=4, min_width=300):
                gr.HTML(theme.remark("Styles and all other settings are those of Mix."), padding=False)
                prompts = "\n".join(self._session.suggestions[:SUGGESTED])
                self.prompts = gr.Textbox(prompts, label="Prompts, one per line", lines=5, max_lines=12)
                self.count = gr.Number(2, label="Pictures of each", precision=0)
                self.seeds = gr.Radio(SEEDS, value="next", label="Seeds")
                self.seed = gr.Number(7, label="First seed, -1 draws one", precision=0)
                with gr.Row():
                    self.start = gr.Button("Draw the series", variant="primary", size="lg", min_width=120)
                    self.stop = gr.Button("Stop", variant="stop", size="lg", visible=False)
            with gr.Column(scale=8, min_width=320):
                self.results.lay_out()
        self._buttons = DrawButtons(self._studio.requests, self.results.task, [self.start], self.stop)
        asked = {self.prompts, self.count, self.seeds, self.seed, *self._mix.inputs}
        self._draw_after(self._buttons.begin_on([self.start.click], asked, theme.scroll_to("#pictures")), self._draw)

    def keep_in_browser(self, load: Any) -> None:
        """Keep what is entered here; see ``keep_fields``."""
        fields = {"prompts": self.prompts, "count": self.count, "seeds": self.seeds, "seed": self.seed}
        keep_fields("series", fields, load)

    def vary_on(self, chosen: Callable[..., Any], names: Any) -> None:
        """Draw more pictures like one of those in ``names``, or like its only one, when it is chosen, here.

        Args:
            chosen: the event.
            names: holds a list of names in History, or one; or a picture as Mix shows it.
        """
        opened = chosen(self._open, names, [self._tabs, *self._buttons.begun], **TELLING)
        self._draw_after(opened, self._draw_like)

    def _draw_after(self, begun: Any, draw: Any) -> None:
        self._buttons.draw_after(begun, draw, [*self.results.outputs, self.seed], self.results.view)

    async def _draw(
        self,
        values: Values,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> AsyncIterator[Any]:
        seed: Any = gr.skip()

        def planned() -> Sheet:
            nonlocal seed
            sheet = self._plan(values)
            if sheet.cells[0][1].seed != values[self.seed]:
                seed = sheet.cells[0][1].seed
            return sheet

        async for shown in self.results.draw(planned, request, progress):
            yield [*shown, seed]
            seed = gr.skip()  # which may be another by now

    async def _draw_like(
        self,
        name: str | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> AsyncIterator[Any]:
        async for shown in self.results.draw(lambda: self._variations(name, request), request, progress):
            yield [*shown, gr.skip()]

    def _plan(self, values: Values) -> Sheet:
        prompts = prompts_of(values[self.prompts])
        mixed = {**values, self._mix.prompt: prompts[0], self._mix.seed: values[self.seed]}
        return prompt_series(self._mix.settings(mixed), prompts, values[self.count], values[self.seeds])

    def _open(self, names: Any, event: gr.EventData, request: gr.Request) -> list[Any]:
        if isinstance(names, dict):
            names = names.get("name")
        name = picked(names, event) if isinstance(names, list) else names
        return [gr.Tabs(selected="series"), *self._buttons.begin(name, request)]

    def _variations(self, name: Any, request: gr.Request) -> Sheet:
        """Drawn from the picture where the base can, or else as it was, at other seeds."""
        kept = self._studio.galleries.of(visitor_of(request)).get(name)
        settings = self._mix.restored(kept.settings).settings
        if self._session.abilities.image_to_image:
            more = {"start_image": self._session.starts.add(kept.path), "change": max(CHANGE, 1 / settings.steps)}
            settings = Settings.checked(**{**settings.as_dict(), **more})
        return prompt_series(settings, [settings.prompt], LIKE, "random")
