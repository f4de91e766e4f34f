"""Fixtures of all tests; how they are made is in ``tiny``."""

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
