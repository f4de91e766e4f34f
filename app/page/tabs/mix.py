"""Mix: a prompt, the styles, the picture with what it took, and this visit's pictures."""

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from app.drawing import random_settings
from app.drawing.preview_budget import PreviewBudget
from app.drawing.requests import Stopped
from app.drawing.restore import Restored, left_out, restore
from app.drawing.suggestions import first_mix
from app.history.history import Kept
from app.history.png_metadata import read_settings
from app.page import theme
from app.page.style_picker import make_style_picker, shown
from app.page.tabs.browser_memory import BrowserMemory
from app.page.tabs.events import (
    PREVIEWING,
    QUIET,
    TELLING,
    DrawButtons,
    Values,
    at_most_often,
    caption_of,
    gallery,
    picture,
)
from app.page.tabs.more_settings import MoreSettings
from app.page.tabs.presets import PresetsFold
from app.server.messages import readable
from app.server.served_files import cached, cached_picture
from app.server.visitors import visitor_of
from app.settings.checks import SettingsError
from app.settings.settings import DEFAULT_GUIDANCE, DEFAULT_METHOD, DEFAULT_STEPS, MAX_GUIDANCE, MAX_STEPS, Settings
from app.studio import Studio
from shira_diffusers.adapters.merge import MERGE_METHODS

MIX = "mix"  # the task, for requests
SUGGESTIONS_SHOWN = 4  # one row of chips
GALLERY_HOLDS = 24  # pictures of this visit; History has the others
WATCH_SECONDS = 2.0  # between two looks at what is new: quick enough for an upload in another tab, one compare if idle
ROLL_DICE = "() => Math.floor(Math.random() * 1000000)"
REUSE_SEED = """element.addEventListener('click', (event) => {
  const seed = event.target.closest('.reuse')
  if (seed) trigger('reuse', { seed: Number(seed.textContent) })
})"""
LIVE = "(live) => ({ __type__: 'update', props: { live } })"
ASK_IF_LIVE = "(live, asked) => live ? asked + 1 : asked"  # else the server is not troubled with each change
SHOW_PICTURE = (
    f"(...given) => {{ sessionStorage.shiraDrawing = true; return ({theme.scroll_to('#picture')})(...given) }}"
)


