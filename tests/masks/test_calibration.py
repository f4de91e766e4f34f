"""Calibration streams: beside the sums, one dense gradient is alive at a time."""

import weakref

import pytest
import torch
from torch import Tensor

from shira_diffusers.masks.calibration import gradient_magnitudes
from shira_diffusers.weights.targets import select
from tests import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_dense_gradient_is_alive_at_a_time(dtype: torch.dtype) -> None:
    model = tiny.unet().to(dtype)
    weights = select(model)
    sample, text = torch.randn(1, 4, 8, 8).to(dtype), torch.ones(1, 3, 32, dtype=dtype)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watch(parameter: Tensor) -> None:
        """Runs before calibration's own hook: what came before this gradient must be gone or be a sum."""
        assert parameter.grad is not None
        alive.append(sum(gradient() is not None for gradient in made))
        made.append(weakref.ref(parameter.grad))

    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.register_post_accumulate_grad_hook(watch)

    def loss() -> Tensor:
        error: Tensor = model(sample, 10, text).sample.float().square().mean()
        return error

    found = gradient_magnitudes(model, weights, [loss, loss])
    assert len(alive) == 2 * len(weights)
    assert max(alive) == 0
    assert all(gradient() is None for gradient in made[:-1])
    assert found.keys() == weights.keys()
    assert all(total.dtype == torch.float32 for total in found.values())
