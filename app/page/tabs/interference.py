"""Interference: how much the chosen adapters interfere, per layer and in words."""

from typing import Any

import gradio as gr

from app.insight.interference import MAX_ADAPTERS
from app.page import interference_html
from app.page.tabs.events import TELLING
from app.server.messages import readable
from app.server.visitors import COMPARING
from app.studio import Studio

FIRST = 2  # adapters chosen at the start


class InterferenceTab:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio) -> None:
        self._session, self._comparer = studio.session, studio.comparer

    def lay_out(self) -> None:
        """Add the tab to the Blocks that is being built."""
        gr.Markdown(
            "Adapters mix well where they change different entries, or pull shared ones the same way. "
            f"Choose 2 to {MAX_ADAPTERS} and see where they interfere before you mix them.",
            elem_classes="remark",
        )
        with gr.Row(elem_id="interference-choice"):
            names = self._names()
            self.chosen = gr.Dropdown(
                names,
                value=list(self._session.names_first[:FIRST]),
                multiselect=True,
                max_choices=MAX_ADAPTERS,
                label="Adapters",
                scale=4,
                min_width=260,
            )
            self.compare = gr.Button("Compare them", variant="primary", scale=1, min_width=130)
        self.summary = gr.HTML(elem_id="interference-summary", padding=False)
        self.measure = gr.Radio(
            list(interference_html.MEASURES), value="Overlap", label="Heat map of", visible=False, elem_id="measure"
        )
        self.heat = gr.HTML(elem_id="interference-heat", padding=False)
        self._connect()

    def _connect(self) -> None:
        inputs, options = [self.chosen, self.measure], {"api_visibility": "private", **COMPARING}
        self.compare.click(
            self._compare, inputs, [self.summary, self.measure, self.heat], show_progress_on=self.summary, **options
        )
        self.measure.change(self._recolor, inputs, self.heat, show_progress="hidden", **options)

    def refresh_on(self, shown: gr.Tab) -> None:
        """Offer the adapters that there are when the tab is opened."""
        shown.select(self._offered, self.chosen, self.chosen, **TELLING)

    def _compare(self, names: list[str], measure: str) -> Any:
        with readable("the adapters could not be compared"):
            pairs = self._comparer.compare(names)
        return interference_html.summary(pairs), gr.Radio(visible=True), interference_html.heat_map(pairs, measure)

    def _recolor(self, names: list[str], measure: str) -> str:
        with readable("the adapters could not be compared"):
            return interference_html.heat_map(self._comparer.compare(names), measure)

    def _offered(self, chosen: list[str]) -> Any:
        names = self._names()
        kept = [name for name in chosen or [] if name in names]
        return gr.Dropdown(names, value=kept or list(self._session.names_first[:FIRST]))

    def _names(self) -> list[str]:
        return list(self._session.adapter_names)
