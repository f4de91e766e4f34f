"""Interference: what the chosen adapters do alone and in pairs, in pictures, in words and per layer."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from app.drawing.requests import Stopped
from app.drawing.suggestions import first_pair
from app.insight.effects import GUIDANCE, STRENGTH, opposing, pictures_of, suggested
from app.insight.interference import MAX_ADAPTERS
from app.page import interference_html
from app.page.tabs.events import TELLING, Values, gallery
from app.page.tabs.mix import MixTab
from app.server.messages import readable
from app.server.served_files import cached_picture
from app.server.visitors import COMPARING, DRAWING, visitor_of
from app.studio import Studio


class InterferenceTab:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio, mix: MixTab) -> None:
        self._session, self._comparer, self._requests = studio.session, studio.comparer, studio.requests
        self._mix = mix

    def lay_out(self) -> None:
        """Add the tab to the Blocks that is being built."""
        gr.Markdown(
            f"Choose 2 to {MAX_ADAPTERS} adapters and see what they do alone and in pairs, with the prompt, seed and "
            f"steps of Mix, at strength {STRENGTH:g} and guidance {GUIDANCE:g}; and where they interfere.",
            elem_classes="remark",
        )
        with gr.Row(elem_id="interference-choice"):
            names = self._names()
            self.chosen = gr.Dropdown(
                names,
                value=first_pair(self._session.names_first),
                multiselect=True,
                max_choices=MAX_ADAPTERS,
                label="Adapters",
                scale=4,
                min_width=260,
            )
            self.compare = gr.Button("Compare them", variant="primary", scale=1, min_width=130)
        self.pictures = gallery("interference-pictures", "Alone and in pairs", visible=False, height="auto")
        self.use = gr.Button("Use suggested strengths", visible=False, elem_id="use-suggested")
        self.summary = gr.HTML(elem_id="interference-summary", padding=False)
        self.measure = gr.Radio(
            list(interference_html.MEASURES), value="Overlap", label="Heat map of", visible=False, elem_id="measure"
        )
        self.heat = gr.HTML(elem_id="interference-heat", padding=False)
        self._connect()

    def _connect(self) -> None:
        shown = [self.pictures, self.use, self.summary, self.measure, self.heat]
        inputs: set[Any] = {self.chosen, self.measure, *self._mix.inputs}
        private: dict[str, Any] = {"api_visibility": "private"}
        self.compare.click(self._compare, inputs, shown, show_progress_on=self.summary, **private, **DRAWING)
        self.use.click(self._use, inputs, self._mix.targets, **TELLING)
        changed = [self.chosen, self.measure]
        self.measure.change(self._recolor, changed, self.heat, show_progress="hidden", **private, **COMPARING)

    def refresh_on(self, shown: gr.Tab) -> None:
        """Offer the adapters that there are when the tab is opened."""
        shown.select(self._offered, self.chosen, self.chosen, **TELLING)

    async def _compare(self, values: Values, request: gr.Request) -> AsyncIterator[Any]:
        names, drawn, shown = values[self.chosen], dict[tuple[str, ...], Any](), list[tuple[str, str]]()
        with readable("the adapters could not be compared"):
            pairs = await asyncio.to_thread(self._comparer.compare, names)
            heat = interference_html.heat_map(pairs, values[self.measure])
            orders = pictures_of(self._mix.settings(values), names)
        columns = len(names) + 1 if len(pairs) > 1 else len(orders)
        empty = gr.Gallery([], visible=True, columns=columns)
        yield empty, gr.Button(visible=True), interference_html.summary(pairs), gr.Radio(visible=True), heat
        visit = visitor_of(request).visit
        same = gr.skip()
        try:
            with readable():
                for mix, settings in orders.items():
                    picture = await self._requests.preview(visit, settings)
                    drawn[mix] = picture.image
                    file = await asyncio.to_thread(cached_picture, self.pictures, picture)
                    shown.append((file, " + ".join(mix) or "base"))
                    yield shown, same, same, same, same
                measure = self._session.queue.submit(visit, lambda: opposing(self._session.pipe, drawn))
                measured = await asyncio.wrap_future(measure)
                yield same, same, interference_html.summary(pairs, measured), same, same
        except Stopped:  # a newer comparison, or a preview in Mix
            return

    def _use(self, values: Values) -> list[Any]:
        """The chosen adapters in Mix, as the study suggests."""
        with readable("the strengths could not be used"):
            return self._mix.fill(suggested(self._mix.settings(values), values[self.chosen] or []).as_dict())

    def _recolor(self, names: list[str], measure: str) -> str:
        with readable("the adapters could not be compared"):
            return interference_html.heat_map(self._comparer.compare(names), measure)

    def _offered(self, chosen: list[str]) -> Any:
        names = self._names()
        kept = [name for name in chosen or [] if name in names]
        return gr.Dropdown(names, value=kept or first_pair(self._session.names_first))

    def _names(self) -> list[str]:
        return list(self._session.adapter_names)
