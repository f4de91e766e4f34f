"""The figures of a run as lines of JSON."""

import json
from pathlib import Path

from PIL import Image

from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.jsonl_tracker import JSONL_NAME, JsonlTracker
from shira_diffusers.dreambooth.train import train


def test_each_step_is_a_line(base: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "pictures" / "red.png")
    settings: dict[str, object] = {
        "pretrained_model_name_or_path": str(base), "instance_data_dir": str(tmp_path / "pictures"),
        "instance_prompt": "a sks cat", "output_dir": str(tmp_path / "out"), "resolution": 16, "train_batch_size": 1,
        "report_to": "jsonl", "checkpointing_steps": 2, "seed": 7,
    }  # fmt: skip
    train(TrainingConfig(**settings, max_train_steps=3))
    file = tmp_path / "out" / "logs" / JSONL_NAME
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line.keys() == {"step", "time", "loss", "lr", "images_per_second", "peak_memory_gib"} for line in lines)
    train(TrainingConfig(**settings, max_train_steps=4, resume_from_checkpoint="latest"))
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in again] == [1, 2, 3, 3, 4]
    assert again[2]["loss"] == again[3]["loss"]


def test_a_line_is_whole_at_once(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "logs")
    tracker.log({"loss": 0.5}, step=1)
    assert tracker.tracker.read_text().endswith(', "loss": 0.5}\n')
