"""Trainings are processes of the real trainer on a tiny model: followed, cancelled, resumed, and ended with the app."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from app.drawing.session import Session
from app.page import training_html
from app.settings.checks import SettingsError
from app.training import trainings as trainings_module
from app.training.estimate import Estimator
from app.training.log import last_line, read_steps
from app.training.pictures import MAX_PICTURES, Sent, captions_of, sort_out, write_pictures
from app.training.recipe import Base, Recipe
from app.training.trainings import ROOT, Training, Trainings
from tests.app.conftest import Folders
from tests.dreambooth import colour_science as science

TINY = {"name": "moss", "prompt": "a sks cat", "steps": 6, "batch": 1, "mask": "rand", "learning_rate": 1e-2}
PATIENCE = 240  # seconds


def sent_in(folder: Path) -> Sent:
    folder.mkdir(exist_ok=True)
    for name, color in (("red.png", "red"), ("blue.jpg", "blue")):
        Image.new("RGB", (20, 16), color).save(folder / name)
    (folder / "red.txt").write_text("a red  cat\n")
    return sort_out([(path.name, path) for path in sorted(folder.iterdir())])


def wait(until: Callable[[], Any]) -> None:
    end = time.time() + PATIENCE
    while not until():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def session(folders: Folders, tmp_path: Path) -> Session:
    return Session.open(str(folders.base), folders.adapters, tmp_path / "data")


@pytest.fixture
def trainings(session: Session, tmp_path: Path, warm_trainer: None) -> Any:
    trainings = Trainings(Base.of(session.pipe), session.library, tmp_path / "data")
    yield trainings
    trainings.close()


@pytest.fixture
def recipe(trainings: Trainings) -> Recipe:
    return Recipe.for_base(trainings.base).changed(TINY, ())


@pytest.fixture
def started_as_users_do(trainings: Trainings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer starts from nothing."""
    monkeypatch.setattr(trainings_module, "subprocess", subprocess)


