"""What only an NVIDIA GPU can show of the service: its work is queued, and turns still come out right."""

import contextvars
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch.utils import _pytree as pytree

from shira_diffusers import AdapterLibrary
from shira_diffusers.engine import locks
from shira_diffusers.serving.cuda_graphs import CapturedForward, _Graph
from shira_diffusers.serving.scheduler import StepScheduler
from tests import tiny
from tests.engine.test_locks import Lock
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


# ---------------------------------------------------------------- CUDA graphs


@pytest.mark.parametrize("make", [tiny.pipeline, tiny.sdxl_pipeline, tiny.flux_pipeline])
def test_replayed_steps_have_the_bits_of_plain_calls(make: Callable[[], DiffusionPipeline], tmp_path: Path) -> None:
    pipe = make().to("cuda")
    write_adapters(pipe, tmp_path)
    before = tiny.snapshot(pipe)
    requests = [request("blue", steps=6), request("gold"), request(), request("oil", "blue", n=2, seed=3)]
    requests += [request("gold", width=2 * tiny.SIZE), request("oil", guidance=1.0)]
    with (
        AdapterLibrary(tmp_path) as library,
        StepScheduler(pipe, library, output_type="latent", cuda_graphs=True) as scheduler,
    ):
        for _ in range(2):
            jobs = [scheduler.submit(one) for one in requests]
            pictures = [drawn(job) for job in jobs]
            for one, picture in zip(requests, pictures, strict=True):
                assert torch.equal(picture, alone(pipe, library, one))
            assert scheduler._captured is not None
            assert scheduler._captured.graphs >= 3
            pipe.to("cpu")  # what the graphs compute with is not there any more
            pipe.to("cuda")
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, before)


def test_few_kinds_of_calls_are_remembered() -> None:
    pipe = tiny.pipeline(torch.float16).to("cuda")
    captured = CapturedForward(pipe)
    with torch.no_grad(), captured.applied():
        for size in (*range(8, 8 + 2 * 20, 2), 8):
            for _ in range(3):
                given = inputs(pipe, size)
                got = pipe.unet(*given, return_dict=False)[0]
                assert torch.equal(got, type(pipe.unet).forward(pipe.unet, *given, return_dict=False)[0])
        assert captured.graphs == 16


def test_what_waits_for_the_gpu_is_called_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    class Waits(AttnProcessor):
        def __call__(self, attention: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            hidden_states.sum().item()
            return super().__call__(attention, hidden_states, *args, **kwargs)

    pipe = tiny.pipeline(torch.float16).to("cuda")
    pipe.unet.set_attn_processor(Waits())
    given, captured = inputs(pipe, 8), CapturedForward(pipe)
    with torch.no_grad(), captured.applied():
        got = [pipe.unet(*given).sample for _ in range(4)]
    assert captured.graphs == 0
    assert caplog.text.count("cannot be captured") == 1
    with torch.no_grad():
        assert all(torch.equal(one, pipe.unet(*given).sample) for one in got)


def test_no_block_ends_amid_a_capture() -> None:
    """What it writes to put its mix back would be captured, not done."""
    lock = Lock()
    amid: list[int] = []

    def suspended() -> Iterator[None]:
        with lock.write():
            yield

    def forward(value: torch.Tensor) -> torch.Tensor:
        if generators:
            cycle: list[object] = [generators.pop()]
            cycle.append(cycle)
            del cycle
        gc.collect()
        amid.append(len(locks._active))
        return value + 1

    generators = [suspended()]
    contextvars.copy_context().run(next, generators[0])
    one = torch.ones(1, device="cuda")
    leaves, structure = pytree.tree_flatten(((one,), {}))
    graph = _Graph(forward, leaves, structure, torch.cuda.graph_pool_handle())
    assert amid == [1, 1]
    assert not locks._active
    assert graph.replay([one + 4]).item() == 6


def inputs(pipe: DiffusionPipeline, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = (2, 4, size, size), (2, 7, pipe.unet.config.cross_attention_dim)
    sample, text = (torch.randn(shape, dtype=torch.float16, device="cuda") for shape in shapes)
    return sample, torch.tensor(3, device="cuda"), text
