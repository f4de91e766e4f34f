"""Compare: the mix beside its parts, or a style at a range of strengths, all at one seed."""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from app.drawing.requests import Series, Stopped
from app.drawing.session import series_of
from app.page import theme
from app.page.tabs.events import QUIET, TELLING, DrawButtons, Values, at_most_often, gallery, picked
from app.page.tabs.mix import MixTab
from app.server.messages import readable
from app.server.served_files import cached
from app.server.visitors import visitor_of
from app.settings.axes import Axis, sheet_of
from app.settings.checks import SettingsError, whole
from app.studio import Studio

KINDS = {
    "Base, each style and the mix": "parts",
    "One style at several strengths": "strip",
    "Two styles, a grid": "grid",
}
COUNT, MOST = 5, 7  # pictures per axis; a grid has 49 at most, as many as still can be told apart on a screen
CHOOSE = "Choose a picture to send it to Mix."


class CompareTab:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio, mix: MixTab) -> None:
        self._studio = studio
        self._session = studio.session
        self._mix = mix

    def lay_out(self) -> None:
        """Add the tab to the Blocks that is being built."""
        self.names: gr.State = gr.State([])
        self.chosen: gr.State = gr.State(None)
        with gr.Row(elem_id="compare"):
            with gr.Column(scale=4, min_width=300):
                gr.HTML(theme.remark("Prompt, styles, seed, steps and guidance are those of Mix."), padding=False)
                self.kind = gr.Radio(list(KINDS), value=next(iter(KINDS)), label="What to draw", elem_id="kind")
                names = self._session.names_first
                self.across = _Range("Style, from left to right", names, 0)
                self.down = _Range("Other style, from top to bottom", names, 1)
                with gr.Row():
                    self.draw = gr.Button("Draw", variant="primary", size="lg", min_width=120)
                    self.stop = gr.Button("Stop", variant="stop", size="lg", visible=False)
            with gr.Column(scale=8, min_width=320):
                self.strip = gallery("strip")
                self.description = gr.HTML(theme.remark(CHOOSE), elem_id="strip-told")
                self.send = gr.Button("Send to Mix", interactive=False)
        self._connect()

    def refresh_on(self, tab: gr.Tab) -> None:
        """Offer the adapters that there are whenever the tab is opened."""
        tab.select(
            self._offer, [self.across.adapter, self.down.adapter], [self.across.adapter, self.down.adapter], **QUIET
        )

    def _connect(self) -> None:
        folds = [self.across.fold, self.down.fold]
        self.kind.input(_show, self.kind, folds, **QUIET)
        buttons = DrawButtons(self._studio.requests, [self.draw], self.stop)
        buttons.draw_after(
            self.draw.click(buttons.begin, outputs=buttons.all, **QUIET),
            self._draw,
            {self.kind, *self.across.components, *self.down.components, *self._mix.inputs},
            [self.strip, self.names, self.chosen, self.description, self.send],
            self.strip,
        )
        self.strip.select(self._choose, self.names, [self.chosen, self.description, self.send], **TELLING)
        self.send.click(self._mix.fill_from_history, self.chosen, self._mix.targets, **TELLING)

    async def _draw(
        self,
        values: Values,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> AsyncIterator[Any]:
        done: list[tuple[str, str]] = []
        names: list[str] = []

        def on_step(step: int, of: int) -> None:
            progress((step, of), desc=f"Drawing, {len(done)} done", unit="steps")

        with readable():
            series, columns = self._series(values)
            idle = gr.Button(interactive=False)
            kind = ["as-grid"] if KINDS.get(values[self.kind]) == "grid" else []
            yield (
                gr.Gallery([], columns=columns, elem_classes=kind, selected_index=None),
                [],
                None,
                theme.remark(""),
                idle,
            )
            try:
                pictures = self._studio.requests.draw_series(visitor_of(request), series, at_most_often(on_step))
                async for label, _, path in pictures:
                    done.append((cached(self.strip, path), _short(label)))
                    names.append(path.name)
                    yield done, names, None, theme.remark(f"{len(done)} of {len(series)} drawn."), idle
            except Stopped:
                stopped = f"Stopped, {len(done)} of {len(series)} drawn." + (f" {CHOOSE}" if done else "")
                yield gr.skip(), gr.skip(), None, theme.remark(stopped), idle
                return
        yield gr.skip(), gr.skip(), None, theme.remark(self._legend(values)), idle

    def _series(self, values: Values) -> tuple[Series, int]:
        """What to draw, and how many per row."""
        kind = KINDS.get(values[self.kind])
        settings = self._mix.settings(values)
        if kind == "parts":
            series = series_of(settings)
            return series, min(4, len(series))
        axes = [self._axis(each, values) for each in ([self.across, self.down] if kind == "grid" else [self.across])]
        return sheet_of(settings, axes).cells, len(axes[0].points)

    def _legend(self, values: Values) -> str:
        grid = KINDS.get(values[self.kind]) == "grid"
        across, down = values[self.across.adapter], values[self.down.adapter]
        axes = f"Strengths of {across} from left to right, of {down} from top to bottom. " if grid else ""
        return f"{axes}{CHOOSE}"

    def _axis(self, span: "_Range", values: Values) -> Axis:
        whole("the number of pictures", values[span.count], 2, MOST)
        axis = Axis.between(*(values[each] for each in span.components))
        if axis.what not in self._session.adapter_names:
            raise SettingsError(f"no style named {axis.what[:80]!r}")
        return axis

    def _choose(self, names: list[str], event: gr.SelectData, request: gr.Request) -> tuple[Any, Any, Any]:
        with readable("the picture could not be shown"):
            kept = self._studio.galleries.of(visitor_of(request)).get(picked(names, event))
            return kept.name, theme.settings(kept.settings), gr.Button(interactive=True)

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


def _short(label: str) -> str:
    """A label that fits on a small picture: of a grid's, the two strengths."""
    first, comma, second = label.partition(", ")
    return f"{first.rpartition(' ')[2]} · {second.rpartition(' ')[2]}" if comma else label


def _show(kind: str) -> list[Any]:
    chosen = KINDS.get(kind)
    return [gr.Group(visible=chosen in ("strip", "grid")), gr.Group(visible=chosen == "grid")]
