"""Estimate what a training will take, before it starts."""

import threading
from dataclasses import asdict, dataclass
from typing import Any

from app.drawing.session import Session
from app.training.recipe import BYTES_PER_ENTRY, Recipe
from app.training.trainings import Trainings

CALIBRATION_STEPS = 4  # the difference of pictures of 1 and 5 steps leaves out text encoder and decoder
FORWARDS = 3.0  # per picture of a training step: the forward, and the backward at about twice that
BYTES_OF_STATE = 40  # per entry: delta, gradient, two moments, place, and their copies
PROCESS_GIB = 0.7  # Python, torch and activations of a small model
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a training will take, about.

    Args:
        entries: that are trained.
        megabytes: of the file.
        seconds: of the steps and the pictures made on the way.
        memory_gib: of the trainer's process, or on a GPU its tensors; beside what the app itself takes.
        measured: whether time and memory are those of an earlier training, or follow from drawing a picture.
    """

    entries: int
    megabytes: float
    seconds: float
    memory_gib: float
    measured: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Estimator:
    """Estimates trainings; the first time it draws two small pictures to see how fast this machine is."""

    def __init__(self, session: Session, trainings: Trainings) -> None:
        self._session, self._trainings = session, trainings
        self._measuring = threading.Lock()
        self._forward = 0.0  # seconds of a picture's forward at the base's resolution

    def estimate(self, recipe: Recipe) -> Estimate:
        """What a training by a recipe will take; the first time this waits for a turn to draw."""
        base = self._trainings.base
        past = self._trainings.past(recipe)
        share = (recipe.resolution / base.resolution) ** 2
        forward = self._seconds_per_forward() * share
        per_picture = 1 / past.speed if past and past.speed else FORWARDS * forward
        entries = recipe.entries(base)
        steps = recipe.steps * Trainings.pictures_per_step(recipe) * per_picture
        drawn = (recipe.class_pictures if recipe.class_prompt else 0) + (10 if recipe.sample_prompt else 0)
        weights = base.parameters * (4 if base.precision == "no" else 2) / _GIB
        memory = past.peak_gib if past else PROCESS_GIB + weights * 1.2 + entries * BYTES_OF_STATE / _GIB
        return Estimate(
            entries=entries,
            megabytes=entries * BYTES_PER_ENTRY / 1e6,
            seconds=10 + steps + drawn * 25 * 2 * forward,  # 25 steps per picture, each with and without the prompt
            memory_gib=memory,
            measured=bool(past),
        )

    def _seconds_per_forward(self) -> float:
        with self._measuring:
            if not self._forward:
                one, more = self._seconds_to_draw(1), self._seconds_to_draw(1 + CALIBRATION_STEPS)
                self._forward = max(more - one, 1e-4) / CALIBRATION_STEPS / 2  # with and without the prompt
            return self._forward

    def _seconds_to_draw(self, steps: int) -> float:
        return float(self._session.generate("a", {}, 0, steps, 3.0).report["generation_s"])
