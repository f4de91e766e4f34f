"""Training of SD3 and Flux on a GPU: half precision, text encoders that leave the device, 8-bit states."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from shira_diffusers import ShiraAdapter, load_adapter
from shira_diffusers.dreambooth.base_model import complete, load_base
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.families import text_encoders_of
from shira_diffusers.dreambooth.pictures import find_pictures
from shira_diffusers.dreambooth.prepare import prepare_examples
from shira_diffusers.dreambooth.sampling import validate
from shira_diffusers.dreambooth.train import train
from tests import tiny

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

BASES = {"sd3": tiny.whole_sd3_pipeline, "flux": tiny.flux_pipeline}


@pytest.fixture(params=BASES)
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    BASES[request.param]().save_pretrained(tmp_path / "base")
    (tmp_path / "pictures").mkdir()
    Image.effect_noise((16, 16), 90).save(tmp_path / "pictures" / "0.png")
    return {
        "pretrained_model_name_or_path": str(tmp_path / "base"), "instance_data_dir": str(tmp_path / "pictures"),
        "instance_prompt": "a sks cat", "output_dir": str(tmp_path / "out"), "resolution": 16, "train_batch_size": 1,
        "learning_rate": 1e-2, "seed": 7, "report_to": "none", "max_sequence_length": 12, "max_train_steps": 4,
        "validation_prompt": "a dog", "num_validation_images": 1, "density": 0.3,
    }  # fmt: skip


def run(settings: dict[str, object], **others: object) -> ShiraAdapter:
    AcceleratorState._reset_state(reset_partial_state=True)  # one process has one precision
    try:
        return load_adapter(train(TrainingConfig(**(settings | others))))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("encoders", [False, True], ids=["denoiser", "and encoders"])
def test_a_run_learns(settings: dict[str, object], precision: str, encoders: bool) -> None:
    options = {"mask_type": "grad", "calibration_steps": 1, "train_text_encoder": encoders}
    adapter = run(settings, mixed_precision=precision, **options)
    assert ("text_encoder" in adapter.component_names()) == encoders
    assert any(bool(delta.values.any()) for delta in adapter.deltas.values())
    assert list(Path(str(settings["output_dir"]), "validation").iterdir())


def test_text_encoders_leave_the_gpu_and_return_for_pictures(settings: dict[str, object]) -> None:
    config = complete(TrainingConfig(**settings))
    pipe = load_base(config, torch.device("cuda"), torch.bfloat16)
    prepare_examples(pipe, config, [find_pictures(str(settings["instance_data_dir"]), "a sks cat")], seed=0)

    def places() -> set[str]:
        return {encoder.device.type for encoder in text_encoders_of(pipe)}

    assert places() == {"cpu"} and pipe.transformer.device.type == "cuda"
    assert len(validate(pipe, config, 1, 0)) == 1
    assert places() == {"cpu"}


def test_8_bit_states_are_resumed(settings: dict[str, object]) -> None:
    pytest.importorskip("bitsandbytes")
    options = {"use_8bit_adam": True, "checkpointing_steps": 2}
    whole = run(settings, **options)
    again = run(settings, **options, resume_from_checkpoint="checkpoint-2")
    for name, delta in whole.deltas.items():
        torch.testing.assert_close(again.deltas[name].values, delta.values, rtol=1e-2, atol=1e-3)
