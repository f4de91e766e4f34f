"""Pictures by ONNX Runtime alone: those of the pipeline, up to rounding, in a process that has no torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from examples.edge import draw
from shira_diffusers.edge.export import export_onnx
from tests import tiny

WITHOUT_TORCH = """
import sys
sys.modules |= dict.fromkeys(("torch", "diffusers", "transformers", "onnx"))  # as if they were not installed
from examples.edge.draw import main
main()
assert sys.modules["torch"] is None
try:
    from shira_diffusers import Resident
except ImportError as error:
    print(error)
"""


def test_a_picture_without_torch_is_the_pipelines(
    exported: Callable[[str], Path], saved: Callable[..., Path], tmp_path: Path
) -> None:
    pipe, file, out = tiny.pipeline(), saved(tiny.adapter_for(tiny.pipeline(), size=0.1)), tmp_path / "a.png"
    given = [exported("fp32"), tiny.PROMPT, "--adapter", f"{file}=0.5", "--steps", "3", "--seed", "4", "-o", out]
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, given)], capture_output=True, text=True, check=True
    )
    assert "switched in" in ran.stdout
    assert "shira_diffusers.Resident needs torch and diffusers, which are not installed" in ran.stdout
    pipe.load_shira(file, scale=0.5)
    latents = torch.from_numpy(draw.first_latents(exported("fp32"), 4))
    size = {"height": tiny.SIZE, "width": tiny.SIZE}
    drawn = pipe(tiny.PROMPT, latents=latents, num_inference_steps=3, guidance_scale=3.0, output_type="np", **size)
    found = np.asarray(Image.open(out)).astype(int)
    expected = (drawn.images[0] * 255).round().astype(int)
    assert found.shape == expected.shape == (tiny.SIZE, tiny.SIZE, 3)
    assert np.abs(found - expected).max() <= 1
    assert expected.std() > 5


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False},
    ],
)
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_steps_are_those_of_the_scheduler(options: dict[str, object], steps: int) -> None:
    scheduler = DDIMScheduler(clip_sample=False, **options)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 4, 4, generator=generator)
    mine = latents.numpy()
    taken = list(draw.denoising(dict(scheduler.config), steps))
    assert [step.time for step in taken] == scheduler.timesteps.tolist()
    for step in taken:
        predicted = torch.randn(latents.shape, generator=generator)
        latents = scheduler.step(predicted, step.time, latents).prev_sample
        mine = step.next(mine, predicted.numpy())
        assert np.allclose(mine, latents.numpy(), rtol=1e-3, atol=1e-3)


def test_an_unknown_scheduler_is_refused() -> None:
    with pytest.raises(SystemExit, match="cannot sample with prediction_type='sample'"):
        list(draw.denoising(dict(DDIMScheduler(clip_sample=False, prediction_type="sample").config), 2))


def test_tokens_are_those_of_the_tokenizer(exported: Callable[[str], Path]) -> None:
    tokenizer, prompts = tiny.tokenizer(), ["", "a red cat", "a word after a word after a word after a word"]
    expected = tokenizer(prompts, padding="max_length", max_length=16, truncation=True).input_ids
    assert draw.tokenized(exported("fp32") / "tokenizer", prompts).tolist() == expected


ASSETS = Path("assets")


@pytest.mark.nightly
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2), (torch.float16, 12)])
def test_the_demo_model_draws_its_pictures(tmp_path: Path, dtype: torch.dtype, close: int) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji-diffusion", torch_dtype=dtype)
    folder = export_onnx(pipe, tmp_path / "exported")
    assert json.loads((folder / "unet" / "model.json").read_text())["transposed"]
    resident = draw.OnnxResident(folder)
    resident.add(ASSETS / "adapters" / "bluefire.safetensors", "bluefire")
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji-diffusion")
    pipe.load_shira(ASSETS / "adapters" / "bluefire.safetensors", "bluefire")
    prompt, latents = "a picture of a red apple on a teal background", draw.first_latents(folder, 1)
    for mix in ({}, {"bluefire": 0.8}):
        resident.set(mix)
        pipe.set_shira(mix) if mix else pipe.disable_shira()
        found = draw.draw(resident, folder, prompt, latents, steps=8)
        drawn = pipe(
            prompt, latents=torch.from_numpy(latents), num_inference_steps=8, guidance_scale=3.0, output_type="np"
        )
        expected = (drawn.images[0] * 255).round().astype(int)
        assert np.abs(found.astype(int) - expected).max() <= close


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.edge.draw", tmp_path / "none", "a cat"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1 and not ran.stdout
    assert (
        ran.stderr
        == f"error: no exported models in {tmp_path / 'none'}: expected a folder that shira export-onnx wrote\n"
    )
