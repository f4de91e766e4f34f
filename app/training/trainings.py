"""Trainings: one at a time, each a process of the trainer in a folder of its own. No Gradio in here."""

import json
import logging
import math
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from app.library.cards import one_sentence
from app.library.library import Library
from app.settings.checks import SettingsError
from app.training.log import RECENT, Steps, last_checkpoint, last_line, read_steps, samples
from app.training.pictures import Sent, write_pictures
from app.training.recipe import SAMPLES, Base, Recipe
from shira_diffusers import ShiraError
from shira_diffusers.atomic_write import write_atomically
from shira_diffusers.formats.shira_file import WEIGHTS_NAME

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
TRAINER = ROOT / "train_dreambooth_shira.py"
KEPT = 20  # trainings, the newest ones
PATIENCE = 10  # seconds for the trainer to end when it is asked to

State = Literal["running", "finished", "cancelled", "interrupted", "failed"]


@dataclass(frozen=True, slots=True)
class Training:
    """A training, as its folder keeps it.

    Args:
        id: its folder's name.
        base: the model that it trains.
        created: when it was started first, in seconds since 1970.
        pid: of the trainer's process, and ``begun``, when that began: a later process may get the same number.
        launched: when the trainer was started or resumed last, in seconds since 1970.
        adapter: what it is called in the library, once it is there.
        problem: why it failed, in one sentence.
    """

    id: str
    base: str
    recipe: Recipe
    pictures: int
    created: float
    state: State = "running"
    pid: int = 0
    begun: float = 0.0
    launched: float = 0.0
    adapter: str = ""
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        shared = {"id": self.id, "state": self.state, "recipe": self.recipe.as_dict(), "pictures": self.pictures}
        return {**shared, "created": self.created, "adapter": self.adapter, "problem": self.problem}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is.

    Args:
        steps: done so far, with their losses.
        seconds_left: about; None before the first step, and when it has ended.
        samples: pictures that show what was learned, by step.
        checkpoint: the step from which it can be resumed, 0 if from the beginning.
        loading: whether the trainer that is running has not come to a step yet.
    """

    training: Training
    steps: Steps
    seconds_left: float | None
    samples: tuple[tuple[int, Path], ...]
    checkpoint: int
    loading: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.training.as_dict(),
            "step": self.steps.done,
            "steps": self.training.recipe.steps,
            "loss": [[step, loss] for step, loss in self.steps.losses.items()],
            "pictures_per_second": self.steps.speed,
            "peak_memory_gib": self.steps.peak_gib,
            "seconds_left": self.seconds_left,
            "checkpoint": self.checkpoint,
            "loading": self.loading,
        }


class Trainings:
    """The trainings of an app: starts them, follows them, ends them, and puts the results into the library.

    Args:
        base: what is trained.
        library: receives finished adapters.
        data: the app's folder; trainings lie in ``trainings`` in it.

    Trainings that a crash of the app left are ended and can be resumed. Safe to use from several threads.
    """

    def __init__(self, base: Base, library: Library, data: Path) -> None:
        self.base = base
        self._library = library
        self._folder = data / "trainings"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._changing = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None
        self._ending: State = "interrupted"
        found = (_read(path) for path in self._folder.glob("*/training.json"))
        self._trainings = {training.id: training for training in found if training}
        for training in list(self._trainings.values()):
            if training.state == "running":
                _end_orphan(training)
                self._keep(replace(training, state="interrupted"))

    # ---------------------------------------------------------------- what there is

    @property
    def all(self) -> tuple[Training, ...]:
        """All trainings that are kept, the newest first."""
        return tuple(sorted(list(self._trainings.values()), key=lambda training: -training.created))

    @property
    def running(self) -> Training | None:
        """The one that is running."""
        return next((training for training in list(self._trainings.values()) if training.state == "running"), None)

    def training(self, id: object) -> Training:
        """The training of an id; of None the newest. Raises SettingsError: there is none."""
        found = self._trainings.get(str(id)) if id else next(iter(self.all), None)
        if found is None:
            raise SettingsError(f"there is no training {str(id)[:40]!r}" if id else "nothing was trained here yet")
        return found

    def progress(self, id: object = None) -> Progress:
        """How far a training is; of None the newest. Raises SettingsError: there is none."""
        training = self.training(id)
        output = self._folder / training.id / "output"
        steps = read_steps(output)
        checkpoint = last_checkpoint(output)
        running = training.state == "running"
        loading = running and not steps.since(training.launched)
        left = self._seconds_left(training, steps) if running and not loading else None
        return Progress(training, steps, left, tuple(samples(output)), checkpoint[0] if checkpoint else 0, loading)

    def _seconds_left(self, training: Training, steps: Steps) -> float:
        recipe = training.recipe
        between_samples = math.ceil(recipe.steps / SAMPLES)  # so that each mean has the time of one
        measured = steps.seconds_per_step(training.launched, max(RECENT, between_samples + 1))
        alone = self.pictures_per_step(recipe) / steps.speed if steps.speed else 0.0
        return (recipe.steps - steps.since(training.launched)[-1]) * (alone if measured is None else measured)

    def past(self, recipe: Recipe) -> Steps | None:
        """The steps of the last training like this one, which predict how long it takes."""
        for training in self.all:
            its = training.recipe
            alike = (training.base, its.resolution, its.batch) == (self.base.path, recipe.resolution, recipe.batch)
            steps = read_steps(self._folder / training.id / "output") if alike else None
            if steps and steps.done >= 3:
                return steps
        return None

    @staticmethod
    def pictures_per_step(recipe: Recipe) -> int:
        """How many pictures per step, those of the class included."""
        return recipe.batch * (2 if recipe.class_prompt else 1)

    # ---------------------------------------------------------------- starting and ending

    def start(self, recipe: Recipe, sent: Sent, captions: Sequence[str] = ()) -> Training:
        """Begin to train.

        Args:
            sent: the pictures, as they came.
            captions: of the pictures, in their order; those that are empty or lacking get the recipe's prompt.

        Raises:
            SettingsError: another training is running, the base cannot be trained, or pictures cannot be used.
            ShiraError: settings that the trainer refuses. Nothing is left behind.
        """
        with self._changing:
            self._require_idle()
            if self.base.trainable:
                raise SettingsError(self.base.trainable)
            id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
            folder = self._folder / id
            self._flags(recipe, folder, resume=False)  # all is checked before anything is written
            try:
                write_pictures(sent, captions, folder / "pictures")
                training = Training(id, self.base.path, recipe, len(sent.pictures), time.time())
                self._launch(training, resume=False)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._forget_old()
            return self._trainings[id]

    def resume(self, id: object) -> Training:
        """Go on with a training from its last checkpoint, or from the beginning where there is none.

        Raises:
            SettingsError: there is none of that id, it is finished, or another is running.
        """
        with self._changing:
            training = self.training(id)
            self._require_idle()
            if training.base != self.base.path:
                raise SettingsError(
                    f"the training of {training.recipe.name!r} belongs to another model: {training.base}"
                )
            if training.state == "finished":
                raise SettingsError(f"the training of {training.recipe.name!r} is finished; start another")
            resume = last_checkpoint(self._folder / training.id / "output") is not None
            self._launch(replace(training, state="running", problem=""), resume=resume)
            return self._trainings[training.id]

    def cancel(self) -> Training:
        """End the training that is running; its last checkpoint is kept. Raises SettingsError: none is running."""
        training = self.running
        if training is None:
            raise SettingsError("no training is running")
        self._end("cancelled")
        return self._trainings[training.id]

    def keep(self, id: object) -> str:
        """Put the last checkpoint's adapter of a training that has ended into the library; returns its name there.

        Raises:
            SettingsError: there is none of that id, it is running, or it has no checkpoint.
        """
        with self._changing:
            training = self._ended(id)
            checkpoint = last_checkpoint(self._folder / training.id / "output")
            if checkpoint is None:
                raise SettingsError(f"the training of {training.recipe.name!r} ended before its first checkpoint")
            entry = self._library.add(checkpoint[1], training.recipe.name)
            self._keep(replace(training, adapter=entry.name))
            return entry.name

    def discard(self, id: object) -> None:
        """Remove a training that has ended, its pictures and checkpoints; the adapter in the library stays.

        Raises:
            SettingsError: no id, there is none of it, or it is running.
        """
        if not id:
            raise SettingsError("no training is chosen; say which one to discard")
        with self._changing:
            training = self._ended(id)
            del self._trainings[training.id]
            shutil.rmtree(self._folder / training.id, ignore_errors=True)

    def close(self) -> None:
        """End the training that is running, as the app ends; it can be resumed."""
        self._end("interrupted")

    # ---------------------------------------------------------------- how

    def _require_idle(self) -> None:
        training = self.running
        if training:
            done = read_steps(self._folder / training.id / "output").done
            raise SettingsError(
                f"one training at a time: {training.recipe.name!r} is at step {done} of {training.recipe.steps}; "
                "wait for it, or cancel it"
            )

    def _ended(self, id: object) -> Training:
        training = self.training(id)
        if training.state == "running":
            raise SettingsError(f"the training of {training.recipe.name!r} is running; cancel it first")
        return training

    def _flags(self, recipe: Recipe, folder: Path, *, resume: bool) -> list[str]:
        files = {card.name: card.path.resolve() for card in self._library.cards}
        gone = [name for name in recipe.avoid if name not in files]
        if gone:
            raise SettingsError(f"the adapter {gone[0]!r}, whose entries it avoids, is no longer in the library")
        return recipe.flags(self.base, folder.resolve(), files, ROOT, resume=resume)

    def _launch(self, training: Training, *, resume: bool) -> None:
        folder = self._folder / training.id
        flags = self._flags(training.recipe, folder, resume=resume)
        command = [sys.executable, "-m", "app.training.supervised_run", str(TRAINER), *flags]
        launched = time.time()
        with (folder / "log.txt").open("ab", buffering=0) as log:
            log.write(b"\n")  # a trainer that was killed leaves half a line
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
        self._ending = "failed"
        pid = self._process.pid
        try:
            self._keep(replace(training, pid=pid, begun=_begun(pid), launched=launched))
        except BaseException:  # nobody would follow it, nor end it with the app
            _kill(self._process)
            raise
        self._watcher = threading.Thread(target=self._watch, args=(training.id, self._process), daemon=True)
        self._watcher.start()

    def _environment(self) -> dict[str, str]:
        device = self.base.device
        own = {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
        if device == "cpu":
            own["ACCELERATE_USE_CPU"] = "true"
        elif device.startswith("cuda:"):
            number = int(device.partition(":")[2])
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            own["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
        return {**os.environ, **own}

    def _watch(self, id: str, process: subprocess.Popen[bytes]) -> None:
        """Wait for the trainer's end and keep what came of it."""
        code = process.wait()
        if process.stdin:
            process.stdin.close()
        with self._changing:
            training, folder = self._trainings[id], self._folder / id
            if code == 0:
                self._keep(self._finished(training, folder))
            elif self._ending != "failed":
                self._keep(replace(training, state=self._ending))
            else:
                message = last_line(folder / "log.txt") or "it said nothing"
                logger.error("the training %s ended with code %d: %s", id, code, message)
                problem = f"the training ended in an error: {message}"
                if code < 0:
                    problem = f"the training was ended by signal {-code}, which often means that memory ran out"
                self._keep(replace(training, state="failed", problem=problem))

    def _finished(self, training: Training, folder: Path) -> Training:
        try:
            entry = self._library.add(folder / "output" / WEIGHTS_NAME, training.recipe.name)
        except (ShiraError, OSError) as error:
            logger.exception("the adapter of the training %s could not be taken in", training.id)
            problem = f"the adapter is trained but could not be put into the library: {one_sentence(error)}"
            return replace(training, state="failed", problem=problem)
        for checkpoint in (folder / "output").glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        return replace(training, state="finished", adapter=entry.name)

    def _end(self, state: State) -> None:
        with self._changing:
            process, watcher = self._process, self._watcher
            if process is None or watcher is None or process.poll() is not None:
                return
            self._ending = state
            process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        watcher.join(PATIENCE)

    def _keep(self, training: Training) -> None:
        own = {name: getattr(training, name) for name in ("base", "pid", "begun", "launched")}
        fields = {**training.as_dict(), **own}
        write_atomically(self._folder / training.id / "training.json", json.dumps(fields, indent=1).encode())
        self._trainings[training.id] = training

    def _forget_old(self) -> None:
        for training in self.all[KEPT:]:
            self.discard(training.id)


def _read(file: Path) -> Training | None:
    """A training from its folder; None if it cannot be read."""
    try:
        fields: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        recipe = Recipe(**{**fields["recipe"], "avoid": tuple(fields["recipe"]["avoid"])})
        return Training(**{**fields, "recipe": recipe, "id": file.parent.name})
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("passed over %s: %s", file, error)
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin:
        process.stdin.close()


def _begun(pid: int) -> float:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0


def _end_orphan(training: Training) -> None:
    """End a trainer that outlived the app which started it."""
    if not training.pid or not training.begun or abs(_begun(training.pid) - training.begun) > 1:
        return
    logger.warning("ending the training %s, which an earlier run of the app left", training.id)
    try:
        process = psutil.Process(training.pid)
        process.terminate()
        process.wait(PATIENCE)
    except psutil.TimeoutExpired:
        process.kill()
    except psutil.Error as error:
        logger.warning("it had ended: %s", error)
