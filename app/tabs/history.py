"""History: all pictures that were kept, the newest first, a page at a time."""

from typing import Any

import gradio as gr

from app import look
from app.files import cached
from app.history import Kept
from app.messages import readable
from app.settings import SettingsError
from app.studio import Studio
from app.tabs.mix import QUIET, MixTab

NOTHING = "Nothing yet: what you draw in Mix and Compare is kept here."


class HistoryTab:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio, mix: MixTab) -> None:
        self._history = studio.history
        self._mix = mix

    def lay_out(self) -> None:
        """Add the tab to the Blocks that is being built."""
        self.page = gr.State(1)
        self.names: gr.State = gr.State([])
        self.chosen: gr.State = gr.State(None)
        with gr.Row(elem_id="history"):
            with gr.Column(scale=6, min_width=320):
                self.gallery = gr.Gallery(
                    label="Pictures",
                    type="filepath",
                    columns=6,
                    allow_preview=False,
                    interactive=False,
                    elem_id="kept",
                    buttons=[],
                )
                with gr.Row(elem_id="pages"):
                    self.newer = gr.Button("← Newer", min_width=90)
                    self.where = gr.HTML(elem_classes="where", padding=False)
                    self.older = gr.Button("Older →", min_width=90)
            with gr.Column(scale=4, min_width=320):
                self.picture = gr.Image(
                    label="Chosen picture",
                    show_label=False,
                    format="png",
                    type="filepath",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="kept-picture",
                )
                self.told = gr.HTML(look.remark("Choose a picture to see how it was made."), elem_id="told")
                with gr.Row():
                    self.send = gr.Button("Send to Mix", variant="primary", min_width=110, interactive=False)
                    self.delete = gr.Button("Delete", variant="stop", min_width=90, interactive=False)
        self._connect()

    def refresh_on(self, tab: gr.Tab) -> None:
        """Show the newest pictures whenever the tab is opened."""
        tab.select(lambda: self._turn(1), outputs=self._page_outputs, **QUIET)

    def _connect(self) -> None:
        self._page_outputs = [self.page, self.names, self.gallery, self.where, self.newer, self.older]
        details = [self.chosen, self.picture, self.told, self.send, self.delete]
        for button, step in ((self.newer, -1), (self.older, 1)):
            button.click(lambda page, step=step: self._turn(page + step), self.page, self._page_outputs, **QUIET)
        self.gallery.select(self._choose, self.names, details, **QUIET)
        self.send.click(self._send, self.chosen, self._mix.targets, **QUIET)
        self.delete.click(self._delete, [self.chosen, self.page], [*details, *self._page_outputs], **QUIET)

    def _turn(self, page: int) -> tuple[Any, ...]:
        pages = self._history.pages()
        page = min(max(1, page), pages)
        kept = self._history.page(page)
        items = [(cached(self.gallery, each.path), _caption(each)) for each in kept]
        where = f"page {page} of {pages} · {len(self._history)} pictures" if kept else NOTHING
        return (
            page,
            [each.name for each in kept],
            gr.Gallery(items, selected_index=None),
            look.remark(where),
            gr.Button(interactive=page > 1),
            gr.Button(interactive=page < pages),
        )

    def _choose(self, names: list[str], event: gr.SelectData) -> tuple[Any, ...]:
        index = event.index if isinstance(event.index, int) and 0 <= event.index < len(names) else None
        with readable("the picture could not be shown"):
            kept = self._history.get(names[index] if index is not None else None)
            settings = kept.settings
        ready = gr.Button(interactive=True)
        return kept.name, cached(self.picture, kept.path), look.settings(settings), ready, ready

    def _send(self, name: Any) -> list[Any]:
        with readable("the picture could not be read"):
            return self._mix.fill(self._history.get(name).settings)

    def _delete(self, name: Any, page: int) -> tuple[Any, ...]:
        with readable("the picture could not be deleted"):
            self._history.delete(name)
        idle = gr.Button(interactive=False)
        return (None, None, look.remark("Deleted."), idle, idle, *self._turn(page))


def _caption(kept: Kept) -> str:
    try:
        return look.caption(kept.settings)
    except SettingsError:
        return ""
