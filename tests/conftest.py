"""Fixtures of all tests; how they are made is in ``tiny``."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests import tiny


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return tiny.pipeline()


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of several threads are rounded in another order than those of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
