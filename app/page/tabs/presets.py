"""Presets, and a fold for sharing the settings as a link or JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from app.drawing.restore import to_keep
from app.history.png_metadata import parse_settings
from app.history.presets import tidy
from app.page import theme
from app.page.tabs.events import QUIET, TELLING, Values
from app.server.messages import readable
from app.settings.checks import SettingsError
from app.settings.settings import Settings
from app.studio import Studio

ADD_ADDRESS = """(_, text) => {
  const link = new URL(window.location.href)
  link.search = new URLSearchParams({ settings: JSON.stringify(JSON.parse(text)) })
  link.hash = ''
  return link.href
}"""
SAVE, REPLACE = "Save", "Replace"
FORGET_ADDRESS = """() => {
  const address = new URL(window.location.href)
  address.searchParams.delete('settings')
  history.replaceState(history.state, '', address)
}"""
READ_ADDRESS = "() => new URLSearchParams(window.location.search).get('settings') ?? ''"


class PresetsFold:
    """The components of the choice and of the fold, and what they do."""

    def __init__(self, studio: Studio) -> None:
        self._presets, self._session = studio.presets, studio.session

    def lay_out(self) -> None:
        """Add the choice of a preset, and saving one, to the Blocks that is being built."""
        with gr.Row(elem_id="presets"):
            self.chosen = gr.Dropdown(self._names(), value=None, label="Preset", min_width=140, scale=3)
            self.name = gr.Textbox(label="Save settings as", max_length=60, min_width=140, scale=3)
            self.save = gr.Button(SAVE, min_width=90, size="md", scale=0)
            self.asked = gr.Textbox("", visible=False)  # the name that the next press overwrites

    def lay_out_sharing(self) -> None:
        """Add the fold to the Blocks that is being built."""
        with gr.Accordion("Share, delete a preset", open=False, elem_id="sharing"):
            with gr.Row(elem_classes="line"):
                self.share = gr.Button("Share", min_width=100, size="md")
                self.apply = gr.Button("Apply the JSON below", min_width=100, size="md")
                self.delete = gr.Button("Delete the preset", min_width=100, size="md", elem_classes="asks")
            self.link = gr.Textbox(label="Link", visible=False, buttons=["copy"], interactive=False)
            self.text = gr.Textbox(label="Settings as JSON", lines=2, max_lines=8, buttons=["copy"])

    def connect(
        self,
        inputs: Sequence[Any],
        settings: Callable[[Values], Settings],
        targets: Sequence[Any],
        fill: Callable[[Mapping[str, Any]], list[Any]],
        load: Any,
    ) -> None:
        """Say what happens, once Mix has all its components; for the arguments see ``MixTab``."""
        self._settings, self._fill, self._targets = settings, fill, targets
        self.chosen.focus(lambda: gr.Dropdown(choices=self._names()), outputs=self.chosen, **TELLING)
        # not `input`, which comes whenever the Tab key leaves the box, and would undo what was changed since
        self.chosen.select(self._choose, None, list(targets), **TELLING)
        self.delete.click(self._delete, self.chosen, self.chosen, **TELLING)
        gr.on(
            [self.save.click, self.name.submit],
            self._save,
            {self.name, self.asked, *inputs},
            [self.chosen, self.name, self.save, self.asked],
            **TELLING,
        )
        self.name.change(None, None, [self.save, self.asked], js=f"() => ['{SAVE}', '']", **QUIET)
        shown = self.share.click(self._share, set(inputs), [self.link, self.text], **TELLING)
        shown.success(None, [self.link, self.text], self.link, js=ADD_ADDRESS, **TELLING)
        self.apply.click(self._apply, self.text, list(targets), **TELLING)
        address = gr.Textbox(visible=False)
        opened = load(self._open, address, list(targets), js=READ_ADDRESS, **TELLING)
        opened.success(None, None, None, js=FORGET_ADDRESS, **QUIET)  # so that a reload keeps what is changed

    def _names(self) -> list[str]:
        return list(self._presets.names)

    def _choose(self, event: gr.SelectData) -> list[Any]:
        with readable("the preset could not be shown"):
            return self._fill(self._presets.get(event.value))

    def _delete(self, name: Any) -> Any:
        with readable("the preset could not be deleted"):
            if not name:
                raise SettingsError("choose a preset first")
            self._presets.delete(name)
        return gr.Dropdown(choices=self._names(), value=None)

    def _save(self, values: Values) -> tuple[Any, Any, str, str]:
        name = tidy(values[self.name])
        if name in self._presets.names and values[self.asked] != name:
            gr.Warning(theme.plain(f"There is a preset “{name}”. Press Replace to overwrite it, or change the name."))
            return gr.skip(), gr.skip(), REPLACE, name
        with readable("the preset could not be saved"):
            saved = self._presets.save(values[self.name], to_keep(self._settings(values), self._session))
        gr.Info(theme.plain(f"Saved as “{saved}”."))
        return gr.Dropdown(choices=self._names(), value=saved), "", SAVE, ""

    def _share(self, values: Values) -> tuple[Any, str]:
        with readable("the settings could not be shared"):
            settings = self._settings(values).as_dict()
        return gr.Textbox(visible=True), json.dumps(settings, indent=1, ensure_ascii=False)

    def _apply(self, text: Any) -> list[Any]:
        with readable("the settings could not be read"):
            return self._fill(parse_settings(text if isinstance(text, str) else ""))

    def _open(self, text: Any) -> list[Any]:
        return self._apply(text) if text else [gr.skip()] * len(self._targets)
