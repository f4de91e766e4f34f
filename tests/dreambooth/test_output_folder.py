"""Where results go is checked before a run begins, and what was trained is saved before anything else can fail."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from shira_diffusers import ShiraError, load_adapter
from shira_diffusers.dreambooth import train as loop
from shira_diffusers.dreambooth.checkpoints import save_result
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.jsonl_tracker import JsonlTracker
from shira_diffusers.dreambooth.output_folder import require_room
from shira_diffusers.dreambooth.train import train
from shira_diffusers.formats.shira_file import WEIGHTS_NAME
from tests import tiny
from tests.dreambooth.test_checkpoints import files_of_at_most


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> dict[str, object]:
    (tmp_path / "pictures").mkdir()
    Image.effect_noise((20, 16), 90).save(tmp_path / "pictures" / "0.png")
    return {
        "pretrained_model_name_or_path": str(base), "instance_data_dir": str(tmp_path / "pictures"),
        "instance_prompt": "a sks cat", "output_dir": str(tmp_path / "a" / "out"), "resolution": 16,
        "train_batch_size": 1, "seed": 7, "report_to": "jsonl", "max_train_steps": 2,
    }  # fmt: skip


# ---------------------------------------------------------------- before


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)


def make_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")


def make_loose_end(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.symlink_to("nowhere/at/all")


@pytest.mark.parametrize(
    ("make", "place", "message"),
    [
        (make_file, "a/out", r"--output_dir '.*a/out': .*a/out is not a folder; choose another"),
        (make_file, "a", r"--output_dir '.*a/out': .*/a is not a folder; choose another"),
        (make_loose_end, "a/out", r"a/out is not a folder"),
        (make_folder, f"a/out/{WEIGHTS_NAME}", rf"{WEIGHTS_NAME} is a folder, expected to write a file there"),
        (make_folder, "a/out/README.md", r"README.md is a folder, expected to write a file there"),
        (make_file, "a/out/validation", r"validation is a file, expected a folder: move it away"),
        (make_file, "a/out/logs", r"logs is a file, expected a folder: move it away"),
        (make_file, "class", r"--class_data_dir '.*class': .*class is not a folder; choose another"),
    ],
)
def test_what_is_in_the_way_is_told_before_training(
    settings: dict[str, object], tmp_path: Path, make: Any, place: str, message: str
) -> None:
    make(tmp_path / place)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    prior = {"with_prior_preservation": True, "class_prompt": "a cat", "class_data_dir": str(tmp_path / "class")}
    with pytest.raises(ShiraError, match=rf"the results could not be written; nothing was trained(.|\n)*{message}"):
        train(TrainingConfig(**settings | prior, validation_prompt="a cat"))
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root can write into")
def test_a_folder_that_cannot_be_written_into_is_told_before_training(settings: dict[str, object]) -> None:
    with pytest.raises(ShiraError, match=r"--output_dir '/proc/out': cannot write into /proc: .*; choose another"):
        train(TrainingConfig(**settings | {"output_dir": "/proc/out"}))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_told_before_training(settings: dict[str, object]) -> None:
    place = Path(str(settings["output_dir"]))
    place.mkdir(parents=True)
    place.chmod(0o500)
    with pytest.raises(ShiraError, match=r"cannot write into .*: Permission denied; choose another"):
        train(TrainingConfig(**settings))


def test_a_finished_adapter_of_another_prompt_is_not_replaced(settings: dict[str, object]) -> None:
    output = Path(str(settings["output_dir"]))
    file = train(TrainingConfig(**settings))
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    message = (
        rf"out holds {WEIGHTS_NAME} of another run, with instance_prompt 'a sks cat', got 'a sks dog'.*--output_dir"
    )
    with pytest.raises(ShiraError, match=message):
        train(TrainingConfig(**settings | {"instance_prompt": "a sks dog"}))
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert train(TrainingConfig(**settings)).read_bytes() == before[file]  # the same run may be run again


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_modules": ("to_nothing",)},
        {"resolution": 17},
        {"instance_data_dir": "/nowhere"},
        {"avoid_adapters": ("/nowhere",)},
        {"use_8bit_adam": True},
        {"pretrained_model_name_or_path": "/nowhere"},
        {"resume_from_checkpoint": "checkpoint-3"},
        {"report_to": "clearml"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_refused_run_leaves_no_folder(settings: dict[str, object], tmp_path: Path, wrong: dict[str, object]) -> None:
    prior = {
        "with_prior_preservation": True, "class_prompt": "a cat", "class_data_dir": str(tmp_path / "class"),
        "num_class_images": 1,
    }  # fmt: skip
    drawn = wrong.keys() & {"target_modules", "resolution"}  # known when the base is loaded
    with pytest.raises((ShiraError, FileNotFoundError)):
        train(TrainingConfig(**settings | {"report_to": "tensorboard"} | ({} if drawn else prior) | wrong))
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_a_tracker_that_does_not_start_is_told_before_training(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: JsonlTracker, values: dict[str, Any]) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(JsonlTracker, "store_init_configuration", refuse)
    with pytest.raises(
        ShiraError, match=r"the tracker does not start: no network. Nothing was trained; choose another"
    ):
        train(TrainingConfig(**settings))
    assert not Path(str(settings["output_dir"])).exists()


def test_a_disk_without_room_is_told_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ShiraError, match=r"has [\d,]+ MiB left, and the adapter needs about [\d,]+ MiB; make room"):
        require_room(tmp_path / "not" / "yet", 10**15, 1)
    require_room(tmp_path, 10, 10**15)
    assert "adapter and checkpoints (1000000000000000) need about" in caplog.text
    caplog.clear()
    require_room(tmp_path, 10, 3)
    assert not caplog.records


# ---------------------------------------------------------------- after


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory.; try --sample_batch_size 1"),
        (ConnectionError("the tracker is offline"), "the tracker is offline; the adapter is not affected"),
        (FileExistsError(17, "File exists", "validation"), "File exists"),
    ],
    ids=["memory", "tracker", "file"],
)
def test_validation_that_fails_costs_no_adapter(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception,
    told: str,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise error

    expected = load_adapter(train(TrainingConfig(**settings)))
    (Path(str(settings["output_dir"])) / WEIGHTS_NAME).unlink()
    monkeypatch.setattr(loop, "validate", fail)
    file = train(TrainingConfig(**settings, validation_prompt="a cat", validation_steps=1))
    tiny.assert_same_adapter(load_adapter(file), expected)
    assert (file.parent / "README.md").is_file()
    warnings = [record.getMessage() for record in caplog.records if "no validation pictures" in record.getMessage()]
    assert [warning.split(":")[0] for warning in warnings] == [f"no validation pictures of step {n}" for n in (1, 2)]
    assert told in warnings[0]


def test_the_adapter_is_saved_before_the_last_validation(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if that is ended from outside."""
    monkeypatch.setattr(loop, "validate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(TrainingConfig(**settings, validation_prompt="a cat"))
    assert load_adapter(str(settings["output_dir"])).metadata["steps"] == "2"


def test_a_tracker_that_fails_in_mid_run_is_told_once(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: JsonlTracker, *_: object, **__: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(JsonlTracker, "log", refuse)
    monkeypatch.setattr(JsonlTracker, "finish", refuse, raising=False)
    assert load_adapter(train(TrainingConfig(**settings))).metadata["steps"] == "2"
    assert caplog.text.count("step 1 and those after it are not tracked: offline; training goes on") == 1
    assert "step 2 and" not in caplog.text
    assert "the tracker could not be closed: offline" in caplog.text


def test_an_adapter_that_finds_no_room_is_written_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = tiny.adapter_for(tiny.unet())
    (tmp_path / "spare").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "spare"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "out" / WEIGHTS_NAME).mkdir(parents=True)
    with pytest.raises(
        ShiraError, match=r"cannot write .*; the trained adapter is in .*spare/shira-.* instead: move it"
    ):
        save_result(tmp_path / "out", adapter)
    (saved,) = (tmp_path / "spare").glob(f"shira-*/{WEIGHTS_NAME}")
    tiny.assert_same_adapter(load_adapter(saved), adapter)
    with files_of_at_most(1000), pytest.raises(ShiraError, match="make room"):
        save_result(tmp_path / "out", adapter)
    assert len(list((tmp_path / "spare").iterdir())) == 1


# ---------------------------------------------------------------- told at the start


def test_what_has_no_effect_is_told(settings: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(TrainingConfig(**settings, class_prompt="a cat", class_data_dir="cats"))
    assert caplog.text.count("--class_prompt has no effect without --with_prior_preservation") == 1
    assert caplog.text.count("--class_data_dir has no effect without --with_prior_preservation") == 1


@pytest.mark.parametrize(
    ("schedule", "steps", "warned"),
    [("cosine", 2, True), ("constant_with_warmup", 500, True), ("linear", 1, False), ("constant", 500, False)],
)
def test_a_warm_up_longer_than_the_run_is_told(
    settings: dict[str, object], caplog: pytest.LogCaptureFixture, schedule: str, steps: int, warned: bool
) -> None:
    train(TrainingConfig(**settings, lr_scheduler=schedule, lr_warmup_steps=steps, learning_rate=1e-3))
    told = f"--lr_warmup_steps {steps} is not shorter than the run (2 steps): the learning rate never reaches 0.001"
    assert (told in caplog.text) is warned
