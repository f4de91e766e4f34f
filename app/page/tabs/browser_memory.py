"""What a browser keeps of Mix: the settings, those before them, and which pictures are of this visit."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from app.page.tabs.events import QUIET, TELLING

SECRET = "shira"  # the same after a restart: what is kept is no secret, but Gradio reads it back only with one
# NAMES are the fields of the settings, in the order of the inputs
# window.shiraKept is what the storage gets: several fields can change before Gradio has handed over the first
KEEP = """(...inputs) => {
  const now = Object.fromEntries(NAMES.map((name, place) => [name, inputs[place]]))
  const same = (other) => JSON.stringify(other) === JSON.stringify(now)
  const kept = window.shiraKept
  if (!window.shiraReopened || same(kept?.now)) return { __type__: 'update' }
  const at = Date.now()
  const apart = kept?.now && at - (window.shiraChanged ?? 0) > 500  // what changes together is undone together
  window.shiraChanged = at
  const before = apart ? [kept.now, ...kept.before].slice(0, 50) : kept?.before ?? []
  return window.shiraKept = { now, before: same(before[0]) ? before.slice(1) : before }  // it came field by field
}"""
UNDO = """(...inputs) => {
  const [last, ...before] = window.shiraKept?.before ?? []
  if (!last) return [{ __type__: 'update' }, ...inputs]
  window.shiraChanged = Date.now()
  window.shiraKept = { now: last, before }
  return [window.shiraKept, ...NAMES.map((name, place) => name in last ? last[name] : inputs[place])]
}"""
REOPEN = """(kept) => {
  window.shiraReopened = true
  window.shiraKept = kept
  window.shiraLost = sessionStorage.shiraDrawing ?? ''
  delete sessionStorage.shiraDrawing
  window.shiraChanged = Date.now()
  const now = kept?.now ?? {}
  return NAMES.map((name) => name in now ? now[name] : { __type__: 'update' })
}"""
AGREE = """(shown, ...inputs) => {
  const plain = (value) => typeof value === 'string' ? value.trim() : value
  const sorted = (value) => value && typeof value === 'object'
    ? Object.keys(value).sort().map((key) => [key, sorted(value[key])])
    : plain(value)
  const called = (name) => window.shiraRenamed?.get(name) ?? name
  const strong = (mix) => Object.entries(mix ?? {}).filter(([, strength]) => strength !== 0)
  const on = (mix) => Object.fromEntries(strong(mix).map(([name, strength]) => [called(name), strength]))
  const said = (name, value) => JSON.stringify(sorted(name === 'mix' ? on(value) : value ?? 0)) // an emptied size is 0
  const then = shown?.settings ?? {}
  const random = (name, value) => name === 'seed' && (value ?? -1) === -1  // which no picture was drawn with
  const differs = (name, value) => name in then && !random(name, value) && said(name, then[name]) !== said(name, value)
  const changed = NAMES.filter((name, place) => differs(name, inputs[place]))
  const words = { mix: 'styles', method: 'merge method', negative_mix: 'styles in the negative half' }
  const text = changed.map((name) => words[name] ?? name.replaceAll('_', ' ')).join(', ')
  return [text && `Changed since drawn: ${text}`, { __type__: 'update', visible: changed.length > 0 }]
}"""
# KEY names the tab, NAMES its fields
FILL = """(kept) => {
  (window.shiraFilled ??= {}).KEY = true
  return NAMES.map((name) => name in (kept ?? {}) ? kept[name] : { __type__: 'update' })
}"""
STORE = """(...inputs) => window.shiraFilled?.KEY
  ? Object.fromEntries(NAMES.map((name, place) => [name, inputs[place]])) : { __type__: 'update' }"""
LOST = "(...kept) => [...kept.slice(0, -1), window.shiraLost]"


class BrowserMemory:
    """Keeps the settings in the browser's storage, so that a reload or a restart of the server changes nothing.

    Args:
        fields: the components that hold the settings, by field.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._names, self._inputs = json.dumps(list(fields)), list(fields.values())
        self._settings = gr.BrowserState(None, storage_key="shira-settings", secret=SECRET)
        self.pictures = gr.BrowserState([], storage_key="shira-pictures", secret=SECRET)
        """Names in History, as the gallery of this visit shows them."""
        self.shown = gr.BrowserState(None, storage_key="shira-shown", secret=SECRET)
        """The picture that is looked at: its name in History, if it has one, and its settings."""

    def connect(self, undo: gr.Button) -> None:
        """Keep the settings with each change; ``undo`` goes back by one."""
        changes = [each.change for each in self._inputs]
        gr.on(changes, None, self._inputs, self._settings, js=self._named(KEEP), **QUIET, trigger_mode="multiple")
        undo.click(None, self._inputs, [self._settings, *self._inputs], js=self._named(UNDO), **QUIET)

    def compare(self, changed: gr.HTML, use: gr.Button) -> None:
        """Say what is no longer as in the picture that is shown, and show ``use`` then."""
        changes = [self.shown.change, *(each.change for each in self._inputs)]
        script, compared = self._named(AGREE), [self.shown, *self._inputs]
        gr.on(changes, None, compared, [changed, use], js=script, **QUIET, trigger_mode="multiple")

    def reopen(self, load: Any, show: Callable[..., Any], outputs: Sequence[Any]) -> Any:
        """As the page loads, fill in the settings in the browser, then call ``show`` with what is kept; that event."""
        # not gr.on(None, ...), which also runs whenever an input changes, and then undoes what was changed since
        loaded = load(None, self._settings, self._inputs, js=self._named(REOPEN), **QUIET)
        loaded.then(None, self._inputs, self._settings, js=self._named(KEEP), **QUIET)
        lost = gr.Textbox(visible=False)  # a drawing, by this very load
        return loaded.then(show, [self._settings, self.pictures, self.shown, lost], list(outputs), js=LOST, **TELLING)

    def _named(self, script: str) -> str:
        return script.replace("NAMES", self._names)


def keep_fields(tab: str, fields: Mapping[str, Any], load: Any) -> None:
    """Keep what a visitor enters in a tab in the browser's storage, so that a reload changes nothing.

    Called outside of the tab: what is in one is read from the storage only once the tab is opened.

    Args:
        tab: a word, by which it is stored.
        fields: the components, by name.
        load: the event of the page that opens.
    """
    kept, inputs = gr.BrowserState(None, storage_key=f"shira-{tab}", secret=SECRET), list(fields.values())
    store, fill = (each.replace("KEY", tab).replace("NAMES", json.dumps(list(fields))) for each in (STORE, FILL))
    load(None, kept, inputs, js=fill, **QUIET)
    changes = [each.change for each in inputs]
    gr.on(changes, None, inputs, kept, js=store, **QUIET, trigger_mode="multiple")
