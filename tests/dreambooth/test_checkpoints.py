"""Checkpoints survive kills and full disks; a run that resumes goes on to the same bits."""

import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from shira_diffusers import ShiraError, load_adapter
from shira_diffusers.dreambooth.checkpoints import list_checkpoints, read_checkpoint, save_checkpoint, save_result
from shira_diffusers.dreambooth.command_line import command_line
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.train import train
from tests import tiny
from tests.warm import python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("base")
    tiny.pipeline().save_pretrained(folder / "sd")
    tiny.sdxl_pipeline().save_pretrained(folder / "xl")
    (folder / "pictures").mkdir()
    for number in range(5):
        Image.effect_noise((20, 16 + number), 90).save(folder / "pictures" / f"{number}.png")
    return {
        "pretrained_model_name_or_path": str(folder / "sd"), "instance_data_dir": str(folder / "pictures"),
        "instance_prompt": "a sks cat", "resolution": 16, "train_batch_size": 2, "learning_rate": 1e-2, "seed": 7,
        "report_to": "none", "calibration_steps": 1,
    }  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_is_killed_while_it_saves_loses_one_step_at_most(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints after each step; SIGKILL a few milliseconds after one has been begun, then go on from the latest."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    output = tmp_path / "killed"
    options = settings | {"max_train_steps": 24, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    config = TrainingConfig(**options, output_dir=str(output), resume_from_checkpoint="latest")
    flags = [part for flag in command_line(config) for part in flag]
    moments = random.Random(3)
    for _ in range(3):
        process = subprocess.Popen(
            python("train_dreambooth_shira.py", *flags), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        begun = first_begun(output, after=newest(output) + 2)
        time.sleep(moments.random() * 0.02)
        process.kill()
        process.communicate()  # until nobody can write into the pipe any more
        assert process.returncode == -signal.SIGKILL
        assert newest(output) >= begun - 1
        assert read_checkpoint(list_checkpoints(output)[-1])["step"] == newest(output)
        assert load_adapter(list_checkpoints(output)[-1]).metadata["steps"] == str(newest(output))
    assert newest(output) < 24
    last = load_adapter(
        train(TrainingConfig(**options | {"output_dir": str(output), "resume_from_checkpoint": "latest"}))
    )
    assert sorted(path.name for path in output.glob("*checkpoint*")) == ["checkpoint-23", "checkpoint-24"]
    assert not list(output.glob(".checkpoint*"))
    whole = options | {"output_dir": str(tmp_path / "whole"), "checkpointing_steps": 100}
    tiny.assert_same_adapter(last, load_adapter(train(TrainingConfig(**whole))))


@pytest.mark.usefixtures("one_thread")
def test_an_adapter_is_the_mean_of_the_values_beyond_a_part_of_the_run(
    settings: dict[str, object], tmp_path: Path
) -> None:
    options = settings | {"max_train_steps": 5, "checkpointing_steps": 1, "average_from": 0.4}
    averaged = load_adapter(train(TrainingConfig(**options | {"output_dir": str(tmp_path / "mean")})))
    train(TrainingConfig(**options | {"output_dir": str(tmp_path / "last"), "average_from": 1.0}))
    states = {n: read_checkpoint(tmp_path / "last" / f"checkpoint-{n}")["tuner"] for n in range(1, 6)}
    each = {n: state["deltas"] for n, state in states.items()}
    for steps, checkpoint in ((2, 2), (3, 2), (4, 3)):  # a resumed run may end earlier than the one it was begun as
        resumed = {"resume_from_checkpoint": str(tmp_path / "mean" / f"checkpoint-{checkpoint}")}
        train(
            TrainingConfig(**options | resumed | {"output_dir": str(tmp_path / f"{steps}"), "max_train_steps": steps})
        )
    for folder, mean in (
        ("mean/checkpoint-2", each[2]),
        ("mean/checkpoint-4", torch.stack([each[3], each[4]]).mean(0)),
        ("mean", torch.stack([each[3], each[4], each[5]]).mean(0)),
        ("2", each[2]),
        ("3", each[3]),
        ("4", torch.stack([each[3], each[4]]).mean(0)),
    ):
        adapter = load_adapter(tmp_path / folder)
        values = torch.cat([adapter.deltas[name].values for name in states[1]["masks"]])
        torch.testing.assert_close(values, mean.half(), rtol=2e-3, atol=1e-6)
    assert averaged.metadata["mask"] == "grad_mean" and averaged.metadata["mask_budget"] == "global"


def first_begun(output: Path, after: int) -> int:
    """Wait until a checkpoint of a later step is being written: its step."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        steps = [int(path.name.split("-")[1].split(".")[0]) for path in output.glob(".checkpoint-*.tmp")]
        if steps and max(steps) > after:
            return max(steps)
        time.sleep(0.0005)  # or the run has half a core less
    raise AssertionError("no checkpoint was begun")


def newest(output: Path) -> int:
    have = list_checkpoints(output)
    return int(have[-1].name.split("-")[1]) if have else 0


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond it fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("again", [False, True], ids=["next", "same step"])
def test_a_disk_without_room_leaves_the_checkpoints_before(tmp_path: Path, again: bool) -> None:
    adapter = tiny.adapter_for(tiny.unet())
    state = {"deltas": torch.zeros(100_000)}
    save_checkpoint(tmp_path, 1, state, adapter, 1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()}
    with (
        files_of_at_most(200_000),
        pytest.raises(
            ShiraError,
            match=r"cannot write .*checkpoint-\d: .*File too large; the last whole checkpoint is checkpoint-1;",
        ),
    ):
        save_checkpoint(tmp_path, 1 if again else 2, state, adapter, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()} == before


def test_an_adapter_without_room_names_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    adapter = tiny.adapter_for(tiny.unet())
    save_checkpoint(tmp_path, 3, {}, adapter, None)
    message = r"cannot write .*pytorch_shira_weights.safetensors: .*; the last whole checkpoint is checkpoint-3;"
    with files_of_at_most(1000), pytest.raises(ShiraError, match=message):
        save_result(tmp_path, adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_state_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"deltas": torch.zeros(1000)}, tiny.adapter_for(tiny.unet()), None)
    state = tmp_path / "checkpoint-1" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ShiraError, match=r"cannot read .*state.pt(.|\n)*resume from another checkpoint"):
        read_checkpoint(state.parent)


EVERYTHING = {
    "gradient_accumulation_steps": 2, "caption_dropout_rate": 0.3, "random_flip": True, "noise_offset": 0.1,
    "snr_gamma": 5.0, "train_text_encoder": True, "text_encoder_lr": 1e-3, "lr_scheduler": "cosine",
    "lr_warmup_steps": 1, "max_train_steps": 6, "checkpointing_steps": 3, "mask_type": "grad", "calibration_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"pretrained_model_name_or_path": "xl", "optimizer": "prodigy", "learning_rate": 1.0},
        {"use_dora": True, "cache_latents": True, "center_crop": True, "gradient_checkpointing": True},
    ],
    ids=["sd", "sdxl with prodigy", "dora, cached"],
)
def test_resuming_equals_never_having_stopped(
    settings: dict[str, object], tmp_path: Path, others: dict[str, object]
) -> None:
    prior = {
        "with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "class_prompt": "a cat",
        "num_class_images": 2,
    }  # fmt: skip
    if "pretrained_model_name_or_path" in others:
        others = others | {"pretrained_model_name_or_path": str(Path(settings["instance_data_dir"]).parent / "xl")}
    options = settings | EVERYTHING | prior | others | {"output_dir": str(tmp_path / "out")}
    whole = load_adapter(train(TrainingConfig(**options)))
    half = load_adapter(tmp_path / "out" / "checkpoint-3")
    assert any(half.deltas[name] != delta for name, delta in whole.deltas.items())
    resumed = load_adapter(train(TrainingConfig(**options, resume_from_checkpoint="checkpoint-3")))
    tiny.assert_same_adapter(resumed, whole)


def test_a_changed_learning_rate_counts_from_where_the_run_resumes(
    settings: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = settings | {"max_train_steps": 4, "checkpointing_steps": 2, "output_dir": str(tmp_path)}
    train(TrainingConfig(**options))
    half = load_adapter(tmp_path / "checkpoint-2")
    still = options | {"learning_rate": 0.0, "resume_from_checkpoint": "checkpoint-2"}
    tiny.assert_same_adapter(load_adapter(train(TrainingConfig(**still))), half)


def test_another_optimizer_is_refused(settings: dict[str, object], tmp_path: Path) -> None:
    options = settings | {"max_train_steps": 2, "checkpointing_steps": 1, "output_dir": str(tmp_path)}
    train(TrainingConfig(**options))
    with pytest.raises(ShiraError, match="optimizer was 'adamw', got 'prodigy'"):
        train(TrainingConfig(**options, optimizer="prodigy", resume_from_checkpoint="latest"))
