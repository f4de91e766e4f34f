"""Fixtures of all tests; how they are made is in ``tiny``, which pytest-xdist's main process never imports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests import warm

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tiny models its threads mostly wait for each other

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline


def pytest_configure(config: pytest.Config) -> None:
    if warm.ADDRESS not in os.environ:  # workers of pytest-xdist have it from the main process
        config.add_cleanup(warm.start())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the files that mostly wait, for a browser or for Ray, evenly among those that compute.

    Three files run at a time on two cores: where all three waited, the cores would have nothing to do.
    """
    waits = {item.path: False for item in items}
    for item in items:
        waits[item.path] |= item.path.name == "test_replicas.py" or item.get_closest_marker("browser") is not None
    waiting, computing = ([file for file in waits if waits[file] is wait] for wait in (True, False))
    places = {file: k / (len(waiting) + 1) for k, file in enumerate(waiting)}  # the last is not the end
    places |= {file: k / len(computing) for k, file in enumerate(computing)}
    items.sort(key=lambda item: places[item.path])


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    from tests import tiny

    return tiny.pipeline()


@pytest.fixture(params=["float32", "float16", "bfloat16"], ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    import torch

    return getattr(torch, request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of several threads are rounded in another order than those of one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
