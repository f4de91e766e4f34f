"""Train: pictures, words, how it learns, the estimate, and how the training goes."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from app.page import theme, training_html
from app.page.caption_list import make_caption_list, showing
from app.page.tabs.browser_memory import keep_fields
from app.page.tabs.events import TELLING, Values
from app.page.tabs.mix import MixTab
from app.server.messages import readable
from app.server.served_files import cached
from app.server.visitors import STARTING
from app.settings.picture_files import FORMATS
from app.studio import Studio
from app.training.pictures import MAX_PICTURES, Sent, captions_of, named, require_pictures, sort_out
from app.training.recipe import Recipe
from app.training.trainings import Training
from shira_diffusers.dreambooth.picture_folder import CAPTIONS
from shira_diffusers.weights.targets import PRESETS

EVERY = 2.0  # seconds between two updates of a running training
MASKS = (
    ("grad: what matters most for these pictures", "grad"),
    ("grad_mean: what all of these pictures agree about", "grad_mean"),
    ("wm: the largest weights", "wm"),
    ("snip: between grad and wm", "snip"),
    ("rand: random ones, which hardly overlap", "rand"),
    ("struct: columns, nearly orthogonal in a mix", "struct"),
    ("struct_rows: rows", "struct_rows"),
    ("block: runs of 32, the fastest to switch", "block"),
    ("block_rand: random runs of 32", "block_rand"),
)
HOW = (
    "One training at a time. It runs beside the app at a low priority: pictures can be drawn meanwhile, and both are "
    "slower. It ends with the app, and can be resumed."
)


class TrainTab:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio, mix: MixTab) -> None:
        self._mix = mix
        self._trainings, self._estimator = studio.trainings, studio.estimator
        self._library = studio.session.library
        self._usual = Recipe.for_base(studio.trainings.base)

    def lay_out(self) -> None:
        """Add the tab to the Blocks that is being built."""
        unable = self._trainings.base.trainable
        if unable:
            gr.Markdown(unable, elem_classes="remark")
        with gr.Row(elem_id="train"):
            with gr.Column(scale=5, min_width=300):
                self._lay_out_pictures()
                self._lay_out_words()
                with gr.Accordion("How it learns", open=False, elem_id="how"):
                    self._lay_out_details()
                self.estimate = gr.HTML(elem_id="estimate", padding=False)
                self.start = gr.Button("Start training", variant="primary", size="lg", interactive=not unable)
                gr.Markdown(HOW, elem_classes="remark")
            with gr.Column(scale=6, min_width=300):
                self._lay_out_progress()
        self._connect()

    def _lay_out_pictures(self) -> None:
        self.files = gr.File(
            label="Pictures",
            file_count="multiple",
            file_types=["image", *CAPTIONS],
            type="filepath",
            height=160,
            elem_id="train-files",
        )
        self.captions = make_caption_list()
        gr.Markdown(
            f"5 of a subject, or 20 to 70 of a style; at most {MAX_PICTURES}, of {', '.join(FORMATS)}. "
            "A .txt or .caption of a picture's name is its caption. They are kept in the app's folder, without "
            "their metadata, until the training is discarded.",
            elem_classes="remark",
        )

    def _lay_out_words(self) -> None:
        with gr.Row(elem_classes="words"):
            self.name = gr.Textbox(self._usual.name, label="Name", max_length=60, min_width=120)
            self.prompt = gr.Textbox(
                label="What the pictures show", placeholder="a picture in sks style", min_width=200, scale=2
            )
        self.sample_prompt = gr.Textbox(
            label="Samples show",
            info="Drawn from time to time, to show what was learned.",
            placeholder="what the pictures show",
        )

    def _lay_out_details(self) -> None:
        usual = self._usual
        self.mask = gr.Dropdown(list(MASKS), value=usual.mask, label="Mask: which entries change")
        self.targets = gr.Dropdown(list(PRESETS), value=usual.targets, label="Of which layers")
        with gr.Row():
            self.density = gr.Slider(
                0.1, 10, 100 * usual.density, step=0.1, label="Density, %", min_width=150, buttons=[]
            )
            self.steps = gr.Slider(1, 5000, usual.steps, step=1, label="Training steps", min_width=150, buttons=[])
        with gr.Row():
            self.learning_rate = gr.Number(usual.learning_rate, label="Learning rate", min_width=100)
            self.batch = gr.Number(usual.batch, label="Pictures per step", precision=0, min_width=100)
            self.resolution = gr.Number(usual.resolution, label="Resolution", precision=0, min_width=100)
            self.seed = gr.Number(usual.seed, label="Training seed", precision=0, min_width=80)
        with gr.Row():
            self.flip = gr.Checkbox(usual.flip, label="Mirror pictures at random", min_width=150)
            self.caption_dropout = gr.Slider(
                0, 0.9, usual.caption_dropout, step=0.05, label="Caption dropout", min_width=150, buttons=[]
            )
        self.avoid = gr.Dropdown(
            self._names(),
            value=[],
            multiselect=True,
            label="Avoid the entries of",
            info="So that the two do not interfere.",
        )
        with gr.Row():
            self.class_prompt = gr.Textbox(
                label="Class of the subject",
                info="Such as “a picture of an alien”, so that others of it stay what they were.",
                min_width=180,
                scale=2,
            )
            self.class_pictures = gr.Number(usual.class_pictures, label="Class pictures", precision=0, min_width=100)

    def _lay_out_progress(self) -> None:
        self.past = gr.Dropdown(
            self._choices(), value=self._newest(), label="Training", visible=bool(self._choices()), elem_id="past"
        )
        self.progress = gr.HTML(self._progress_html(None), elem_id="progress", padding=False)
        with gr.Row(elem_id="train-actions"):
            self.mix = gr.Button("Mix it", variant="primary", visible=False, min_width=90)
            self.cancel = gr.Button("Cancel", variant="stop", visible=False, min_width=90)
            self.resume = gr.Button("Resume", variant="primary", visible=False, min_width=90)
            self.keep = gr.Button("Add what it has learned", visible=False, min_width=170)
            self.discard = gr.Button("Discard", visible=False, min_width=90, elem_classes="asks")
        self.samples = gr.Gallery(
            label="Samples", visible=False, columns=4, interactive=False, format="png", elem_id="samples", height="auto"
        )
        self.shown = gr.State("")  # which samples the gallery shows
        self.timer = gr.Timer(EVERY, active=False)

    # ---------------------------------------------------------------- what leads to what

    def _connect(self) -> None:
        view = [self.past, *self._view()]
        settings = {getattr(self, name) for name in self._usual.as_dict()}
        self.files.change(self._look, self.files, self.captions, show_progress_on=self.files, api_visibility="private")
        gr.on(
            [self.steps.change, self.density.change, self.targets.change, self.batch.change, self.resolution.change,
             self.class_prompt.change, self.class_pictures.change],
            self._estimate, settings, self.estimate, trigger_mode="always_last", **TELLING,
        )  # fmt: skip
        started = self.start.click(
            self._start, {*settings, self.files, self.captions}, view,
            show_progress_on=self.progress, api_visibility="private", **STARTING,
        )  # fmt: skip
        started.success(None, None, None, js=theme.scroll_to("#progress"), **TELLING)
        self.shown.change(self._estimate, settings, self.estimate, **TELLING)  # by how fast it goes
        self.past.input(self._follow, [self.past, self.shown], self._view(), **TELLING)
        self.timer.tick(self._follow, [self.past, self.shown], self._view(), **TELLING)
        pressed = [
            self.cancel.click(self._cancel, None, view, show_progress_on=self.progress, api_visibility="private"),
            *(
                button.click(act, self.past, view, **TELLING)
                for button, act in ((self.resume, self._resume), (self.keep, self._keep), (self.discard, self._discard))
            ),
        ]
        for each in pressed:  # another visitor may have done it
            each.failure(self._as_it_is, self.past, view, **TELLING)
        self.mix.click(self._mix_it, self.past, self._mix.targets, **TELLING)

    def keep_in_browser(self, load: Any) -> None:
        """Keep what is typed here, see ``keep_fields``; how it learns suits the base, which may be another one then."""
        keep_fields(
            "train", {each: getattr(self, each) for each in ("name", "prompt", "sample_prompt", "class_prompt")}, load
        )

    def refresh_on(self, shown: gr.Tab) -> None:
        """Show trainings as they are when the tab is opened."""
        settings = {getattr(self, name) for name in self._usual.as_dict()}
        shown.select(lambda: self._all(None), None, [self.past, *self._view()], **TELLING)
        shown.select(lambda chosen: self._offered(chosen), self.avoid, self.avoid, **TELLING)
        shown.select(self._estimate, settings, self.estimate, **TELLING)

    def _view(self) -> list[Any]:
        buttons = [self.mix, self.cancel, self.resume, self.keep, self.discard]
        return [self.progress, *buttons, self.samples, self.shown, self.timer]

    # ---------------------------------------------------------------- before

    def _sent(self, files: list[str] | None) -> Sent:
        return sort_out([(Path(file).name, Path(file)) for file in files or []])

    def _look(self, files: list[str] | None) -> Any:
        """The pictures that came, and the captions that came with them."""
        if not files:
            return showing((), ())
        with readable("the pictures could not be read"):
            sent = self._sent(files)
            require_pictures(sent)
        if sent.left:
            gr.Warning(f"No picture has the name of these captions: {escape(named(sent.left))}")
        return showing(sent.pictures, captions_of(sent))

    def _recipe(self, values: Values) -> Recipe:
        given = {name: values[getattr(self, name)] for name in self._usual.as_dict()}
        given = {name: "" if value is None and _is_text(name) else value for name, value in given.items()}
        given |= {"density": (given["density"] or 0) / 100, "avoid": given["avoid"] or []}
        given["sample_prompt"] = given["sample_prompt"] or given["prompt"]
        return self._usual.changed(given, tuple(self._names()))

    def _estimate(self, values: Values) -> str:
        with readable("the training could not be estimated"):
            return training_html.estimate(self._estimator.estimate(self._recipe(values)))

    def _offered(self, chosen: list[str] | None) -> Any:
        names = self._names()
        return gr.Dropdown(names, value=[name for name in chosen or [] if name in names])

    def _names(self) -> list[str]:
        return [card.name for card in self._library.cards]

    # ---------------------------------------------------------------- while and after

    def _start(self, values: Values) -> Any:
        with readable("the training could not be started"):
            captions = list(map(str, values[self.captions] or []))
            training = self._trainings.start(self._recipe(values), self._sent(values[self.files]), captions)
        return self._all(training.id)

    def _cancel(self) -> Any:
        with readable("the training could not be cancelled"):
            return self._all(self._trainings.cancel().id)

    def _resume(self, id: str | None) -> Any:
        with readable("the training could not be resumed"):
            return self._all(self._trainings.resume(id).id)

    def _keep(self, id: str | None) -> Any:
        with readable("the adapter could not be added"):
            gr.Info(f"“{self._trainings.keep(id)}” is in the library.")
        return self._all(id)

    def _discard(self, id: str | None) -> Any:
        with readable("the training could not be discarded"):
            self._trainings.discard(id)
        return self._all(None)

    def _mix_it(self, id: str | None) -> Any:
        """The adapter alone in Mix, with the words that it was trained with; seed, steps and the rest stay."""
        with readable("the adapter could not be sent to Mix"):
            training = self._trainings.training(id)
            filled = self._mix.fill({"prompt": training.recipe.prompt, "mix": {training.adapter: 1.0}})
        return [*filled[:3], *(gr.skip() for _ in filled[3:])]

    def _all(self, id: str | None) -> tuple[Any, ...]:
        """The choice of trainings, and the view of one; of None the newest."""
        id = id or self._newest()
        choice = gr.Dropdown(self._choices(), value=id, visible=bool(self._choices()))
        return choice, *self._follow(id, None)

    def _as_it_is(self, id: str | None) -> tuple[Any, ...]:
        """The view of a training, or of the newest, if it is gone."""
        return self._all(id if id in {training.id for training in self._trainings.all} else None)

    def _follow(self, id: str | None, shown: str | None) -> tuple[Any, ...]:
        """The view of a training; its samples only if they are others than those shown."""
        known = {training.id: training for training in self._trainings.all}
        if id not in known:
            hidden = [gr.Button(visible=False)] * 5
            return self._progress_html(None), *hidden, gr.Gallery(visible=False), "", gr.Timer(active=False)
        progress = self._trainings.progress(id)
        running, ended = progress.training.state == "running", progress.training.state not in ("running", "finished")
        mixable = progress.training.adapter in self._names()
        buttons = [mixable, running, ended, ended and progress.checkpoint > 0, not running]
        key = f"{id} {len(progress.samples)}"
        samples: Any = gr.skip()
        if key != shown:
            pictures = [(cached(self.samples, path), f"step {step}") for step, path in progress.samples]
            samples = gr.Gallery(pictures, visible=bool(pictures))
        visible = [gr.Button(visible=each) for each in buttons]
        return training_html.progress(progress), *visible, samples, key, gr.Timer(active=running)

    def _progress_html(self, id: str | None) -> str:
        if not self._trainings.all:
            return '<p class="remark">No trainings yet. Progress is shown here while one runs.</p>'
        return training_html.progress(self._trainings.progress(id))

    def _choices(self) -> list[tuple[str, str]]:
        return [(_label(training), training.id) for training in self._trainings.all]

    def _newest(self) -> str | None:
        return next((training.id for training in self._trainings.all), None)


def _is_text(setting: str) -> bool:
    return setting == "prompt" or setting.endswith("_prompt")


def _label(training: Training) -> str:
    when = f"{training.id[:4]}-{training.id[4:6]}-{training.id[6:8]} {training.id[9:11]}:{training.id[11:13]}"
    return f"{training.recipe.name}, {when}"
