"""What needs no GPU of CUDA graphs: where they are refused, and calls on a CPU. tests/cuda has what they compute."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from shira_diffusers import AdapterLibrary, ShiraError
from shira_diffusers.serving.cuda_graphs import CapturedForward
from shira_diffusers.serving.scheduler import StepScheduler
from shira_diffusers.serving.settings import Settings
from tests import tiny
from tests.serving.test_scheduler import alone, drawn, request, write_adapters


@pytest.mark.parametrize("make", [tiny.pipeline, tiny.flux_pipeline])
def test_on_a_cpu_all_is_computed_as_ever(make: Callable[[], DiffusionPipeline], tmp_path: Path) -> None:
    pipe = make()
    write_adapters(pipe, tmp_path)
    with AdapterLibrary(tmp_path) as library:
        with StepScheduler(pipe, library, output_type="latent", cuda_graphs=True) as scheduler:
            pictures = [drawn(scheduler.submit(request(name))) for name in ("blue", "gold")]
        assert all("forward" not in vars(part) for part in tiny.modules_of(pipe).values())
        for picture, name in zip(pictures, ("blue", "gold"), strict=True):
            assert torch.equal(picture, alone(pipe, library, request(name)))


def test_the_forward_returns_after_an_error(pipe: DiffusionPipeline) -> None:
    captured = CapturedForward(pipe)
    with pytest.raises(ZeroDivisionError), captured.applied():
        assert pipe.unet.forward is captured
        raise ZeroDivisionError
    assert "forward" not in vars(pipe.unet)


def test_models_that_no_graph_fits_are_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    with pytest.raises(ShiraError, match="expected a pipeline with a unet or transformer, got Linear"):
        CapturedForward(torch.nn.Linear(1, 1))
    captured = CapturedForward(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ShiraError, match="unet is offloaded"):
        CapturedForward(pipe)
    with pytest.raises(ShiraError, match="unet is offloaded"), captured.applied():
        pass
    cast = tiny.pipeline()
    cast.unet.enable_layerwise_casting(torch.float16, torch.float32)
    with pytest.raises(ShiraError, match="unet is offloaded, or has other hooks"):
        CapturedForward(cast)
    compiled = tiny.pipeline()
    compiled.unet.compile(backend="eager")
    with pytest.raises(ShiraError, match="unet is compiled"), AdapterLibrary(tmp_path) as library:
        StepScheduler(compiled, library, cuda_graphs=True)
    quantized = tiny.pipeline()
    layer = quantized.unet.mid_block.attentions[0].proj_in
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ShiraError, match="unet is quantized"):
        CapturedForward(quantized)


def test_a_service_on_a_cpu_has_none() -> None:
    assert Settings.checked({"device": "cuda:0", "cuda_graphs": "true"}).cuda_graphs
    with pytest.raises(ShiraError, match="cuda_graphs: expected device=cuda, got 'cpu'"):
        Settings.checked({"cuda_graphs": True})
