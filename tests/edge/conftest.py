"""Fixtures of the edge's tests: a tiny pipeline, exported once per dtype."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from shira_diffusers import ShiraAdapter, save_adapter
from shira_diffusers.edge import OnnxResident
from shira_diffusers.edge.export import export_onnx
from tests import tiny

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the tiny pipeline in a dtype."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def export(dtype: str) -> Path:
        if dtype not in made:
            made[dtype] = export_onnx(tiny.pipeline(DTYPES[dtype]), folder / dtype)
        return made[dtype]

    return export


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Write an adapter to a file of its own."""

    def save(adapter: ShiraAdapter, name: str = "a") -> Path:
        return save_adapter(adapter, tmp_path / f"{name}.safetensors")

    return save


def one_thread() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return options


@pytest.fixture
def opened(exported: Callable[[str], Path]) -> Callable[..., OnnxResident]:
    def open_it(dtype: str = "fp32", components: list[str] | None = None) -> OnnxResident:
        return OnnxResident(exported(dtype), components, session_options=one_thread)

    return open_it
