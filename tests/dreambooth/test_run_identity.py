"""A folder that several runs write into: each has its own checkpoints."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from shira_diffusers import ShiraAdapter, ShiraError, load_adapter
from shira_diffusers.dreambooth.checkpoints import find_checkpoint, run_number, save_checkpoint
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.pictures import find_pictures
from shira_diffusers.dreambooth.run import checkpoint_interval
from shira_diffusers.dreambooth.run_identity import identity_of
from shira_diffusers.dreambooth.train import train
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(run_settings: dict[str, object]) -> dict[str, object]:
    return run_settings | {"max_train_steps": 2, "checkpointing_steps": 1}


def run(settings: dict[str, object], **others: object) -> ShiraAdapter:
    return load_adapter(train(TrainingConfig(**(settings | others))))


def checkpoints(settings: dict[str, object]) -> dict[str, str]:
    """The prompt of each checkpoint's adapter, by name."""
    found = sorted(Path(str(settings["output_dir"])).glob("*checkpoint*"))
    return {path.name: load_adapter(path).metadata["instance_prompt"] for path in found}


def test_the_limit_counts_the_checkpoints_of_this_run(
    settings: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    run(settings, instance_prompt="a sks dog", max_train_steps=5, checkpoints_total_limit=2)
    assert "another run" not in caplog.text
    run(settings, checkpoints_total_limit=2, max_train_steps=3)
    dogs = {f"checkpoint-{step}": "a sks dog" for step in (4, 5)}
    assert checkpoints(settings) == dogs | {"checkpoint-2": "a sks cat", "checkpoint-3": "a sks cat"}
    assert (
        "out holds checkpoints of another run (checkpoint-4, checkpoint-5): they do not count as this run's, and are "
        "replaced where it reaches the same steps; so is pytorch_shira_weights.safetensors when it ends; choose "
        "another --output_dir to keep them"
    ) in caplog.text


@pytest.mark.parametrize("changed", ["prompt", "caption", "picture", "base"])
def test_latest_passes_over_another_runs_checkpoints(
    settings: dict[str, object], tmp_path: Path, changed: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(settings)
    if changed == "prompt":
        settings["instance_prompt"] = "a sks dog"
    elif changed == "caption":
        (tmp_path / "pictures" / "0.txt").write_text("a red cat")
    elif changed == "picture":
        Image.effect_noise((20, 16), 50).save(tmp_path / "pictures" / "0.png")
    else:
        pipe = tiny.pipeline()
        pipe.unet = tiny.unet(seed=9)
        pipe.save_pretrained(tmp_path / "other")
        settings["pretrained_model_name_or_path"] = str(tmp_path / "other")
    resumed = run(settings, resume_from_checkpoint="latest")
    (told,) = [record.getMessage() for record in caplog.records if "no checkpoint of this run" in record.getMessage()]
    assert "starting a new one. checkpoint-2 is of another run" in told
    what = {"prompt": "instance_prompt was 'a sks cat', got 'a sks dog'", "base": "base model was 'folder"}
    assert what.get(changed, "pictures was '3 with captions") in told
    tiny.assert_same_adapter(resumed, run(settings, output_dir=str(tmp_path / "fresh")))


def test_latest_finds_this_run_among_others(settings: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    """Also behind the checkpoints of a later run that got further."""
    whole = run(settings, max_train_steps=4, output_dir=str(settings["output_dir"]) + "-whole")
    run(settings, max_train_steps=2)
    run(settings, instance_prompt="a sks dog", max_train_steps=4, checkpointing_steps=4)
    with caplog.at_level(logging.INFO):
        resumed = run(settings, max_train_steps=4, resume_from_checkpoint="latest")
    assert f"resuming from {settings['output_dir']}/checkpoint-2: 2 steps are done" in caplog.text
    tiny.assert_same_adapter(resumed, whole)


def test_a_run_can_be_moved(settings: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(settings, max_train_steps=4)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("out", "pictures"):
        (tmp_path / name).rename(moved / name)
    shutil.copytree(str(settings["pretrained_model_name_or_path"]), moved / "base")
    settings |= {"output_dir": str(moved / "out"), "instance_data_dir": str(moved / "pictures")}
    settings |= {"pretrained_model_name_or_path": str(moved / "base"), "max_train_steps": 4}
    with caplog.at_level(logging.INFO):
        tiny.assert_same_adapter(run(settings, resume_from_checkpoint="latest"), whole)
    assert "checkpoint-3: 3 steps are done" in caplog.text


def test_an_adapter_that_is_not_there_is_not_said_to_be_replaced(
    settings: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path / "out", 9, {}, tiny.adapter_for(tiny.unet()), None, run=1)
    run(settings, max_train_steps=1)
    assert "where it reaches the same steps; choose another --output_dir" in caplog.text


def test_latest_without_a_checkpoint_says_so(settings: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    started = run(settings, resume_from_checkpoint="latest")
    assert f"no checkpoint in {settings['output_dir']} to resume from: starting a new run" in caplog.text
    tiny.assert_same_adapter(started, run(settings, output_dir=str(settings["output_dir"]) + "-fresh"))


def test_a_checkpoint_of_another_run_that_is_named_is_taken_with_a_warning(
    settings: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    run(settings)
    adapter = run(settings, instance_prompt="a sks dog", max_train_steps=3, resume_from_checkpoint="checkpoint-2")
    assert adapter.metadata["steps"] == "3"
    assert "checkpoint-2 is of another run, and training goes on from it" in caplog.text
    assert "instance_prompt was 'a sks cat', got 'a sks dog'" in caplog.text
    with pytest.raises(ShiraError, match=r"density was 0.02, got 0.5"):
        run(settings, density=0.5, resume_from_checkpoint="checkpoint-2")


def test_settings_that_cannot_change_choose_among_this_runs_checkpoints(settings: dict[str, object]) -> None:
    run(settings, max_train_steps=1)
    run(settings, max_train_steps=2, checkpointing_steps=2, density=0.5)
    assert run(settings, max_train_steps=1, resume_from_checkpoint="latest").metadata["density"] == "0.02"
    with pytest.raises(ShiraError, match=r"density was 0.5, got 0.3"):
        run(settings, density=0.3, resume_from_checkpoint="latest")


def test_going_on_from_an_earlier_checkpoint_keeps_what_it_writes(settings: dict[str, object], tmp_path: Path) -> None:
    """The checkpoints after it are of a run that is left behind: they do not count."""
    run(settings, max_train_steps=5)
    run(settings, max_train_steps=3, checkpoints_total_limit=1, resume_from_checkpoint="checkpoint-1")
    about = {path.parent.name: json.loads(path.read_text())["run"] for path in (tmp_path / "out").glob("*/run.json")}
    assert about == {"checkpoint-1": 1, "checkpoint-3": 2, "checkpoint-4": 1, "checkpoint-5": 1}


def test_checkpoints_of_older_versions_count_as_one_run(settings: dict[str, object], tmp_path: Path) -> None:
    whole = run(settings, max_train_steps=3)
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    for file in (tmp_path / "out").glob("*/run.json"):
        file.unlink()
    options = {"max_train_steps": 3, "resume_from_checkpoint": "latest", "checkpoints_total_limit": 1}
    tiny.assert_same_adapter(run(settings, **options), whole)
    assert list(checkpoints(settings)) == ["checkpoint-3"]


def test_a_run_has_a_number_of_its_own(tmp_path: Path) -> None:
    adapter = tiny.adapter_for(tiny.unet())
    assert run_number(tmp_path, None) == 1
    for step, number in ((1, 1), (2, 1), (3, 2)):
        save_checkpoint(tmp_path, step, {}, adapter, None, run=number)
    assert run_number(tmp_path, None) == 3
    assert run_number(tmp_path, tmp_path / "checkpoint-2") == 1
    assert run_number(tmp_path, tmp_path / "checkpoint-3") == 2
    assert run_number(tmp_path, tmp_path / "checkpoint-1") == 3
    assert run_number(tmp_path / "elsewhere", tmp_path / "checkpoint-3") == 1


def test_a_run_goes_on_from_a_checkpoint_that_was_renamed(tmp_path: Path) -> None:
    """Its steps are no longer known by the name, so what follows is a new run."""
    adapter = tiny.adapter_for(tiny.unet())
    save_checkpoint(tmp_path, 2, {}, adapter, None, run=1).rename(tmp_path / "best")
    assert find_checkpoint(tmp_path, "best") == tmp_path / "best"
    assert run_number(tmp_path, tmp_path / "best") == 1
    save_checkpoint(tmp_path, 4, {}, adapter, None, run=1)
    assert run_number(tmp_path, tmp_path / "best") == 2


def test_what_another_program_left_is_not_replaced(settings: dict[str, object], tmp_path: Path) -> None:
    theirs = tmp_path / "out" / "checkpoint-1"
    theirs.mkdir(parents=True)
    (theirs / "pytorch_lora_weights.safetensors").write_bytes(b"theirs")
    with pytest.raises(ShiraError, match=r"out holds checkpoint-1, expected checkpoints of this trainer"):
        run(settings)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == [
        "checkpoint-1", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip


def test_repeats_are_the_same_pictures(settings: dict[str, object], tmp_path: Path) -> None:
    pictures = find_pictures(tmp_path / "pictures", "a sks cat")
    config = TrainingConfig(**settings)
    assert identity_of(config, pictures * 3) == identity_of(config, pictures)
    assert identity_of(config, pictures[:2]) != identity_of(config, pictures)


# ---------------------------------------------------------------- how often


def test_a_run_writes_checkpoints_by_default(settings: dict[str, object]) -> None:
    del settings["checkpointing_steps"]
    run(settings, max_train_steps=9)
    assert list(checkpoints(settings)) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert [checkpoint_interval(steps) for steps in (1, 3, 4, 100, 1999, 2000, 10_000)] == [1, 3, 1, 25, 499, 500, 500]
    assert torch.load(
        Path(str(settings["output_dir"])) / "checkpoint-8" / "state.pt", weights_only=True
    )["step"] == 8  # fmt: skip
