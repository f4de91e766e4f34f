"""What only an NVIDIA GPU can show of the service: its work is queued, and turns still come out right."""

from pathlib import Path

import pytest
import torch

from shira_diffusers import AdapterLibrary
from shira_diffusers.serving.scheduler import StepScheduler
from tests import tiny
from tests.serving.test_scheduler import alone, drawn, request, write_adapters

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
def test_mixes_that_take_turns_have_the_bits_that_they_have_alone(offload: bool, tmp_path: Path) -> None:
    pipe = tiny.pipeline(torch.float16)
    write_adapters(pipe, tmp_path)
    before = tiny.snapshot(pipe)
    if offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to("cuda")
    requests = [request("blue", steps=6), request("gold"), request(), request("oil", "blue", n=2, seed=3)]
    with AdapterLibrary(tmp_path) as library:
        with StepScheduler(pipe, library, output_type="latent") as scheduler:
            jobs = [scheduler.submit(one) for one in requests]
            pictures = [drawn(job) for job in jobs]
        for one, picture in zip(requests, pictures, strict=True):
            assert torch.equal(picture, alone(pipe, library, one))
    pipe.unload_shira()
    pipe.to("cpu")
    tiny.assert_same_bits(pipe, before)
