"""What a browser keeps of Mix: the settings, those before them, and which pictures are of this visit."""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from app.page.tabs.events import QUIET, TELLING

SECRET = "shira"  # the same after a restart: what is kept is no secret, but Gradio reads it back only with one
KEEP = """(kept, prompt, mix, seed, steps, guidance, method) => {
  const now = { prompt, mix, seed, steps, guidance, method }
  if (!window.shiraReopened || JSON.stringify(now) === JSON.stringify(kept?.now)) return kept
  const [at, before] = [Date.now(), kept?.before ?? []]
  const apart = kept?.now && at - (window.shiraChanged ?? 0) > 500  // what changes together is undone together
  window.shiraChanged = at
  return { now, before: apart ? [kept.now, ...before].slice(0, 50) : before }
}"""
UNDO = """(kept, ...inputs) => {
  const [last, ...before] = kept?.before ?? []
  if (!last) return [kept, ...inputs]
  return [{ now: last, before }, last.prompt, last.mix, last.seed, last.steps, last.guidance, last.method]
}"""
REOPEN = """(kept, ...inputs) => {
  window.shiraReopened = true
  const now = kept?.now
  return now ? [now.prompt, now.mix, now.seed, now.steps, now.guidance, now.method] : inputs
}"""
LOST = """(...kept) => {
  const lost = sessionStorage.shiraDrawing ?? ''
  delete sessionStorage.shiraDrawing
  return [...kept.slice(0, 2), lost]
}"""


class BrowserMemory:
    """Keeps the settings in the browser's storage, so that a reload or a restart of the server changes nothing."""

    def __init__(self) -> None:
        self._settings = gr.BrowserState(None, storage_key="shira-settings", secret=SECRET)
        self.pictures = gr.BrowserState([], storage_key="shira-pictures", secret=SECRET)
        """Names in History, as the gallery of this visit shows them."""

    def connect(self, inputs: Sequence[Any], undo: gr.Button) -> None:
        """Keep ``inputs`` with each change; ``undo`` goes back by one."""
        changed = [each.change for each in inputs]
        gr.on(changed, None, [self._settings, *inputs], self._settings, js=KEEP, **QUIET)
        undo.click(None, [self._settings, *inputs], [self._settings, *inputs], js=UNDO, **QUIET)

    def reopen(self, inputs: Sequence[Any], show: Callable[..., Any], outputs: Sequence[Any]) -> None:
        """As the page loads, fill ``inputs`` in the browser, then call ``show`` with what is kept."""
        loaded = gr.on(None, None, [self._settings, *inputs], list(inputs), js=REOPEN, **QUIET)
        lost = gr.Textbox(visible=False)  # a drawing, by this very load
        loaded.then(show, [self._settings, self.pictures, lost], list(outputs), js=LOST, **TELLING)


def mix_without_lost(kept: Any, names: Sequence[str]) -> Any:
    """An update of the styles: the kept mix without those that are gone; none where all are here."""
    mix = (kept or {}).get("now", {}).get("mix", {})
    return gr.skip() if set(mix) <= set(names) else gr.HTML(value={name: mix[name] for name in mix if name in names})
