"""Pictures in turns: each with the bits that it has alone, and the model as it was before."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from shira_diffusers import AdapterLibrary, save_adapter
from shira_diffusers.serving.requests import ImageRequest
from shira_diffusers.serving.scheduler import StepScheduler
from tests.tiny import SIZE, adapter_for, assert_same_bits, snapshot

NAMES = ("blue", "gold", "oil")


@pytest.fixture
def library(tmp_path: Path, pipe: DiffusionPipeline) -> Iterator[AdapterLibrary]:
    for seed, name in enumerate(NAMES):
        save_adapter(adapter_for(pipe, seed), tmp_path / f"{name}.safetensors")
    with AdapterLibrary(tmp_path) as library:
        yield library


def request(*mix: str, **options: Any) -> ImageRequest:
    given = {"prompt": "a red cat", "steps": 3, "width": SIZE, "height": SIZE, **options}
    return ImageRequest(mix={name: 0.5 + k for k, name in enumerate(mix)}, **given)


def alone(pipe: DiffusionPipeline, library: AdapterLibrary, batch: list[ImageRequest]) -> Tensor:
    """What a plain call draws: ``(pictures, 4, 8, 8)`` latents."""
    first, each = batch[0], [(one, k) for one in batch for k in range(one.n)]
    options = {} if first.guidance is None else {"guidance_scale": first.guidance}
    with library.use(pipe, first.mix):
        return pipe(
            [one.prompt for one, _ in each],
            num_inference_steps=first.steps,
            generator=[torch.Generator().manual_seed(one.seed + k) for one, k in each],
            width=first.width,
            height=first.height,
            output_type="latent",
            **options,
        ).images


def test_mixes_that_take_turns_have_the_bits_that_they_have_alone(
    pipe: DiffusionPipeline, library: AdapterLibrary
) -> None:
    before, order = snapshot(pipe), list[int]()
    requests = [request("blue", steps=6), request("gold"), request(), request("oil", "blue", n=2, seed=3)]
    with StepScheduler(pipe, library, output_type="latent") as scheduler:
        jobs = [scheduler.submit(one, lambda _, k=k: order.append(k)) for k, one in enumerate(requests)]
        pictures = [torch.stack(job.result(60)) for job in jobs]
    assert order != sorted(order)  # one after the other it was not
    assert_same_bits(pipe, before)
    assert pipe.list_shira() == {}
    for one, job, drawn in zip(requests, jobs, pictures, strict=True):
        assert job.batch == one.n
        assert torch.equal(drawn, alone(pipe, library, [one]))
