"""Compare: the mix beside its parts, a style at several strengths, or any settings in up to three directions."""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from app.drawing.abilities import Abilities
from app.drawing.session import series_of
from app.page import theme
from app.page.tabs.events import QUIET, DrawButtons, Values
from app.page.tabs.mix import MixTab
from app.page.tabs.sheet_results import SheetResults
from app.settings.axes import Axis, sheet_of
from app.settings.checks import SettingsError, whole
from app.settings.sheets import Sheet, row_of
from app.studio import Studio
from shira_diffusers.adapters.merge import MERGE_METHODS

KINDS = {
    "Base, each style and the mix": "parts",
    "One style at several strengths": "strip",
    "Two styles, a grid": "grid",
    "Any settings, a sheet": "sheet",
}
COUNT, MOST = 5, 7  # pictures per axis of a grid
NOTHING = "nothing"
AXES = {
    "Strength of a style": "strength",
    "Style, each alone": "style",
    "Words of the prompt": "words",
    "Prompt": "prompt",
    "Negative prompt": "negative",
    "Seed": "seed",
    "Steps": "steps",
    "Guidance": "guidance",
    "Merge method": "method",
    "Size": "size",
    "Change of the start picture": "change",
    "Styles in the negative half": "negative_mix",
}
EXAMPLES = {
    "strength": "0 to 1 (5)",
    "seed": "1 to 4 (4)",
    "steps": "5, 10, 20, 40",
    "guidance": "1, 3, 5, 8",
    "change": "0.3 to 0.9 (4)",
    "negative_mix": "1, 0.5, 0",
}
HINTS = {
    "words": "words in the prompt, and others in their place: fox, owl, castle",
    "prompt": "one per line",
    "negative": "one per line",
    "size": "128 x 128, 128 x 192",
    NOTHING: "",
}