@pytest.mark.usefixtures("started_as_users_do")
def test_a_training_ends_in_the_library(trainings: Trainings, session: Session, recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.changed({"sample_prompt": "a cat", "avoid": ["bluefire"]}, ("bluefire",))
    training = trainings.start(recipe, sent_in(tmp_path / "sent"), ["a red cat"])
    assert training.state == "running"
    with pytest.raises(SettingsError, match="one training at a time: 'moss' is at step 0 of 6"):
        trainings.start(recipe, sent_in(tmp_path / "sent"))
    with pytest.raises(SettingsError, match="is running; cancel it first"):
        trainings.discard(training.id)
    drawn = session.generate("a red cat", {"bluefire": 1.0}, 1, 2).image.tobytes()
    wait(lambda: trainings.running is None)

    progress = trainings.progress()
    assert (progress.training.state, progress.training.problem) == ("finished", "")
    assert (progress.steps.done, len(progress.steps.losses), progress.seconds_left) == (6, 6, None)
    assert progress.samples and all(Image.open(path).size == (16, 16) for _, path in progress.samples)
    assert json.loads(json.dumps(progress.as_dict()))["loss"][5][0] == 6
    (card,) = [card for card in session.cards if card.origin == "yours"]
    assert (card.name, card.trigger, card.mask) == ("moss", "a sks cat", "rand") and card.note == ""
    folder = tmp_path / "data" / "trainings" / training.id
    assert [path.name for path in sorted((folder / "pictures").iterdir())] == ["0000.png", "0000.txt", "0001.png"]
    assert not list((folder / "output").glob("checkpoint-*"))
    assert session.generate("a red cat", {"bluefire": 1.0}, 1, 2).image.tobytes() == drawn
    assert session.generate("a red cat", {"moss": 1.0}, 1, 2).image.tobytes() != drawn

    estimate = Estimator(session, trainings).estimate(recipe)
    assert estimate.measured and estimate.memory_gib == progress.steps.peak_gib
    assert estimate.entries == pytest.approx(card.entries, rel=0.01)
    again = Trainings(trainings.base, session.library, tmp_path / "data")
    assert again.all == trainings.all
    for nothing in (None, "", []):
        with pytest.raises(SettingsError, match="no training is chosen"):
            again.discard(nothing)
    again.discard(training.id)
    assert not folder.exists() and again.all == () and "moss" in [card.name for card in session.cards]


def test_an_estimate_needs_no_prompt_that_the_model_can_read(session: Session, trainings: Trainings) -> None:
    session.suggestions = ("a prompt that is far too long for the model",)
    assert not Estimator(session, trainings).estimate(Recipe.for_base(trainings.base)).measured


def test_cancelling_keeps_the_last_checkpoint_and_it_can_be_resumed(
    trainings: Trainings, session: Session, recipe: Recipe, tmp_path: Path
) -> None:
    long = recipe.changed({"steps": 2000}, ())
    assert "--checkpointing_steps" in long.flags(trainings.base, tmp_path, {}, ROOT, resume=False)
    recipe = recipe.changed({"steps": 40}, ())
    trainings.start(recipe, sent_in(tmp_path / "sent"))
    wait(lambda: trainings.progress().checkpoint)
    assert trainings.cancel().state == "cancelled"
    progress = trainings.progress()
    assert 4 <= progress.checkpoint < 40 and trainings.running is None
    assert trainings.keep(progress.training.id) == "moss"
    assert not progress.loading
    trainings.resume(None)
    loading = trainings.progress()
    assert loading.loading and loading.seconds_left is None and loading.steps.done >= progress.checkpoint
    assert "Getting ready" in training_html.progress(loading)
    assert f"goes on from step {progress.checkpoint}" in training_html.progress(loading)
    wait(lambda: trainings.running is None)
    assert trainings.progress().training.state == "finished" and trainings.progress().steps.done == 40
    assert [card.name for card in session.cards if card.origin == "yours"] == ["moss", "moss-2"]
    with pytest.raises(SettingsError, match="no training is running"):
        trainings.cancel()
    with pytest.raises(SettingsError, match="is finished"):
        trainings.resume(None)


def test_a_crash_is_told_in_one_sentence(trainings: Trainings, recipe: Recipe, tmp_path: Path) -> None:
    """Killed as if memory had run out, and an error of the trainer's own; both can be resumed."""
    training = trainings.start(recipe.changed({"steps": 5000}, ()), sent_in(tmp_path / "sent"))
    wait(lambda: trainings.progress().steps.done)
    os.kill(trainings.training(training.id).pid, signal.SIGKILL)
    wait(lambda: trainings.running is None)
    ended = trainings.training(training.id)
    assert ended.state == "failed" and "was ended by signal 9, which often means that memory" in ended.problem

    next((tmp_path / "data" / "trainings" / training.id / "pictures").glob("*.png")).write_bytes(b"damaged")
    trainings.resume(training.id)
    wait(lambda: trainings.running is None)
    problem = trainings.training(training.id).problem
    assert problem.startswith("the training ended in an error: 1 of 2 pictures in pictures cannot be read")
    assert problem.endswith(".png: not a picture") and str(tmp_path) not in problem


def test_closing_the_app_ends_the_training(trainings: Trainings, recipe: Recipe, tmp_path: Path) -> None:
    training = trainings.start(recipe, sent_in(tmp_path / "sent"))
    process = psutil.Process(trainings.training(training.id).pid)
    trainings.close()
    assert not process.is_running() and trainings.training(training.id).state == "interrupted"
    trainings.close()


def test_a_script_on_the_leash_ends_with_its_starter(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, time\nprint(sys.argv, flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "app.training.supervised_run", str(script), "--flag", "a b"]
    child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin and child.stdout
    assert child.stdout.readline().decode().strip() == str([str(script), "--flag", "a b"])
    child.stdin.close()  # as the system does when the starter is killed
    assert child.wait(10) == 143
    child.stdout.close()


def test_what_a_killed_app_left_is_ended_and_can_be_resumed(
    session: Session, recipe: Recipe, tmp_path: Path, trainings: Trainings
) -> None:
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    begun = psutil.Process(orphan.pid).create_time()
    left = [
        Training("one", "base", recipe, 2, 1.0, "running", orphan.pid, begun),
        Training(
            "two", "base", recipe, 2, 2.0, "running", other.pid, begun - 100
        ),  # the number belongs to somebody else now
    ]
    for training in left:
        (tmp_path / "data" / "trainings" / training.id).mkdir()
        trainings._keep(training)
    (tmp_path / "data" / "trainings" / "odd").mkdir()
    (tmp_path / "data" / "trainings" / "odd" / "training.json").write_text('{"id": "odd"')
    again = Trainings(trainings.base, session.library, tmp_path / "data")
    assert not psutil.pid_exists(orphan.pid) and other.poll() is None
    for process in (orphan, other):
        process.kill()
        process.wait()
    assert [(training.id, training.state) for training in again.all] == [
        ("two", "interrupted"),
        ("one", "interrupted"),
    ]
    with pytest.raises(SettingsError, match="belongs to another model: base"):
        again.resume("one")


def test_nothing_is_left_of_a_training_that_cannot_begin(
    trainings: Trainings, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = sent_in(tmp_path / "sent")
    folder = tmp_path / "data" / "trainings"
    with pytest.raises(SettingsError, match="the prompt is empty"):
        trainings.start(recipe.changed({"prompt": " "}, ()), sent)
    with pytest.raises(SettingsError, match="no pictures to learn from"):
        trainings.start(recipe, Sent((), {}))
    with pytest.raises(SettingsError, match="got 3 for 2"):
        trainings.start(recipe, sent, ["a", "b", "c"])
    with pytest.raises(SettingsError, match="'gone', whose entries it avoids, is no longer in the library"):
        trainings.start(recipe.changed({"avoid": ["gone"]}, ("gone",)), sent)
    monkeypatch.setattr(trainings_module.subprocess, "Popen", None)
    with pytest.raises(TypeError):
        trainings.start(recipe, sent)
    assert list(folder.iterdir()) == [] and trainings.running is None
    with pytest.raises(SettingsError, match="nothing was trained here yet"):
        trainings.progress()
    with pytest.raises(SettingsError, match=r"there is no training '\.\./\.\./x'"):
        trainings.progress("../../x")


def test_a_trainer_that_cannot_be_followed_is_ended(
    trainings: Trainings, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = list[subprocess.Popen[bytes]]()

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            begun.append(self)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainings_module.subprocess, "Popen", Noted)
    monkeypatch.setattr(trainings_module, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        trainings.start(recipe, sent_in(tmp_path / "sent"))
    assert len(begun) == 1 and begun[0].returncode is not None
    assert list((tmp_path / "data" / "trainings").iterdir()) == [] and trainings.running is None


# -------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 20000, got 0"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"steps": "7"}, "steps must be a whole number"),
        ({"density": float("nan")}, "density must be a number from 0.0001 to 0.2"),
        ({"learning_rate": True}, "learning rate must be a number"),
        ({"batch": 0}, r"pictures per step \(batch\) must be a whole number"),
        ({"mask": "best"}, "mask must be one of"),
        ({"targets": "--output_dir"}, "targets must be one of"),
        ({"resolution": 17}, "a multiple of 8"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt": "x" * 1001}, "too long"),
        ({"name": ""}, "needs a name"),
        ({"avoid": ["nobody"]}, "no adapter named 'nobody'"),
        ({"avoid": "bluefire"}, "must be a list"),
        ({"flip": 1}, "must be true or false"),
        ({"output_dir": "/etc"}, "no setting named 'output_dir'"),
    ],
)
def test_settings_are_checked(recipe: Recipe, values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        recipe.changed(values, ("bluefire",))


def test_words_cannot_become_flags(recipe: Recipe, trainings: Trainings, tmp_path: Path) -> None:
    words = {"name": "../../etc/x", "prompt": "--push_to_hub\n--output_dir /tmp", "class_prompt": "-a; rm -rf /"}
    recipe = recipe.changed(words, ())
    assert recipe.name == "x" and recipe.changed({"name": "AC/DC"}, ()).name == "AC-DC"
    flags = recipe.flags(trainings.base, tmp_path, {}, ROOT, resume=False)
    assert "--instance_prompt=--push_to_hub --output_dir /tmp" in flags
    assert "--class_prompt=-a; rm -rf /" in flags and "--push_to_hub" not in flags
    assert flags[flags.index("--output_dir") + 1] == str(tmp_path / "output")


def test_a_base_that_cannot_be_trained_says_so(session: Session, trainings: Trainings, recipe: Recipe) -> None:
    base = Base.of(session.pipe)
    assert base.trainable == "" and base.resolution == 16
    other = Base("x", "FluxPipeline", "cpu", "no", {}, 0, 0, 512)
    assert "FluxPipeline cannot be trained here" in other.trainable


# -------------------------------------------------------------------- pictures


def test_pictures_are_written_anew_without_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret place"  # turned; described
    Image.new("RGBA", (3000, 20), (255, 0, 0, 0)).save(tmp_path / "A.png")
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "b.JPG", "jpeg", exif=exif)
    (tmp_path / "a.txt").write_text("\ufeffthe  first\n")
    sent = sort_out([(f"some/{path.name}", path) for path in sorted(tmp_path.iterdir())])
    assert captions_of(sent) == ["the first", ""]
    write_pictures(sent, captions_of(sent), tmp_path / "out")
    first, second = (Image.open(tmp_path / "out" / name) for name in ("0000.png", "0001.png"))
    assert (first.size, first.mode, first.getpixel((0, 0))) == ((2048, 14), "RGB", (255, 255, 255))
    assert second.size == (20, 30) and not second.getexif() and not second.info
    assert (tmp_path / "out" / "0000.txt").read_text() == "the first"


def test_colours_are_written_in_srgb(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profile = science.rgb_profile(science.DISPLAY_P3, science.SRGB_CURVE)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for name, embedded in (("a.png", profile), ("b.png", b"broken")):
        Image.fromarray(pixels).save(tmp_path / name, icc_profile=embedded)
    sent = sort_out([(path.name, path) for path in sorted(tmp_path.iterdir())])
    write_pictures(sent, [], tmp_path / "out")
    first, second = (Image.open(tmp_path / "out" / name) for name in ("0000.png", "0001.png"))
    expected = science.rgb_to_srgb(pixels, science.DISPLAY_P3, science.SRGB_CURVE)
    np.testing.assert_allclose(first, expected, atol=0.75)
    np.testing.assert_array_equal(second, pixels)
    assert not first.info and "b.png: its colour profile is broken" in caplog.text and "a.png" not in caplog.text


def test_captions_and_side_files_are_told_from_pictures(tmp_path: Path) -> None:
    names = ["a.png", "B.PNG", unicodedata.normalize("NFC", "ä.png"), "d.png"]
    captions = ["a.caption", "b.TXT", unicodedata.normalize("NFD", "ä.txt"), "lonely.txt"]
    side = [".DS_Store", "Thumbs.db", "._a.png", "__MACOSX/a.png", ".ipynb_checkpoints/a.png"]
    for name in (*names, *captions, *side):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"words of {name}", encoding="utf-8")
    sent = sort_out([(name, tmp_path / name) for name in (*names, *captions, *side)])
    assert [name for name, _ in sent.pictures] == names
    assert captions_of(sent) == [*(f"words of {caption}" for caption in captions[:3]), ""]
    assert sent.left == ("lonely.txt",)


def bomb(side: int) -> bytes:
    content = io.BytesIO()
    Image.new("1", (side, side)).save(content, "png")
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", "not a picture"),
        ("x.png", b"#!/bin/sh", "not a picture"),
        ("x.png", b"\x89PNG\r\n\x1a\n", "not a picture"),
        ("x.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        ("x.png", bomb(8_000), "expected at most 50 million pixels"),
        ("x.png", bomb(20_000), "expected at most 50 million pixels"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / name).write_bytes(content)
    sent = sort_out([(f"../{name}", tmp_path / "sent" / name)])
    with pytest.raises(SettingsError, match="1 of 1 files cannot be used") as caught:
        write_pictures(sent, [], tmp_path / "out")
    assert problem in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_too_many_pictures_or_strange_captions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SettingsError, match="at most 200 pictures, got 201"):
        sort_out([("x.png", tmp_path / "x.png")] * (MAX_PICTURES + 1))
    with pytest.raises(SettingsError, match="UTF-8"):
        sort_out([("x.txt", tmp_path / "x.txt")])


# -------------------------------------------------------------------- what the trainer tells


def test_lines_that_are_not_whole_are_passed_over(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    lines = [{"step": step, "loss": step / 10, "images_per_second": 4, "peak_memory_gib": 1.5} for step in (1, 2, 3, 2)]
    lines[3]["loss"] = 9.0  # done again after a resumed checkpoint
    odd = ["[]", '{"step": 4}', '{"step": 5, "loss": NaN}', '{"step": 6, "lo']
    (logs / "steps.jsonl").write_text("\n".join([*map(json.dumps, lines), *odd]))
    steps = read_steps(tmp_path)
    assert (steps.losses, steps.speed, steps.peak_gib) == ({1: 0.1, 2: 9.0, 3: 0.3}, 4, 1.5)
    assert read_steps(tmp_path / "nowhere").done == 0


def test_what_is_left_follows_the_clock_with_the_samples_in_it(trainings: Trainings, recipe: Recipe) -> None:
    """Steps of 0.1 s, but a sample of 4 s after each fifth: 20 steps more take 4 * (0.5 + 4) s or so."""
    training = Training("one", trainings.base.path, recipe.changed({"steps": 40}, ()), 2, 1.0, "running", launched=1000)
    logs = trainings._folder / "one" / "output" / "logs"
    logs.mkdir(parents=True)

    def line(step: int, time: float) -> str:
        figures = {"loss": 1.0, "images_per_second": 10, "peak_memory_gib": 1.5}
        return json.dumps({"step": step, "time": time, **figures}) + "\n"

    earlier = "".join(line(step, 500 + step) for step in range(1, 13))  # before it was resumed
    trainings._keep(training)
    (logs / "steps.jsonl").write_text(earlier)
    assert trainings.progress("one").loading and trainings.progress("one").seconds_left is None
    now = [line(step, 1010 + 0.1 * step + 4 * (step // 5)) for step in range(5, 21)]
    (logs / "steps.jsonl").write_text(earlier + "".join(now))
    progress = trainings.progress("one")
    assert not progress.loading and progress.seconds_left == pytest.approx(20 * (0.1 + 12 / 15))
    (logs / "steps.jsonl").write_text(earlier + now[0])  # one step says what it took by itself
    assert trainings.progress("one").seconds_left == pytest.approx(35 / 10)
    trainings._keep(replace(training, state="failed"))


def test_the_last_line_of_a_log_is_fit_to_be_shown(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert last_line(log) == ""
    log.write_text("Steps 1\rSteps 2\n\x1b[31mKilled\n\n")
    assert last_line(log) == "\\x1b[31mKilled"
    log.write_text(f"error: no room in {tmp_path}/x:\n  - this\n  - that\nSteps:  10%|#   | 1/10\n")
    assert last_line(log) == "no room in x: - this"