class MixTab:
    """The components of the tab and what they do.

    Other tabs read the settings through ``inputs`` and ``settings``, and send some here through ``targets`` and
    ``fill``. ``load`` is the event of the page that opens.
    """

    def __init__(self, studio: Studio, tabs: gr.Tabs, header: gr.HTML, load: Any) -> None:
        self._studio = studio
        self._session = studio.session
        self._tabs = tabs
        self._header = header
        self._load = load
        self._budget = PreviewBudget()

    def lay_out(self) -> None:
        """Add the tab to the Blocks that is being built."""
        with gr.Row(elem_id="mixer"):
            with gr.Column(scale=5, min_width=320):
                self._lay_out_prompt()
                self._lay_out_actions()
                self._lay_out_details()
                self.presets = PresetsFold(self._studio)
                self.presets.lay_out()
                with gr.Accordion("More settings", open=False, elem_id="more"):
                    more = self._lay_out_more()
                self.style_picker = make_style_picker(self._cards(), first_mix(self._session.names_first))
                self.refused = gr.HTML(**self._refused(), elem_id="refused", padding=False)
                self.presets.lay_out_sharing()
            with gr.Column(scale=6, min_width=320, elem_id="results"):
                self._lay_out_results()
        self.fields = {
            "prompt": self.prompt,
            "mix": self.style_picker,
            "seed": self.seed,
            "steps": self.steps,
            "guidance": self.guidance,
            **more,
        }
        self.inputs = list(self.fields.values())
        self._memory = BrowserMemory(self.fields)
        self.shown = self._memory.shown
        self._stage = [self.picture, self.facts, self.shown]
        self.targets = [self._tabs, *self.inputs, *self._stage]
        self._connect()
        self._connect_preview()
        self._connect_watch()
        self.presets.connect(self.inputs, self.settings, self.targets, self.fill, self._load)
        self._memory.connect(self.undo)
        self._memory.compare(self.changed, self.use)
        self.prompt.change(self._counted, self.prompt, self.tokens, **QUIET)  # kept first, however slow the server is
        outputs = [self.style_picker, self.gallery, *self._stage]
        reopened = self._memory.reopen(self._load, self._reopen, outputs)
        self._buttons.idle_after(reopened)  # what is drawn before that would be covered by what was kept

    def _lay_out_prompt(self) -> None:
        suggestions = self._session.suggestions[:SUGGESTIONS_SHOWN]
        with gr.Column(elem_id="prompt-box"):
            self.prompt = gr.Textbox(
                suggestions[0], label="Prompt", lines=2, max_lines=5, elem_id="prompt", submit_btn=False, autofocus=True
            )
            self.tokens = gr.HTML(self._counted(suggestions[0]), elem_id="tokens", padding=False)
        chips = gr.Dataset(
            components=[gr.Textbox(visible=False)],
            samples=[[text] for text in suggestions],
            sample_labels=[text.removeprefix("a picture of ") for text in suggestions],
            label="Try",
            type="values",
            elem_id="suggestions",
        )
        chips.click(lambda row: row[0], chips, self.prompt, **QUIET)

    def _lay_out_actions(self) -> None:
        with gr.Row(elem_id="actions"):
            self.generate = gr.Button(
                "Generate", variant="primary", size="lg", scale=2, min_width=120, interactive=False
            )
            self.stop = gr.Button("Stop", variant="stop", size="lg", scale=2, min_width=120, visible=False)
            self.surprise = gr.Button("Surprise me", size="lg", min_width=110, interactive=False)
            self.undo = gr.Button("Undo", size="lg", min_width=70)
            self.live = gr.Checkbox(False, label="Live preview", container=False, min_width=110, elem_id="live")

    def _lay_out_details(self) -> None:
        with gr.Row(elem_id="details"):
            self.seed = gr.Number(7, label="Seed", precision=0, min_width=60)
            dice = gr.Button("Random seed", elem_id="dice", min_width=40)
            self.steps = gr.Slider(1, MAX_STEPS, DEFAULT_STEPS, step=1, label="Steps", min_width=60, buttons=[])
            self.guidance = gr.Slider(
                0, MAX_GUIDANCE, DEFAULT_GUIDANCE, step=0.5, label="Guidance", min_width=60, buttons=[]
            )
        dice.click(None, None, self.seed, js=ROLL_DICE, **QUIET)

    def _lay_out_more(self) -> dict[str, Any]:
        """The settings that few change, by their field in ``Settings``."""
        method = gr.Dropdown(list(MERGE_METHODS), value=DEFAULT_METHOD, label="Merge method", interactive=True)
        return {"method": method, **MoreSettings(self._session).lay_out()}

    def _lay_out_results(self) -> None:
        with gr.Column(elem_id="stage"):
            self.picture = picture("picture", "Picture")
            with gr.Row(elem_id="agreement"):
                self.changed = gr.HTML("", elem_id="changed", padding=False, js_on_load=theme.PICTURES)
                self.use = gr.Button(
                    "Use these settings", size="sm", visible=False, min_width=130, scale=0, elem_id="use"
                )
                gr.Button("Hold to compare", size="sm", min_width=120, scale=0, elem_id="hold")
                self.more_like = gr.Button("More like this", size="sm", min_width=110, scale=0)
        self.facts = gr.HTML(theme.facts(None), elem_id="facts", padding=False, js_on_load=REUSE_SEED)
        self.facts.reuse(_seed_of, None, self.seed, **QUIET)
        self.lora = gr.HTML(self._lora(), elem_id="lora", padding=False)
        self.gallery = gallery("gallery", "This visit", visible=False)
        self.dropped = gr.File(
            label="Drop a picture of this app to restore its settings",
            file_types=[".png"],
            type="filepath",
            height=96,
            elem_id="restore",
        )

    # ---------------------------------------------------------------- what other tabs use

    def settings(self, values: Values) -> Settings:
        """Checked settings from the values of ``inputs``; raises SettingsError.

        Styles that were renamed since they were switched on stay; deleted ones are left out, with a message each.
        """
        given = {name: values[each] for name, each in self.fields.items()}
        given["mix"], gone = self._known(given["mix"] or {})
        _warn_of(gone)
        return self._session.checked(**given)

    def _known(self, mix: Any) -> tuple[Any, list[str]]:
        """A mix under today's names without the styles that are gone, and those; what is no mix is to be refused."""
        if not isinstance(mix, dict):
            return mix, []
        names, renamed = self._session.adapter_names, self._session.renamed
        mix = {renamed.get(name, name): strength for name, strength in mix.items()}
        gone = [name for name in mix if isinstance(name, str) and name not in names]
        return {name: mix[name] for name in mix if name not in gone}, gone

    def fill(self, given: Mapping[str, Any], file: str | None = None, name: str | None = None) -> list[Any]:
        """Updates of ``targets``, in their order, that show settings as in a picture's metadata, in front.

        What is different from then, such as a missing adapter, is shown in a message each.

        Args:
            given: the settings.
            file: the picture, to be shown with them.
            name: what it is called in the visitor's history.

        Raises:
            SettingsError: they hold something that is no setting.
        """
        restored = self.restored(given)
        stage = self._shown(file, given, restored.then, name) if file else [gr.skip()] * len(self._stage)
        return [gr.Tabs(selected="mix"), *self._filled(restored.settings), *stage]

    def restored(self, given: Mapping[str, Any]) -> Restored:
        """Settings as in a picture's metadata, as far as they can be had; messages and errors as ``fill``."""
        restored = restore(given, self._session)
        for note in restored.notes:
            gr.Warning(theme.plain(note))
        return restored

    def fill_from_history(self, name: Any, request: gr.Request) -> list[Any]:
        """As ``fill``, with a picture in the visitor's history; the sentence of what goes wrong."""
        with readable("the picture could not be read"):
            kept = self._studio.galleries.of(visitor_of(request)).get(name)
            return self.fill(kept.settings, cached(self.picture, kept.path), kept.name)

    def _shown(
        self, picture: Any, report: Mapping[str, Any], settings: Settings, name: str | None, *, preview: bool = False
    ) -> list[Any]:
        """Updates of the picture, of what is said of it, and of what is known of it in the browser."""
        said = theme.facts(report, preview=preview) + theme.made(settings.as_dict())
        return [picture, said, {"name": name, "settings": settings.as_dict()}]

    def _shown_from(self, kept: Kept) -> list[Any]:
        report = kept.settings
        return self._shown(cached(self.picture, kept.path), report, restore(report, self._session).then, kept.name)

    def _filled(self, settings: Settings) -> list[Any]:
        shown = settings.as_dict() | {"mix": gr.HTML(value=dict(settings.mix))}
        return [shown[name] for name in self.fields]

    # ---------------------------------------------------------------- what the buttons do

    def _connect(self) -> None:
        self._buttons = buttons = DrawButtons(self._studio.requests, MIX, [self.generate, self.surprise], self.stop)
        results = [*self._stage, self.gallery, self._memory.pictures]

        def begin_surprise(pictures: Any, request: gr.Request) -> list[Any]:
            settings = random_settings.settings(self._session)
            given = settings.as_dict() | {"mix": dict(settings.mix)}
            asked = {each: given[name] for name, each in self.fields.items()} | {self._memory.pictures: pictures}
            return [*self._filled(settings), *buttons.begin(asked, request)]

        begun = [*self.inputs, *buttons.begun]
        surprised = self.surprise.click(begin_surprise, self._memory.pictures, begun, js=SHOW_PICTURE, **QUIET)
        asked = {*self.inputs, self._memory.pictures}
        pressed = buttons.begin_on([self.generate.click, self.prompt.submit], asked, SHOW_PICTURE)
        for each in (pressed, surprised):
            buttons.draw_after(each, self._generate, results, self.picture)
        restored = self.dropped.upload(self._restore, self.dropped, self.targets, **TELLING)
        for ended in (restored.then, restored.failure):  # the box takes the next one
            ended(None, None, self.dropped, js="() => null", **QUIET)
        self.gallery.select(self._choose, None, self._stage, **TELLING)
        self.use.click(self._use, self.shown, self.targets, **TELLING)
        self.style_picker.words(self._add_words, self.prompt, self.prompt, **QUIET)
        self.style_picker.gone(_tell_gone, None, None, **TELLING)

    async def _generate(
        self,
        values: Values,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Any:
        def on_step(done: int, of: int) -> None:
            progress((done, of), desc="Drawing", unit="steps")

        try:
            with readable():
                settings = self.settings(values)
                drawn, path = await self._studio.requests.draw(
                    visitor_of(request), settings, at_most_often(on_step), MIX
                )
        except Stopped:
            return [gr.skip()] * (len(self._stage) + 2)
        names = [path.name, *(values[self._memory.pictures] or [])][:GALLERY_HOLDS]
        shown = self._shown(cached(self.picture, path), drawn.report, settings, path.name)
        return [*shown, self._strip(names, request), names]

    def _strip(self, names: Any, request: gr.Request) -> gr.Gallery:
        """This visit's pictures, those that History still has."""
        kept = self._studio.galleries.of(visitor_of(request)).among(names)[:GALLERY_HOLDS]
        items = [(cached(self.gallery, each.path), caption_of(each)) for each in kept]
        return gr.Gallery(items, visible=bool(items))

    def _reopen(self, kept: Any, names: Any, shown: Any, lost: Any, request: gr.Request) -> list[Any]:
        if lost:
            gr.Warning("The page was loaded again before its picture was drawn. Generate draws it again.")
        before = (kept or {}).get("now", {}).get("mix")
        mix, gone = self._known(before)
        _warn_of(gone)
        styles = gr.skip() if mix == before else gr.HTML(value=mix)
        return [styles, self._strip(names, request), *self._shown_again(shown, names, request)]

    def _shown_again(self, shown: Any, names: Any, request: gr.Request) -> list[Any]:
        """The picture that was shown, or else the newest of this visit.

        Where there is none the stage stays: a live preview may have been drawn while the page was loaded.
        """
        looked_at = [shown.get("name")] if isinstance(shown, dict) else []
        for kept in self._studio.galleries.of(visitor_of(request)).among([*looked_at, *(names or [])])[:1]:
            with suppress(SettingsError):
                return self._shown_from(kept)
        return [gr.skip(), gr.skip(), None if shown else gr.skip()]

    def _choose(self, event: gr.SelectData, request: gr.Request) -> list[Any]:
        with readable("the picture could not be shown"):
            name = Path(event.value["image"]["path"]).name
            return self._shown_from(self._studio.galleries.of(visitor_of(request)).get(name))

    def _use(self, shown: Any) -> list[Any]:
        with readable("the settings could not be read"):
            return self.fill((shown or {}).get("settings", {}))

    def _restore(self, file: str | None) -> list[Any]:
        with readable("the picture could not be read"):
            return self.fill(read_settings(Path(file or "")), file)

    def _add_words(self, prompt: str, event: gr.EventData) -> Any:
        words = getattr(event, "words", "")
        known = isinstance(words, str) and words in {card.trigger for card in self._session.cards}
        if not known or words in prompt:
            return gr.skip()
        return f"{prompt.rstrip(' ,')}, {words}" if prompt.strip() else words

    # ---------------------------------------------------------------- the preview

    def _connect_preview(self) -> None:
        self.live.change(None, self.live, self.style_picker, js=LIVE, **QUIET)
        # the list of styles tells of its changes itself, and only while there is a preview, too
        moved = [self.live.input, *(each.change for each in self.inputs if each is not self.style_picker)]
        asked = gr.Number(0, visible=False)
        gr.on(moved, None, [self.live, asked], asked, js=ASK_IF_LIVE, **QUIET, trigger_mode="multiple")
        wanted, values = [asked.change, self.style_picker.input], {self.live, self.shown, *self.inputs}
        gr.on(wanted, self._preview, values, self._stage, **PREVIEWING)

    async def _preview(self, values: Values, request: gr.Request) -> Any:
        nothing = [gr.skip()] * len(self._stage)
        if not values[self.live]:
            return nothing
        try:
            settings = self.settings(values)
            if settings.as_dict() == (values[self.shown] or {}).get("settings"):  # as a picture sent to Mix
                return nothing
            fewer = replace(settings, steps=self._budget.steps(settings.steps))
            drawn = await self._studio.requests.preview(visitor_of(request).visit, fewer)
        except (Stopped, SettingsError):  # a newer one was requested, or a prompt is half typed
            return nothing
        self._budget.drew(fewer.steps, drawn.report["generation_s"])
        file = await asyncio.to_thread(cached_picture, self.picture, drawn)
        return self._shown(file, drawn.report, settings, None, preview=True)

    # ---------------------------------------------------------------- what changes by itself

    def _connect_watch(self) -> None:
        """New adapters, those that were left out, thumbnails and the LoRA's time come to the page by themselves."""
        seen = gr.State(None)
        shown = [seen, self._header, self.style_picker, self.refused, self.lora]
        gr.Timer(WATCH_SECONDS).tick(self._watch, seen, shown, **QUIET)

    def _watch(self, seen: Any) -> Any:
        now = (self._session.library.version, self._studio.thumbnails.version, self._studio.timings)
        if now == seen:
            return [gr.skip()] * 5
        cards = self._cards()
        header = theme.header(self._session.model, len(cards))
        return now, header, gr.HTML(cards=cards), gr.HTML(**self._refused()), self._lora()

    def _counted(self, prompt: str) -> str:
        return theme.tokens(*self._session.tokens(prompt))

    def _refused(self) -> dict[str, Any]:
        refused = self._session.library.refused
        return {"value": theme.refusals(refused), "visible": bool(refused)}

    def _lora(self) -> str:
        return theme.lora(self._studio.timings)

    def _cards(self) -> list[dict[str, Any]]:
        return [shown(card, self._studio.thumbnails) for card in self._session.cards]


def _tell_gone(event: gr.EventData) -> None:
    """Styles that were on and were deleted, here or by another visitor."""
    names = getattr(event, "names", None)
    _warn_of([name for name in names if isinstance(name, str)] if isinstance(names, list) else [])


def _warn_of(gone: Iterable[str]) -> None:
    for name in gone:
        gr.Warning(theme.plain(left_out(name)))


def _seed_of(event: gr.EventData) -> Any:
    return getattr(event, "seed", gr.skip())