class CompareTab:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio, mix: MixTab) -> None:
        self._studio = studio
        self._session = studio.session
        self._mix = mix
        self.results = SheetResults(studio, mix, "strip")

    def lay_out(self) -> None:
        """Add the tab to the Blocks that is being built."""
        with gr.Row(elem_id="compare"):
            with gr.Column(scale=4, min_width=300):
                gr.HTML(theme.remark("Prompt, styles and all other settings are those of Mix."), padding=False)
                self.kind = gr.Radio(list(KINDS), value=next(iter(KINDS)), label="What to draw", elem_id="kind")
                names = self._session.names_first
                self.across = _Range("Style, from left to right", names, 0)
                self.down = _Range("Other style, from top to bottom", names, 1)
                kinds = _kinds_of(self._session.abilities)
                with gr.Group(visible=False, elem_id="axes") as self.sheet:
                    self.axes = [
                        _AxisForm("From left to right", kinds, names, "strength"),
                        _AxisForm("From top to bottom", [NOTHING, *kinds], names, "seed"),
                        _AxisForm("A table for each", [NOTHING, *kinds], names, NOTHING),
                    ]
                with gr.Row():
                    self.draw = gr.Button("Draw", variant="primary", size="lg", min_width=120)
                    self.stop = gr.Button("Stop", variant="stop", size="lg", visible=False)
            with gr.Column(scale=8, min_width=320):
                self.results.lay_out()
        self._connect()

    def refresh_on(self, tab: gr.Tab) -> None:
        """Offer the adapters that there are whenever the tab is opened."""
        chosen = [self.across.adapter, self.down.adapter, *(each.style for each in self.axes)]
        tab.select(self._offer, chosen, chosen, **QUIET)

    def _connect(self) -> None:
        self.kind.input(_show, self.kind, [self.across.fold, self.down.fold, self.sheet], **QUIET)
        buttons = DrawButtons(self._studio.requests, self.results.task, [self.draw], self.stop)
        forms = [
            *self.across.components,
            *self.down.components,
            *(each for axis in self.axes for each in axis.components),
        ]
        asked = {self.kind, *forms, *self._mix.inputs}
        begun = buttons.begin_on([self.draw.click], asked, theme.scroll_to("#strip"))
        buttons.draw_after(begun, self._draw, self.results.outputs, self.results.view)

    async def _draw(
        self,
        values: Values,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> AsyncIterator[Any]:
        async for shown in self.results.draw(lambda: self._plan(values), request, progress):
            yield shown

    def _plan(self, values: Values) -> Sheet:
        kind = KINDS.get(values[self.kind])
        settings = self._mix.settings(values)
        if kind == "parts":
            return row_of(series_of(settings))
        if kind == "sheet":
            forms = [form for form in self.axes if values[form.kind] != NOTHING]
            return sheet_of(settings, [form.axis(values) for form in forms])
        ranges = [self.across, self.down] if kind == "grid" else [self.across]
        return sheet_of(settings, [self._axis(each, values) for each in ranges])

    def _axis(self, span: "_Range", values: Values) -> Axis:
        whole("the number of pictures", values[span.count], 2, MOST)
        axis = Axis.between(*(values[each] for each in span.components))
        if axis.what not in self._session.adapter_names:
            raise SettingsError(f"no style named {axis.what[:80]!r}")
        return axis

    def _offer(self, *chosen: Any) -> list[Any]:
        names = list(self._session.adapter_names)
        spare = [name for name in names if name not in chosen]
        return [gr.Dropdown(choices=names, value=each if each in names else next(iter(spare), None)) for each in chosen]


class _Range:
    """A style and its strengths: first, last, how many."""

    def __init__(self, label: str, names: tuple[str, ...], place: int) -> None:
        with gr.Group(visible=False) as self.fold:
            self.adapter = gr.Dropdown(
                list(names), value=next(iter(names[place:]), None), label=label, interactive=True
            )
            with gr.Row():
                # Gradio's messages about its own limits lack the name of the field
                self.first = gr.Number(0.0, label="from", step=0.1, min_width=60)
                self.last = gr.Number(1.0, label="to", step=0.1, min_width=60)
                self.count = gr.Number(COUNT if not place else 3, label="pictures", precision=0, min_width=60)
        self.components = [self.adapter, self.first, self.last, self.count]


class _AxisForm:
    """What changes in a direction, and its values."""

    def __init__(self, label: str, kinds: list[str], names: tuple[str, ...], kind: str) -> None:
        choices = [(words, each) for words, each in {NOTHING: NOTHING, **AXES}.items() if each in kinds]
        self.kind = gr.Dropdown(choices, value=kind, label=label, interactive=True)
        self.style = gr.Dropdown(
            list(names), value=next(iter(names), None), label="Style", interactive=True, visible=kind == "strength"
        )
        self.values = gr.Textbox(label="Values", interactive=True, max_lines=6, **_values_of(kind))
        self.components = [self.kind, self.style, self.values]
        self.kind.input(self._choose, self.kind, [self.style, self.values], **QUIET)

    def axis(self, values: Values) -> Axis:
        """The axis that was asked for; raises SettingsError."""
        kind, style, given = (values[each] for each in self.components)
        return Axis.checked(kind, given, style)

    def _choose(self, kind: str) -> list[Any]:
        return [gr.Dropdown(visible=kind == "strength"), gr.Textbox(**_values_of(kind))]


def _values_of(kind: str) -> dict[str, Any]:
    """How the box of values begins: with an example that works, or else one that is only shown."""
    hint = HINTS.get(kind, "0, 0.5, 1, or 0 to 1 (5) for five")
    return {"value": EXAMPLES.get(kind, ""), "placeholder": hint, "visible": kind != NOTHING}


def _kinds_of(abilities: Abilities) -> list[str]:
    """The kinds of axes that have an effect with this base."""
    has = {
        "negative": abilities.negative,
        "size": abilities.side,
        "change": abilities.image_to_image,
        "negative_mix": abilities.negative_mix,
        "method": len(MERGE_METHODS) > 1,
    }
    return [kind for kind in AXES.values() if has.get(kind, True)]


def _show(kind: str) -> list[Any]:
    chosen = KINDS.get(kind)
    shown = (chosen in ("strip", "grid"), chosen == "grid", chosen == "sheet")
    return [gr.Group(visible=each) for each in shown]
