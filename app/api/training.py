"""The endpoints of training for programs: ``/train``, ``/training_status`` and their family."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api

from app.server.messages import readable
from app.server.served_files import file_data
from app.server.visitors import STARTING
from app.settings.checks import SettingsError
from app.studio import Studio
from app.training.pictures import captions_of, sort_out
from app.training.recipe import Recipe


def add_training_api(studio: Studio) -> None:
    """Add the endpoints to the Blocks that is being built."""
    trainings, usual = studio.trainings, Recipe.for_base(studio.trainings.base)
    paper = gr.Image(format="png", type="pil", visible=False)

    def recipe(settings: Any) -> Recipe:
        if settings is not None and not isinstance(settings, dict):
            raise SettingsError(f'the settings must be an object like {{"steps": 200}}, got {str(settings)[:40]!r}')
        return usual.changed(settings or {}, tuple(card.name for card in studio.session.cards))

    def status(id: str | None) -> dict[str, Any]:
        progress = trainings.progress(id or None)
        samples = [{"step": step, "picture": file_data(paper, path)} for step, path in progress.samples]
        return {**progress.as_dict(), "samples": samples}

    def train(pictures: list[str], settings: Any, captions: Any = None) -> dict[str, Any]:
        """Start to train an adapter on pictures; follow it with /training_status, its end is in the library.

        One training at a time. Captions of no picture are listed under "left" in what is returned.

        Args:
            pictures: Up to 200 files (PNG, JPEG, WEBP, BMP, GIF, TIFF), and .txt or .caption files of the same names.
            settings: What differs from the defaults of /estimate_training, like {"prompt": "a picture in sks style"}.
            captions: A list of texts in the order of the pictures, in place of .txt files.
        """
        with readable("the training could not be started"):
            sent = sort_out([(Path(file).name, Path(file)) for file in pictures or []])
            lines = captions or captions_of(sent)
            if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
                raise SettingsError("captions must be a list of texts, one per picture")
            return {**status(trainings.start(recipe(settings), sent, lines).id), "left": list(sent.left)}

    def estimate_training(settings: Any = None) -> dict[str, Any]:
        """All settings of a training, with defaults where none are given, and what it would take.

        The estimate: entries trained, megabytes of the file, seconds, memory_gib beside the app's, and whether these
        were measured in an earlier training.

        Args:
            settings: Those that differ from the defaults, like {"steps": 200}.
        """
        with readable("the training could not be estimated"):
            whole = recipe(settings)
            return {"settings": whole.as_dict(), "estimate": studio.estimator.estimate(whole).as_dict()}

    def training_status(id: str = "") -> dict[str, Any]:
        """How far a training is, by default the newest: state ("running", "finished", "cancelled", "interrupted" by the
        app's end, or "failed", with the problem), step of steps, losses, seconds left, samples, and the adapter's name.
        """
        with readable("the training could not be read"):
            return status(id)

    def listed() -> list[dict[str, Any]]:
        """All trainings that are kept, the newest first."""
        return [training.as_dict() for training in trainings.all]

    def cancel_training() -> dict[str, Any]:
        """End the training that is running; its last checkpoint is kept, for /resume_training and /keep_training."""
        with readable("the training could not be cancelled"):
            return status(trainings.cancel().id)

    def resume_training(id: str = "") -> dict[str, Any]:
        """Go on with a training that was cancelled, interrupted or failed, by default the newest."""
        with readable("the training could not be resumed"):
            return status(trainings.resume(id or None).id)

    def keep_training(id: str = "") -> str:
        """Put what a training that has ended had learned at its last checkpoint into the library; returns the name."""
        with readable("the adapter could not be added"):
            return trainings.keep(id or None)

    def discard_training(id: str) -> list[dict[str, Any]]:
        """Remove a training that has ended with its pictures and checkpoints; returns those that are left.

        Args:
            id: Of the training, as /trainings lists it.
        """
        with readable("the training could not be discarded"):
            trainings.discard(id)
        return listed()

    api(listed, api_name="trainings")
    for endpoint in (estimate_training, training_status, cancel_training, resume_training, keep_training,
                     discard_training):  # fmt: skip
        api(endpoint, api_name=endpoint.__name__)
    # pictures go through a component, which takes those that the client has uploaded, and no other path
    pictures = gr.File(label="pictures", file_count="multiple", type="filepath", visible=False)
    settings, captions = gr.JSON(label="settings", visible=False), gr.JSON(label="captions", visible=False)
    started = gr.JSON(label="status", visible=False)
    gr.Button(visible=False).click(train, [pictures, settings, captions], started, api_name="train", **STARTING)
