"""History: all pictures that were kept, the newest first, a page at a time."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from app.history.history import History
from app.page import theme
from app.page.tabs.events import QUIET, TELLING, caption_of, gallery, picked, picture
from app.page.tabs.mix import MixTab
from app.server.messages import readable
from app.server.served_files import cached
from app.server.visitors import visitor_of
from app.studio import Studio

NOTHING = "Nothing yet: what you draw in Mix and Compare is kept here."


class HistoryTab:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio, mix: MixTab) -> None:
        self._galleries = studio.galleries
        self._mix = mix

    def lay_out(self) -> None:
        """Add the tab to the Blocks that is being built."""
        self.page = gr.State(1)
        self.names: gr.State = gr.State([])
        self.chosen: gr.State = gr.State(None)
        gr.HTML(theme.remark(self._whose()), elem_id="whose", padding=False)
        with gr.Row(elem_id="history"):
            with gr.Column(scale=6, min_width=320):
                self.gallery = gallery("kept", columns=6)
                with gr.Row(elem_id="pages"):
                    self.newer = gr.Button("← Newer", min_width=90)
                    self.where = gr.HTML(elem_classes="where", padding=False)
                    self.older = gr.Button("Older →", min_width=90)
            with gr.Column(scale=4, min_width=320):
                self.picture = picture("kept-picture", "Chosen picture", type="filepath")
                self.description = gr.HTML(theme.remark("Choose a picture to see how it was made."), elem_id="told")
                with gr.Row():
                    self.send = gr.Button("Send to Mix", variant="primary", min_width=110, interactive=False)
                    self.delete = gr.Button(
                        "Delete", variant="stop", min_width=90, interactive=False, elem_classes="asks"
                    )
        self._connect()

    def refresh_on(self, tab: gr.Tab) -> None:
        """Show the newest pictures whenever the tab is opened."""
        tab.select(self._newest, outputs=self._page_outputs, **QUIET)

    def _connect(self) -> None:
        self._page_outputs = [self.page, self.names, self.gallery, self.where, self.newer, self.older]
        details = [self.chosen, self.picture, self.description, self.send, self.delete]
        for button, step in ((self.newer, -1), (self.older, 1)):
            button.click(self._step(step), self.page, self._page_outputs, **QUIET)
        chosen = self.gallery.select(self._choose, self.names, details, **TELLING)
        chosen.success(None, None, None, js=theme.scroll_to("#kept-picture"), **QUIET)
        self.send.click(self._mix.fill_from_history, self.chosen, self._mix.targets, **TELLING)
        self.delete.click(self._delete, [self.chosen, self.page], [*details, *self._page_outputs], **TELLING)

    def _whose(self) -> str:
        kept = f"The newest {self._galleries.most:,} pictures are kept, also across restarts."
        if self._galleries.shared:
            return f"Everybody who can open this app sees these pictures. {kept}"
        return f"Only you see these pictures, by your name where you signed in, or else in this browser. {kept}"

    def _of(self, request: gr.Request) -> History:
        return self._galleries.of(visitor_of(request))

    def _newest(self, request: gr.Request) -> tuple[Any, ...]:
        return self._turn(self._of(request), 1)

    def _step(self, step: int) -> Callable[[int, gr.Request], tuple[Any, ...]]:
        def turn(page: int, request: gr.Request) -> tuple[Any, ...]:
            return self._turn(self._of(request), page + step)

        return turn

    def _turn(self, history: History, page: int) -> tuple[Any, ...]:
        pages = history.pages()
        page = min(max(1, page), pages)
        kept = history.page(page)
        items = [(cached(self.gallery, each.path), caption_of(each)) for each in kept]
        count = f"{len(history):,} picture{'' if len(history) == 1 else 's'}"
        where = f"page {page} of {pages} · {count}" if kept else NOTHING
        return (
            page,
            [each.name for each in kept],
            gr.Gallery(items, selected_index=None),
            theme.remark(where),
            gr.Button(interactive=page > 1),
            gr.Button(interactive=page < pages),
        )

    def _choose(self, names: list[str], event: gr.SelectData, request: gr.Request) -> tuple[Any, ...]:
        with readable("the picture could not be shown"):
            kept = self._of(request).get(picked(names, event))
            settings = kept.settings
        ready = gr.Button(interactive=True)
        return kept.name, cached(self.picture, kept.path), theme.settings(settings), ready, ready

    def _delete(self, name: Any, page: int, request: gr.Request) -> tuple[Any, ...]:
        with readable("the picture could not be deleted"):
            self._of(request).delete(name)
        idle = gr.Button(interactive=False)
        return (None, None, theme.remark("Deleted."), idle, idle, *self._turn(self._of(request), page))
