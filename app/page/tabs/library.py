"""Library: all adapters in a table with actions for each and for many, upload, and a look into one."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from app.library.cards import Card
from app.library.uploads import is_lora
from app.page import library_html, theme
from app.page.adapter_table import make_adapter_table, rows_of
from app.page.tabs.events import QUIET, TELLING
from app.server.messages import readable
from app.server.served_files import address
from app.studio import Studio
from shira_diffusers.formats.paths import SUFFIX
from shira_diffusers.formats.peft import PEFT_CONFIG

THUMBNAILS_EVERY = 3.0  # seconds between two looks, while some are being drawn
SAVE = """(text) => {
  const [address, name] = JSON.parse(text)
  const link = document.createElement('a')
  Object.assign(link, { href: address, download: name })
  link.click()
}"""


class LibraryTab:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio) -> None:
        self._library, self._thumbnails = studio.session.library, studio.thumbnails
        self._limit = studio.max_upload_mb

    def lay_out(self) -> None:
        """Add the tab to the Blocks that is being built."""
        self.table = make_adapter_table(self._rows())
        with gr.Row(elem_id="library-line"):
            self.said = gr.HTML(elem_id="library-said", elem_classes="remark", padding=False)
            self.undo = gr.Button(**self._undoing(), size="md", min_width=90, scale=0, elem_id="undo")
        with gr.Row(elem_id="library"):
            with gr.Column(scale=4, min_width=300):
                self._lay_out_upload()
            with gr.Column(scale=6, min_width=300):
                self.inspected = gr.HTML(elem_id="inspected", padding=False)
        self.timer = gr.Timer(THUMBNAILS_EVERY, active=False)
        self.seen = gr.State(None)
        self.address = gr.Textbox(visible=False)
        self._connect()

    def _lay_out_upload(self) -> None:
        gr.Markdown("### Add adapters", elem_classes="heading")
        self.files = gr.File(
            label="Adapters (.safetensors)",
            file_count="multiple",
            file_types=[".safetensors", ".json"],
            type="filepath",
            height=150,
            elem_id="adapter-upload",
        )
        gr.Markdown(
            "SHiRA adapters of this project, or PEFT's `adapter_model.safetensors` together with its "
            f"`{PEFT_CONFIG}`, which has base and mask; up to {self._limit:g} MB each. They are copied into the "
            "app's own folder. LoRAs are converted if you like.",
            elem_classes="remark",
        )
        self.offered = gr.State([])  # LoRAs that were sent: files, each with PEFT's config or None
        self.convert = gr.Button("Convert to SHiRA at 2 %", variant="primary", visible=False, elem_id="convert-lora")
        self.added = gr.HTML(elem_id="library-added", elem_classes="remark", padding=False)

    def _connect(self) -> None:
        shown = [self.table, self.undo, self.timer, self.said]
        uploaded = [self.files, self.offered, self.convert, self.added, *shown]
        self.files.upload(self._upload, self.files, uploaded, **TELLING)
        waiting = {**TELLING, "show_progress": "minimal"}  # it draws a few pictures
        self.convert.click(
            self._convert_sent, self.offered, [self.offered, self.convert, self.added, *shown], **waiting
        )
        self.table.convert(self._convert, None, shown, **waiting)
        looked = self.table.inspect(self._inspect, None, self.inspected, **TELLING)
        looked.success(None, None, None, js=theme.scroll_to("#inspected"), **TELLING)
        copied = self.table.download(self._download, None, self.address, **TELLING)
        copied.success(None, self.address, None, js=SAVE, **TELLING)
        self.table.delete(self._delete, None, [*shown, self.inspected], **TELLING)
        self.table.rename(self._rename, None, [*shown, self.inspected], **TELLING)
        self.undo.click(self._undo, None, shown, **TELLING)
        self.timer.tick(self._look_again, self.seen, [self.seen, self.table, self.undo, self.timer], **QUIET)

    def refresh_on(self, shown: gr.Tab) -> None:
        """Show the library as it is when the tab is opened."""
        shown.select(self._shown, None, [self.table, self.undo, self.timer], **TELLING)

    # ---------------------------------------------------------------- what the buttons do

    def _upload(self, files: list[str] | None) -> Any:
        added, problems = [], []
        configs = [Path(file) for file in files or [] if file.endswith(".json")]
        adapters = [Path(file) for file in files or [] if not file.endswith(".json")]
        if configs and (len(configs), len(adapters)) != (1, 1):
            problems.append(f"An {PEFT_CONFIG} belongs to one adapter: upload the two together, by themselves")
            adapters = []
        config = next(iter(configs), None)
        loras = [(file, config) for file in adapters if is_lora(file)]
        for file in adapters:
            if (file, config) in loras:
                continue
            try:
                with readable("the adapter could not be taken in"):
                    added.append(self._library.add(file, config=config))
            except gr.Error as error:
                problems.append(str(error.message))
        added_names = [f"Added {_bold(entry.name)}{self._but(entry)}." for entry in added]
        offers = [
            f"{_bold(file.name)} is a LoRA: it runs as an adapter once it is converted, which keeps a part of it."
            for file, _ in loras
        ]
        said = " ".join([*added_names, *offers, *map(_warned, problems)])
        return None, loras, gr.Button(visible=bool(loras)), said, *self._shown(), ""

    def _but(self, card: Card) -> str:
        """What the user should know of a file that was added."""
        twin = self._library.twin(card)
        unfit = "" if card.fits else ", which does not fit this model"
        return f"{unfit}, the same file as {_bold(twin)}" if twin else unfit

    def _convert_sent(self, offered: list[tuple[Path, Path | None]]) -> Any:
        said = []
        for file, config in offered:
            try:
                with readable("the LoRA could not be converted"):
                    said.append(_converted(self._library.convert(file, config=config)))
            except gr.Error as error:
                said.append(_warned(str(error.message)))
        return [], gr.Button(visible=False), " ".join(said), *self._shown(), ""

    def _convert(self, event: gr.EventData) -> Any:
        """A LoRA that lies in the folder of adapters."""
        with readable("the LoRA could not be converted"):
            card = self._library.entry(_of(event, "name"))
            config = card.path / PEFT_CONFIG if card.path.is_dir() else None
            said = _converted(self._library.convert(card.file, card.name, config))
        return *self._shown(), said

    def _inspect(self, event: gr.EventData) -> str:
        with readable("the adapter could not be read"):
            name = _of(event, "name")
            return library_html.inspection(self._library.entry(name), self._library.inspect(name))

    def _download(self, event: gr.EventData) -> str:
        """The address of a copy, and the name that it is to have."""
        with readable("the adapter could not be read"):
            card = self._library.entry(_of(event, "name"))
            return json.dumps([address(card.file), f"{card.name}{SUFFIX}"])

    def _delete(self, event: gr.EventData) -> Any:
        names = _of(event, "names")
        with readable("the adapter could not be deleted"):
            kept = self._library.delete(*names if isinstance(names, list) else [names])
        return *self._shown(), _deleted(names, kept), ""

    def _undo(self) -> Any:
        with readable("the adapter could not be brought back"):
            names = [card.name for card in self._library.undo_all()]
        return *self._shown(), f"{_listed(names)} {'is' if len(names) == 1 else 'are'} back."

    def _rename(self, event: gr.EventData) -> Any:
        old = _of(event, "name")
        with readable("the adapter could not be renamed"):
            card = self._library.rename(old, _of(event, "to"))
        return *self._shown(), f"{_bold(old)} is now {_bold(card.name)}.", ""

    # ---------------------------------------------------------------- what is shown

    def _rows(self) -> list[dict[str, Any]]:
        return rows_of(self._library, self._thumbnails)

    def _look_again(self, seen: Any) -> Any:
        now = (self._library.version, self._thumbnails.version)
        return [gr.skip()] * 4 if now == seen else (now, *self._shown())

    def _undoing(self) -> dict[str, Any]:
        deleted = self._library.deleted_last
        what = deleted[0] if len(deleted) == 1 else f"{len(deleted)} adapters"
        return {"value": f"Undo delete of {what}", "visible": bool(deleted)}

    def _shown(self) -> tuple[Any, Any, Any]:
        """Table, undo button and timer as the library is now; the timer waits for thumbnails."""
        rows = self._rows()
        waiting = any(not row["reason"] and not row["thumbnail"] for row in rows)
        return gr.HTML(rows=rows), gr.Button(**self._undoing()), gr.Timer(active=waiting)


def _of(event: gr.EventData, key: str) -> Any:
    """What the table sent with an event, which may be anything."""
    return getattr(event, key, None)


def _converted(card: Card) -> str:
    kept = 100 * float(card.metadata["effect_kept"])
    return (
        f"Converted {_bold(card.name)}, which reproduces {kept:.0f} % of the LoRA's effect on the calibration pictures."
    )


def _warned(problem: str) -> str:
    """What is said of a file that was not taken in; a message says it too, but goes away."""
    gr.Warning(theme.plain(problem))
    return f"Not added: {theme.plain(problem)}."


def _deleted(names: Sequence[str], kept: Sequence[str]) -> str:
    """What is said of adapters that were deleted, of which some are kept: the files of the others were gone."""
    them = ("it" if len(names) == 1 else "them") if len(kept) == len(names) else _listed(kept)
    return f"Deleted {_listed(names)}." + (f" Undo brings {them} back." if kept else "")


def _listed(names: Sequence[str]) -> str:
    return _bold(names[0]) if len(names) == 1 else f"{len(names)} adapters"


def _bold(name: object) -> str:
    return f"<b>{escape(str(name))}</b>"
