"""Library: all adapters, upload, a look into one, rename, delete and undo, download."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from app.library.uploads import is_lora
from app.page import library_html, theme
from app.page.tabs.events import TELLING
from app.server.messages import readable
from app.server.served_files import cached
from app.studio import Studio
from shira_diffusers.formats.peft import PEFT_CONFIG


class LibraryTab:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio) -> None:
        self._library = studio.session.library
        self._limit = studio.max_upload_mb

    def lay_out(self) -> None:
        """Add the tab to the Blocks that is being built."""
        self.table = gr.HTML(library_html.table(self._library.entries), elem_id="library-table", padding=False)
        with gr.Row(elem_id="library"):
            with gr.Column(scale=4, min_width=300):
                self._lay_out_upload()
            with gr.Column(scale=6, min_width=300):
                self._lay_out_actions()
        self.inspected = gr.HTML(elem_id="inspected", padding=False)
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

    def _lay_out_actions(self) -> None:
        gr.Markdown("### Look into one", elem_classes="heading")
        self.chosen = gr.Dropdown(
            self._names(), value=next(iter(self._names()), None), label="Adapter", elem_id="library-chosen"
        )
        with gr.Row(elem_classes="buttons"):
            self.inspect = gr.Button("Inspect", variant="primary", min_width=90)
            self.download = gr.DownloadButton("Download", size="lg", min_width=120)
            self.delete = gr.Button("Delete", variant="stop", min_width=90)
            self.undo = gr.Button(
                self._undo_label(), interactive=bool(self._library.deleted), min_width=90, elem_id="undo"
            )
        with gr.Row(elem_classes="rename"):
            self.name = gr.Textbox(label="New name", max_length=60, scale=3, min_width=140)
            self.rename = gr.Button("Rename", min_width=90, scale=1)
        self.said = gr.HTML(elem_id="library-said", elem_classes="remark", padding=False)

    def _connect(self) -> None:
        shown = [self.table, self.chosen, self.undo, self.added, self.said]
        self.files.upload(self._upload, self.files, [self.files, self.offered, self.convert, *shown], **TELLING)
        waiting = {**TELLING, "show_progress": "minimal"}  # it draws a few pictures
        self.convert.click(self._convert, self.offered, [self.offered, self.convert, *shown], **waiting)
        looked = self.inspect.click(self._inspect, self.chosen, self.inspected, **TELLING)
        looked.success(None, None, None, js=theme.scroll_to("#inspected"), **TELLING)
        self.delete.click(self._delete, self.chosen, [*shown, self.inspected], **TELLING)
        self.undo.click(self._undo, None, shown, **TELLING)
        gr.on(
            [self.rename.click, self.name.submit],
            self._rename,
            [self.chosen, self.name],
            [*shown, self.name, self.inspected],
            **TELLING,
        )
        self.chosen.change(lambda name: self._prepared(name), self.chosen, self.download, **TELLING)

    def refresh_on(self, shown: gr.Tab) -> None:
        """Show the library as it is when the tab is opened."""
        shown.select(lambda chosen: self._shown(chosen), self.chosen, [self.table, self.chosen, self.undo], **TELLING)
        shown.select(lambda chosen: self._prepared(chosen), self.chosen, self.download, **TELLING)

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
        for problem in problems:
            gr.Warning(problem)
        added_names = [
            f"Added {_bold(entry.name)}{'' if entry.fits else ', which does not fit this model'}." for entry in added
        ]
        offers = [
            f"{_bold(file.name)} is a LoRA: it runs as an adapter once it is converted, which keeps a part of it."
            for file, _ in loras
        ]
        chosen = added[-1].name if added else None
        said = " ".join([*added_names, *offers])
        return None, loras, gr.Button(visible=bool(loras)), *self._shown(chosen), said, ""

    def _convert(self, offered: list[tuple[Path, Path | None]]) -> Any:
        added = []
        for file, config in offered:
            try:
                with readable("the LoRA could not be converted"):
                    added.append(self._library.convert(file, config=config))
            except gr.Error as error:
                gr.Warning(str(error.message))
        said = [
            f"Converted {_bold(card.name)}, which reproduces {100 * float(card.metadata['effect_kept']):.0f} % of the "
            "LoRA's effect on the calibration pictures."
            for card in added
        ]
        chosen = added[-1].name if added else None
        return [], gr.Button(visible=False), *self._shown(chosen), " ".join(said), ""

    def _inspect(self, name: str | None) -> str:
        with readable("the adapter could not be read"):
            return library_html.inspection(self._library.entry(name), self._library.inspect(name))

    def _delete(self, name: str | None) -> Any:
        with readable("the adapter could not be deleted"):
            self._library.delete(name)
        return *self._shown(None), "", f"Deleted {_bold(name)}. Undo brings it back.", ""

    def _undo(self) -> Any:
        with readable("the adapter could not be brought back"):
            entry = self._library.undo()
        return *self._shown(entry.name), "", f"{_bold(entry.name)} is back."

    def _rename(self, old: str | None, new: str) -> Any:
        with readable("the adapter could not be renamed"):
            entry = self._library.rename(old, new)
        return *self._shown(entry.name), "", f"{_bold(old)} is now {_bold(entry.name)}.", "", ""

    # ---------------------------------------------------------------- what is shown

    def _names(self) -> list[str]:
        return [entry.name for entry in self._library.entries]

    def _undo_label(self) -> str:
        deleted = self._library.deleted
        return f"Undo delete of {deleted[0]}" if deleted else "Undo delete"

    def _shown(self, chosen: str | None) -> tuple[Any, Any, Any]:
        """Table, choice and undo button as the library is now."""
        names = self._names()
        chosen = chosen if chosen in names else next(iter(names), None)
        undo = gr.Button(self._undo_label(), interactive=bool(self._library.deleted))
        return library_html.table(self._library.entries), gr.Dropdown(names, value=chosen), undo

    def _prepared(self, name: str | None) -> Any:
        """The download button with a copy of the file of a name."""
        entry = next((entry for entry in self._library.entries if entry.name == name), None)
        return gr.DownloadButton(value=cached(self.download, entry.file) if entry else None)


def _bold(name: object) -> str:
    return f"<b>{escape(str(name))}</b>"
