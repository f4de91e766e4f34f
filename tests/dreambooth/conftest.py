"""Fixtures of the trainer's tests."""

from pathlib import Path

import pytest
from PIL import Image

from shira_diffusers.dreambooth import sampling
from tests import tiny


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class and validation pictures with fewer steps than users get."""
    monkeypatch.setattr(sampling, "_STEPS", 4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def run_settings(base: Path, tmp_path: Path) -> dict[str, object]:
    """A short run on three pictures of noise, each of another size."""
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.effect_noise((20, 16 + number), 90).save(tmp_path / "pictures" / f"{number}.png")
    return {
        "pretrained_model_name_or_path": str(base), "instance_data_dir": str(tmp_path / "pictures"),
        "instance_prompt": "a sks cat", "output_dir": str(tmp_path / "out"), "resolution": 16, "train_batch_size": 2,
        "learning_rate": 1e-2, "seed": 7, "report_to": "none", "calibration_steps": 1,
    }  # fmt: skip
