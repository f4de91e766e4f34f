"""History: all pictures that were kept, the newest first, a page at a time."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from app.history.archive import write_zip
from app.history.history import History, Kept, page_of, pages_of
from app.page import theme
from app.page.tabs.events import QUIET, TELLING, caption_of, gallery, picked, picture
from app.page.tabs.mix import MixTab
from app.server.messages import readable
from app.server.served_files import cached
from app.server.visitors import visitor_of
from app.settings.checks import SettingsError
from app.studio import Studio

NOTHING = "Nothing yet: what you draw is kept here, and a search shows what has all of its words."
NO_FAVOURITES = "No favourites yet: choose a picture and add it to them."
STAR, UNSTAR = "Add to favourites", "Remove from favourites"
MOST_PACKED = 500  # pictures of a zip


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
                with gr.Row(elem_id="find"):
                    self.words = gr.Textbox("", label="Search prompts, styles and seeds", min_width=160, scale=3)
                    self.favourites = gr.Checkbox(False, label="Favourites", min_width=140)
                self.gallery = gallery("kept", columns=6)
                with gr.Row(elem_id="pages"):
                    self.newer = gr.Button("← Newer", min_width=90)
                    self.where = gr.HTML(elem_classes="where", padding=False)
                    self.older = gr.Button("Older →", min_width=90)
                with gr.Row():
                    self.pack = gr.Button("Pack these as a zip", size="md", min_width=120)
                    self.zip = gr.DownloadButton("Download the zip", size="md", min_width=120, interactive=False)
            with gr.Column(scale=4, min_width=320):
                self.picture = picture("kept-picture", "Chosen picture", type="filepath")
                self.description = gr.HTML(theme.remark("Choose a picture to see how it was made."), elem_id="told")
                with gr.Row():
                    self.send = gr.Button("Send to Mix", variant="primary", size="md", min_width=170, interactive=False)
                    self.more = gr.Button("More like this", size="md", min_width=170, interactive=False)
                    self.star = gr.Button(STAR, size="md", min_width=170, interactive=False)
                    self.delete = gr.Button(
                        "Delete", variant="stop", size="md", min_width=170, interactive=False, elem_classes="asks"
                    )
        self._connect()

    def refresh_on(self, tab: gr.Tab) -> None:
        """Show the newest pictures whenever the tab is opened."""
        tab.select(self._newest, self._search, self._page_outputs, **QUIET)

    def _connect(self) -> None:
        self._page_outputs = [self.page, self.names, self.gallery, self.where, self.newer, self.older]
        self._search = [self.words, self.favourites]
        details = [self.chosen, self.picture, self.description, self.send, self.more, self.star, self.delete]
        for button, step in ((self.newer, -1), (self.older, 1)):
            button.click(self._step(step), [self.page, *self._search], self._page_outputs, **QUIET)
        gr.on([self.words.change, self.favourites.change], self._newest, self._search, self._page_outputs, **QUIET)
        starred = self.star.click(self._star, self.chosen, self.star, **TELLING)
        starred.success(self._step(0), [self.page, *self._search], self._page_outputs, **QUIET)
        self.pack.click(self._pack, self._search, self.zip, **TELLING)
        chosen = self.gallery.select(self._choose, self.names, details, **TELLING)
        chosen.success(None, None, None, js=theme.scroll_to("#kept-picture"), **QUIET)
        self.send.click(self._mix.fill_from_history, self.chosen, self._mix.targets, **TELLING)
        self.delete.click(
            self._delete, [self.chosen, self.page, *self._search], [*details, *self._page_outputs], **TELLING
        )

    def _whose(self) -> str:
        kept = f"The newest {self._galleries.most:,} pictures are kept, favourites longest, also across restarts."
        if self._galleries.shared:
            return f"Everybody who can open this app sees these pictures. {kept}"
        return f"Only you see these pictures, by your name where you signed in, or else in this browser. {kept}"

    def _of(self, request: gr.Request) -> History:
        return self._galleries.of(visitor_of(request))

    def _newest(self, words: str, favourites: bool, request: gr.Request) -> tuple[Any, ...]:
        return self._step(0)(1, words, favourites, request)

    def _step(self, step: int) -> Callable[..., tuple[Any, ...]]:
        def turn(page: int, words: str, favourites: bool, request: gr.Request) -> tuple[Any, ...]:
            found = self._of(request).find(words, favourites=favourites)
            return self._turn(found, page + step, _nothing(words, favourites))

        return turn

    def _turn(self, found: tuple[Kept, ...], page: int, nothing: str) -> tuple[Any, ...]:
        pages = pages_of(found)
        page = min(max(1, page), pages)
        kept = page_of(found, page)
        items = [
            (cached(self.gallery, each.path), f"{'favourite: ' * each.favourite}{caption_of(each)}") for each in kept
        ]
        count = f"{len(found):,} picture{'' if len(found) == 1 else 's'}"
        where = f"page {page} of {pages} · {count}" if kept else nothing
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
        star = gr.Button(UNSTAR if kept.favourite else STAR, interactive=True)
        return kept.name, cached(self.picture, kept.path), theme.settings(settings), ready, ready, star, ready

    def _delete(self, name: Any, page: int, words: str, favourites: bool, request: gr.Request) -> tuple[Any, ...]:
        with readable("the picture could not be deleted"):
            self._of(request).delete(name)
        idle = gr.Button(interactive=False)
        shown = self._step(0)(page, words, favourites, request)
        return (None, None, theme.remark("Deleted."), *[idle] * 4, *shown)

    def _star(self, name: Any, request: gr.Request) -> str:
        with readable("the picture could not be marked"):
            history = self._of(request)
            on = not history.get(name).favourite
            history.star(name, on=on)
        return UNSTAR if on else STAR

    def _pack(self, words: str, favourites: bool, request: gr.Request) -> gr.DownloadButton:
        """The pictures that were found, the newest ``MOST_PACKED`` of them, as a zip to be downloaded."""
        found = self._of(request).find(words, favourites=favourites)[:MOST_PACKED]
        with readable("the pictures could not be packed"), tempfile.TemporaryDirectory() as folder:
            if not found:
                raise SettingsError("no pictures to pack: search for others")
            archive = Path(folder) / "history.zip"
            write_zip(((caption_of(each), each.path) for each in found), archive)
            counted = f"{len(found)} picture{'' if len(found) == 1 else 's'}"
            return gr.DownloadButton(f"Download {counted}", value=cached(self.zip, archive), interactive=True)


def _nothing(words: str, favourites: bool) -> str:
    """What to say where a search finds nothing."""
    if words.strip():
        return f"No {'favourite' if favourites else 'picture'} has all of these words."
    return NO_FAVOURITES if favourites else NOTHING
